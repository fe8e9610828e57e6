"""The stage `export`: the newest checkpoint -> a Hugging Face folder, checked before it gets its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax

from jaxdistill import hub, progress
from jaxdistill.config import RunConfig
from jaxdistill.export import check
from jaxdistill.export.card import model_card
from jaxdistill.export.hf import export_hf
from jaxdistill.models import ModelConfig, abstract_model, param_shardings, params_of, with_params
from jaxdistill.parallel.mesh import make_mesh
from jaxdistill.records import Problem, RunDir, read_records
from jaxdistill.train.checkpoint import load_params


def export(config: RunConfig, run: RunDir, shared: RunDir) -> dict[str, Any]:
    """Exports the student that `run` trained.

    Args:
      shared: the run's own folder, with the problems and verdicts that a baseline shares.
    Returns:
      counts: step, tensors, bytes, the logits' difference from transformers', the server's answer if asked for.
    """
    port = check.free_port(config.export.port) if config.export.serve else 0  # a busy port is said before any work
    mesh = make_mesh({"fsdp": -1} if len(jax.devices()) > 1 else {})
    model_config = _trained_shape(run)
    model = abstract_model(model_config)
    step, params = load_params(run.checkpoints, params_of(model), param_shardings(model_config, mesh))
    model = with_params(model, params)

    init = config.student.init
    base = hub.fetch(init, config.student.revision) if init else None

    def verify(folder: Path) -> dict[str, float] | None:
        return check.check_logits(model, folder, config.export.dtype) if config.export.check == "transformers" else None

    counts = export_hf(
        model,
        run.export,
        tokenizer=run.tokenizer,
        card=model_card(config, run, shared, model_config, step),
        dtype=config.export.dtype,
        max_shard_bytes=int(config.export.max_shard_gib * (1 << 30)),
        check=verify,
        base_config=hub.read_config(base) if base else None,
        base_generation_config=hub.read_generation_config(base) if base else None,
    )
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
