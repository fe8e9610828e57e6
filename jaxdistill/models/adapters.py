"""Adapters in PEFT's format: their name map, their config, and a base checkpoint loaded with them.

Source: https://github.com/huggingface/peft (LoraConfig, and `base_model.model.` before every name of a tensor)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxdistill import hub
from jaxdistill.models.config import ModelConfig
from jaxdistill.models.lora import ALL, LORA_A, LORA_B, Lora
from jaxdistill.models.names import Entry, entries
from jaxdistill.models.refusals import is_count, is_number
from jaxdistill.models.tensor_files import FLOATS, Tensor, read_header

CONFIG, WEIGHTS = hub.ADAPTER, hub.ADAPTER_WEIGHTS

# PEFT has many settings that change what an adapter computes, or the matrices of its base, and more with every release.
# So every setting has to be absent or off, but these: those with values under which it is a plain LoRA on linear
# layers, ...
_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "task_type": ("CAUSAL_LM",),
    "bias": ("none",),
    # others (pissa, olora, corda, lora_ga, loftq, ...) change the base's matrices too
    "init_lora_weights": (True, "gaussian"),
}
# ... those that are read, ...
_READ = frozenset({
    "peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules",
    "base_model_name_or_path", "revision",
})  # fmt: skip
# ... and those that change nothing by themselves.
_ANY = frozenset({
    "auto_mapping", "peft_version", "inference_mode", "megatron_core", "qalora_group_size", "runtime_config",
})  # fmt: skip
# empty, these are off; elsewhere an empty list may mean something (`alora_invocation_tokens`)
_MAY_BE_EMPTY = frozenset({
    "rank_pattern", "alpha_pattern", "loftq_config", "modules_to_save", "exclude_modules", "target_parameters",
    "layers_to_transform", "layers_pattern",
})  # fmt: skip


def adapter_entries(config: ModelConfig, lora: Lora) -> list[Entry]:
    """Every adapter parameter: our stacked arrays, and PEFT's tensor in each layer."""
    found = []
    for entry in entries(config):
        if entry.path[-1] in lora.targets:
            stem = "base_model.model." + entry.hf.removesuffix(".weight")
            for ours, theirs in ((LORA_A, "lora_A"), (LORA_B, "lora_B")):
                path = (*entry.path[:-1], entry.path[-1] + ours)
                found.append(Entry(path, f"{stem}.{theirs}.weight", transposed=True))
    return found


def to_peft(lora: Lora, base: str, revision: str | None) -> dict[str, Any]:
    """`adapter_config.json`."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": [f"{name}_proj" for name in lora.targets],
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def read_peft(folder: Path) -> tuple[Lora, str, str | None]:
    """(shape, base checkpoint, its revision) of an adapter folder.

    Raises:
      ValueError: it is no JSON object, or not a plain LoRA on linear layers.
    """
    path = folder / CONFIG
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: a JSON {type(config).__name__} instead of an object; export the adapter again.")
    if config.get("peft_type") != "LORA":
        raise ValueError(
            f"{path}: peft_type={config.get('peft_type')!r} is not supported, only LORA is; merge the adapter into its "
            "base with PEFT, if it can be merged, and name the result."
        )
    for key, value in config.items():
        if key not in _READ | _ANY and not _is_off(key, value):
            raise ValueError(
                f"{path}: {key}={value!r} is not supported: it is not known to leave a plain LoRA; merge the adapter "
                "into its base with PEFT first, and name the result."
            )
    base = config.get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{path}: no base_model_name_or_path; write the base checkpoint's folder or id into it.")
    return _read_lora(config, path), str(base), config.get("revision")


def _is_off(key: str, value: Any) -> bool:
    # by identity: 0 is a layer in layers_to_transform, and False is not 0
    if value is None or value is False or (value in ([], {}) and key in _MAY_BE_EMPTY):
        return True
    return any(value is plain or (isinstance(value, str) and value == plain) for plain in _PLAIN.get(key, ()))


def _read_lora(config: Mapping[str, Any], path: Path) -> Lora:
    rank, alpha, dropout = config.get("r"), config.get("lora_alpha"), config.get("lora_dropout") or 0.0
    if not is_count(rank) or not is_number(alpha) or not is_number(dropout):
        raise ValueError(
            f"{path}: r={rank!r}, lora_alpha={alpha!r}, lora_dropout={dropout!r}; the first has to be a whole number "
            "above 0, and the others numbers."
        )
    if not isinstance(rslora := config.get("use_rslora") or False, bool):
        raise ValueError(f"{path}: use_rslora={rslora!r}; it has to be true or false.")
    targets = config.get("target_modules") or []
    if isinstance(targets, str) and targets != ALL:
        # a pattern, which PEFT has applied: what is adapted has tensors
        names = read_header(path.parent / WEIGHTS)
        targets = sorted({parts[-3] for name in names if len(parts := name.split(".")) > 3 and parts[-1] == "weight"})
    elif not isinstance(targets, str):
        # PEFT takes the end of a path as well, such as self_attn.q_proj
        targets = [str(t) if any(map(str.isdigit, str(t).split("."))) else str(t).split(".")[-1] for t in targets]
    try:
        # rank-stabilized LoRA is scaled by alpha / sqrt(r) (arXiv:2312.03732)
        return Lora.of(rank, float(alpha * rank**0.5 if rslora else alpha), float(dropout), targets)
    except ValueError as error:
        raise ValueError(f"{path}: target_modules: {error}") from None


def fetch_base(folder: Path) -> Path:
    """The folder of the checkpoint that adapters belong to.

    Raises:
      ValueError: it is not to be had, or has adapters itself.
    """
    _, name, revision = read_peft(folder)
    where = f"{folder / CONFIG}: base_model_name_or_path is {name!r}"
    try:
        base = hub.fetch(name, revision)
    except ValueError as error:
        raise ValueError(
            f"{where}, and the base cannot be had ({error}); write the base checkpoint's repository id, or its folder "
            "as an absolute path, into it."
        ) from None
    if hub.is_adapter(base):
        raise ValueError(f"{where}, which is an adapter itself; merge that one into its base with PEFT first.")
    return base


def base_of(folder: Path) -> Path:
    """The folder itself, or the one that its adapters belong to."""
    return fetch_base(folder) if hub.is_adapter(folder) else folder


def read_adapter(folder: Path, config: ModelConfig, lora: Lora) -> dict[str, Any]:
    """The adapter's parameters, fp32, stacked over layers, by our names.

    Raises:
      ValueError: a tensor is missing, left over or of another shape.
    """
    tensors = read_header(folder / WEIGHTS)
    found: dict[str, Any] = {}
    expected = set()
    for entry in adapter_entries(config, lora):
        names = entry.hf_names(config)
        expected |= set(names)
        layers = [_read(tensors, name, folder) for name in names]
        shapes = {layer.shape for layer in layers}
        # A is [rank, inputs], B [outputs, rank]
        ranks = {shape[1 if entry.path[-1].endswith(LORA_B) else 0] if len(shape) == 2 else None for shape in shapes}
        if len(shapes) > 1 or ranks != {lora.rank}:
            raise ValueError(
                f"{folder / WEIGHTS}: {names[0]} and its like have shapes {sorted(shapes)}; expected rank {lora.rank}."
            )
        found[entry.path[-1]] = jnp.asarray(np.stack(layers).swapaxes(1, 2))
    extra = sorted(set(tensors) - expected)
    if extra:
        raise ValueError(f"{folder / WEIGHTS}: tensor {extra[0]} has no place in an adapter of {config.model_type}.")
    return found


def _read(tensors: Mapping[str, Tensor], name: str, folder: Path) -> np.ndarray:
    if name not in tensors:
        raise ValueError(f"{folder / WEIGHTS}: tensor {name} is missing; export the adapter again.")
    if tensors[name].dtype not in FLOATS:
        raise ValueError(
            f"{folder / WEIGHTS}: tensor {name} is {tensors[name].dtype}, and weights must be {'/'.join(FLOATS)}."
        )
    return tensors[name].read().astype(np.float32)
