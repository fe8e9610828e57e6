"""YAML and `--set` overrides -> a checked `RunConfig`, with errors that name the key and the way out."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydantic
import yaml

from jaxdistill.config.keys import hint, known_keys, nearest_section, section_of
from jaxdistill.config.run import RunConfig


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Reads a YAML file and applies `key.sub=value` overrides, whose values are YAML too.

    Raises:
      ValueError: no such file, broken YAML, an unknown key (the nearest is named), a wrong type or value.
    """
    path = Path(path)
    try:
        text = path.read_text()
    except OSError as error:
        raise ValueError(
            f"{path}: {str(error.strerror).lower()}; name a YAML file, such as configs/quickstart.yaml."
        ) from None
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise ValueError(
            f"{path}: expected a mapping of sections (problems, traces, ...), found {type(data).__name__}."
        )
    for override in overrides:
        _set(data, *_split_override(override))
    return build(data, where=str(path))


def build(data: dict[str, Any], where: str = "config") -> RunConfig:
    """A checked `RunConfig` from plain data; baselines are checked too, so that none fails hours later."""
    config = _validate(data, where)
    for name in config.baselines:
        with_baseline(config, name, where)
    return config


def with_baseline(config: RunConfig, name: str, where: str = "config") -> RunConfig:
    """The config of one baseline: the run's, with the baseline's differences set."""
    data = to_dict(config)
    overrides = data.pop("baselines")[name]
    for key, value in overrides.items():
        if key.split(".")[0] not in {"data", "train", "student", "export", "seed"}:
            raise ValueError(
                f"{where}: baselines.{name}: {key} cannot differ; a baseline shares problems, traces and verdicts, "
                "and may differ in data, train, student, export and seed."
            )
        _set(data, key, value)
    return _validate(data, f"{where}: baselines.{name}")


def to_dict(config: Any) -> dict[str, Any]:
    """Plain data (dicts, lists, numbers, strings) that `build` reads back to the same config."""
    return json.loads(pydantic.TypeAdapter(type(config)).dump_json(config))


# what changes how fast or where something is computed, and not what comes out
_WITHOUT_EFFECT = {
    "ProblemsConfig": {"bad_rows", "bad_rows_share"},
    "DataConfig": {"workers"},
    "VerifyConfig": {"workers", "executor", "ray"},
    "JudgeConfig": {"batch"},
    "StudentConfig": {"check"},
    "TracesConfig": {"batch", "retry_failed", "executor", "ray"},
    "ServerConfig": {
        "urls",
        "start",
        "dialect",
        "max_tokens_field",
        "api_key_env",
        "in_flight",
        "timeout_s",
        "retries",
        "backoff_s",
        "patience_s",
    },
    "EvaluateConfig": {"batch", "server"},
    "QualityConfig": {"batch"},
    "TrainConfig": {
        "mesh",
        "micro_batches",
        "remat",
        "attention",
        "deterministic",
        "checkpoint_every",
        "keep_checkpoints",
        "keep_best",
        "accept_changed",
        "log_every",
        "on_bad_step",
        "max_skipped",
        "tensorboard",
        "wandb",
        "profile",
        "peak_tflops",
    },
    "DistillConfig": {"replicate"},
    "TrainEvaluateConfig": {"every", "problems", "max_tokens"},
    "ExportConfig": {"port", "serve"},
    "VLLMConfig": {
        "max_num_seqs",
        "enforce_eager",
        "kv_cache_gib",
        "gpu_memory_utilization",
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "enable_prefix_caching",
        "python",
    },
}


def effective(value: Any) -> Any:
    """A config section as plain data, without the keys that do not change what comes out."""
    if dataclasses.is_dataclass(value):
        dropped = _WITHOUT_EFFECT.get(type(value).__name__, set())
        return {f.name: effective(getattr(value, f.name)) for f in dataclasses.fields(value) if f.name not in dropped}
    if isinstance(value, dict):
        return {k: effective(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [effective(v) for v in value]
    return value


def fingerprint(*parts: Any) -> str:
    """A short hash of plain data and of config sections: equal exactly if everything that has an effect is."""
    return hashlib.sha256(json.dumps(effective(parts), sort_keys=True).encode()).hexdigest()[:16]


def differences(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """(key, `old -> new`) of every value in which two pieces of plain data differ.

    What is empty now may have been absent then: a key that is newer than the run.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif old != new and not (old is None and new in ([], {})):
        yield path, f"{old} -> {new}"


def _split_override(text: str) -> tuple[str, Any]:
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise ValueError(f"--set {text}: write it as key=value, such as train.optimizer.learning_rate=1e-3.")
    return key.strip(), yaml.safe_load(value)


def _set(data: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        if not isinstance(data.get(parent), dict):
            data[parent] = {}
        data = data[parent]
    data[last] = value


def _validate(data: dict[str, Any], where: str) -> RunConfig:
    try:
        return pydantic.TypeAdapter(RunConfig).validate_python(data)
    except pydantic.ValidationError as error:
        raise ValueError(f"{where}: " + "; ".join(_explain(data, e) for e in error.errors()[:3])) from None


def _explain(data: dict[str, Any], error: Any) -> str:
    """One pydantic error as one sentence that names the key and the way out."""
    path = [str(p) for p in error["loc"]]
    key, kind = ".".join(path), error["type"]
    if kind == "unexpected_keyword_argument":
        return f"unknown key {_unknown(path, error['input'])}"
    if kind in ("dataclass_type", "dataclass_exact_type") and (known := known_keys(path)):
        return f"{key} is {error['input']!r}, but it is a section; write its keys below it: {', '.join(known)}."
    if kind in ("missing", "missing_keyword_only_argument"):
        return f"{key} is missing; {_doc_of(path)}"
    if kind == "value_error":
        message = error["msg"].removeprefix("Value error, ")
        # a section that is used twice (problems) does not know its own name
        return message if path and path[-1] in message.split(" ")[0] else f"{key}: {message}" if key else message
    return f"{key} is {error['input']!r}: {error['msg'][0].lower()}{error['msg'][1:]}."


def _unknown(path: list[str], value: Any) -> str:
    """An unknown key, and what was meant; of an unknown section, what its keys are here."""
    slip = len(path) == 1 and nearest_section(path[0])
    if not isinstance(value, dict) or not value or slip:
        return f"{'.'.join(path)}; {hint(path)}"
    keys = [[*path, str(name)] for name in value][:3]
    return "; ".join(f"{'.'.join(each)}; {hint(each)}" for each in keys)


def _doc_of(path: list[str]) -> str:
    cls = section_of(path[:-1])
    return f"see {cls.__name__} in {cls.__module__.replace('.', '/')}.py." if cls else "set it."
