"""The stage `export`: a checkpoint -> a Hugging Face folder, checked before it gets its name."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxdistill import hub, progress
from jaxdistill.config import RunConfig
from jaxdistill.export import check
from jaxdistill.export.card import model_card
from jaxdistill.export.hf import Check, export_adapter, export_hf
from jaxdistill.models import (
    Decoder,
    ModelConfig,
    abstract_model,
    join_params,
    merge_lora,
    param_shardings,
    params_of,
    split_params,
    with_params,
)
from jaxdistill.models.orbax import load_params, saved_steps
from jaxdistill.models.student import lora_of, start_student
from jaxdistill.parallel.mesh import make_mesh
from jaxdistill.records import Problem, RunDir, read_records
from jaxdistill.served import Sample

SOME = 64
"""Problems and responses of a run for which the exported tokenizer is compared with the trained one."""


def export(config: RunConfig, run: RunDir, shared: RunDir) -> dict[str, Any]:
    """Exports the student that `run` trained.

    Args:
      shared: the run's own folder, with the problems and verdicts that a baseline shares.
    Returns:
      counts: step, tensors, bytes, the logits' difference from transformers', the server's answer if asked for.
    """
    port = check.free_port(config.export.port) if config.export.serve else 0  # a busy port is said before any work
    mesh = make_mesh({"fsdp": -1} if len(jax.devices()) > 1 else {})
    shape, init = _trained_shape(run), config.student.init
    step, model = _trained(config, run, shape, mesh)
    card = model_card(config, run, shared, shape, step)
    if model.lora is not None and config.export.lora == "adapter":
        assert init is not None  # the config was refused otherwise
        if hub.is_checkpoints(init):
            raise ValueError(
                f"export.lora: adapter needs a Hugging Face base, and {init} are checkpoints; use export.lora: merged."
            )
        counts = export_adapter(
            model,
            run.export,
            base=init,
            revision=config.student.revision,
            tokenizer=run.tokenizer,
            card=card,
            check=_check(config, model, "float32"),
            texts=_texts(config, shared),
        )
    else:
        counts = _export_whole(config, run, shared, merge_lora(model), card)
    counts |= {"step": step, "path": str(run.export)}
    found = counts["check"]
    difference = f"; transformers' logits differ by at most {found['max_difference']:.1e}" if found else ""
    progress.say(
        f"  step {step:,}: {counts['tensors']} tensors, {counts['bytes'] / 1e6:.1f} MB "
        f"in {counts['files']} file(s){difference}"
    )
    if config.export.serve and run == shared:
        counts["served"] = serve_once(config, run, shared, port)
    return counts


def _trained(config: RunConfig, run: RunDir, shape: ModelConfig, mesh: Mesh) -> tuple[int, Decoder]:
    """(step, student) of the checkpoint asked for; the frozen parameters of adapters come from where they came from."""
    lora = lora_of(config.student)
    abstract = abstract_model(shape, mesh=mesh, lora=lora)
    trained, _ = split_params(params_of(abstract))
    shardings, _ = split_params(param_shardings(shape, mesh, lora=lora))
    step, params = load_params(run.checkpoints, trained, shardings, _step(config.export.checkpoint, run))
    if lora is None:
        return step, with_params(abstract, params)
    _, frozen = split_params(params_of(start_student(config.student, shape, config.seed, mesh)))
    return step, with_params(abstract, join_params(params, frozen))


def _step(wanted: str | int, run: RunDir) -> int:
    """The step of the checkpoint that `export.checkpoint` names.

    Raises:
      ValueError: it is not there, or nothing says which one is best.
    """
    steps = saved_steps(run.checkpoints)
    if wanted == "last":
        return steps[-1]
    there = f"there are those of {', '.join(map(str, steps))}"
    if wanted != "best":
        if wanted not in steps:
            raise ValueError(f"{run.checkpoints}: export.checkpoint is {wanted}, but {there}; name one of these.")
        return int(wanted)
    path = run.checkpoints / "evaluations.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    losses = {line["step"]: line["loss"] for line in lines if line["step"] in steps and "loss" in line}
    if not losses:
        raise ValueError(
            f"{run.checkpoints}: export.checkpoint is best, but none of its checkpoints was evaluated ({there}); train "
            "with `train.evaluate: {every: N, rows: M}` and `train.keep_best: 1`."
        )
    return min(losses, key=lambda step: (losses[step], -step))


def _export_whole(config: RunConfig, run: RunDir, shared: RunDir, model: Decoder, card: str) -> dict[str, Any]:
    init = config.student.init
    # another run's checkpoints have a shape that `export_hf` writes anew
    base = hub.fetch(init, config.student.revision) if init and not hub.is_checkpoints(init) else None

    return export_hf(
        model,
        run.export,
        tokenizer=run.tokenizer,
        card=card,
        dtype=config.export.dtype,
        max_shard_bytes=int(config.export.max_shard_gib * (1 << 30)),
        check=_check(config, model, config.export.dtype),
        texts=_texts(config, shared),
        base_config=hub.read_config(base) if base else None,
        base_generation_config=hub.read_generation_config(base) if base else None,
    )


def _check(config: RunConfig, model: Decoder, dtype: str) -> Check | None:
    if config.export.check == "none":
        return None
    return lambda folder: check.check_logits(model, folder, dtype)


def _texts(config: RunConfig, shared: RunDir) -> Sample | None:
    """Problems and responses of the run, for which the exported tokenizer is compared; None if nothing is."""
    if config.export.check == "none":
        return None
    problems = [each.prompt for each in _some(shared.problems, _Problem)]
    responses = [each.response for each in _some(shared.traces, _Trace)]
    return Sample(problems, responses, config.data.system, config.data.suffix)


def _some(folder: Path, record: type) -> list[Any]:
    return list(itertools.islice(read_records(folder, record), SOME)) if any(folder.glob("*.parquet")) else []


@dataclass(frozen=True, slots=True)
class _Problem:
    prompt: str


@dataclass(frozen=True, slots=True)
class _Trace:
    response: str


def _trained_shape(run: RunDir) -> ModelConfig:
    path = run.checkpoints / "model.json"
    return ModelConfig.from_hf(json.loads(path.read_text()), str(path))


def serve_once(config: RunConfig, run: RunDir, shared: RunDir, port: int) -> dict[str, str]:
    """Starts vLLM's server on the export and has it answer one held-out problem."""
    folder = shared.problems / "heldout"
    problem: Problem = next(iter(read_records(folder if folder.is_dir() else shared.problems, Problem)))
    with check.vllm_server(
        run.export, port=port, log=run.root / "vllm-serve.log", python=config.traces.vllm.interpreter
    ) as url:
        answer = check.ask(url, problem.prompt + config.data.suffix, max_tokens=config.traces.max_tokens)
    progress.say(f"  served by vLLM: {problem.prompt}\n{answer}\n  (gold answer: {problem.answer})")
    return {"problem": problem.id, "question": problem.prompt, "gold": problem.answer or "", "answer": answer}
