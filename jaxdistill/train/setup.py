"""Everything that a training needs before its first step, from the config and the run's folders."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from jaxdistill.config import RunConfig, effective, to_dict
from jaxdistill.data.rows import Batches
from jaxdistill.models import Decoder, Lora, ModelConfig, abstract_model, params_of, split_params
from jaxdistill.models.student import lora_of, start_student, student_shape
from jaxdistill.parallel.mesh import make_mesh
from jaxdistill.records import RunDir, read_manifest
from jaxdistill.tokenization import load_tokenizer
from jaxdistill.train.checkpoint import Checkpoints, Restored
from jaxdistill.train.distill import set_up_distillation
from jaxdistill.train.feed import TrainRows
from jaxdistill.train.optimizer import make_optimizer, make_schedule
from jaxdistill.train.step import State, init_state, make_step, state_shapes, state_shardings


@dataclasses.dataclass(frozen=True)
class Training:
    """A training, ready to begin or to go on."""

    rows: TrainRows
    shape: tuple[int, int]
    """Of a global batch: rows, tokens."""
    steps: int
    epochs: float
    mesh: Mesh
    student: ModelConfig
    lora: Lora | None
    model: Decoder
    """With shapes for parameters."""
    optimizer: optax.GradientTransformation
    shardings: State
    step: Callable[..., Any]
    identity: dict[str, Any]
    """What a checkpoint must agree with, as plain data."""
    teacher: Any
    """Parameters of the teacher that is distilled online, if there is one."""


def set_up(config: RunConfig, run: RunDir) -> Training:
    """
    Raises:
      ValueError: no rows, rows that are too long for the student, a mesh that does not fit devices, model or batch,
        or a teacher of another tokenizer.
    """
    t = config.train
    batches = Batches(run.tokens, batch_rows=t.batch_rows, seed=config.seed)
    steps = t.steps or math.ceil((t.epochs or 0) * batches.rows / t.batch_rows)
    mesh = make_mesh(to_dict(t.mesh))
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if (t.batch_rows // t.micro_batches) % ways:
        raise ValueError(
            f"train.batch_rows={t.batch_rows} in {t.micro_batches} micro-batches does not divide over {ways} devices "
            "(data x fsdp); choose batch_rows as a multiple of micro_batches x data x fsdp."
        )
    if batches.row_tokens % mesh.shape["context"]:
        raise ValueError(
            f"data.row_tokens={batches.row_tokens} does not divide over context={mesh.shape['context']} devices."
        )
    student = student_shape(config.student, len(load_tokenizer(str(run.tokenizer))), batches.row_tokens)
    lora = lora_of(config.student)
    optimizer = make_optimizer(t.optimizer, steps)
    shardings = state_shardings(student, optimizer, mesh, lora)
    model = abstract_model(student, dtype=t.compute_dtype, remat=t.remat, mesh=mesh, lora=lora)
    held_out = t.evaluate.rows if t.evaluate else 0
    stored = t.distill is not None and t.distill.source == "stored"
    rows = TrainRows(batches, seed=config.seed, vocabulary=student.vocab_size, held_out=held_out, stored=stored)
    distillation, teacher, of_teacher = set_up_distillation(config, run, mesh, steps, batches, student.vocab_size)
    return Training(
        rows=rows,
        shape=(t.batch_rows, batches.row_tokens),
        steps=steps,
        epochs=steps * t.batch_rows / batches.rows,
        mesh=mesh,
        student=student,
        lora=lora,
        model=model,
        optimizer=optimizer,
        shardings=shardings,
        step=make_step(
            model,
            optimizer,
            shardings,
            region_weights=(t.thinking_weight, t.answer_weight),
            micro_batches=t.micro_batches,
            seed=config.seed,
            schedule=make_schedule(t.optimizer, steps),
            spike=t.spike,
            distillation=distillation,
        ),
        identity=_identity(config, run, student, batches) | of_teacher,
        teacher=teacher,
    )


def start_state(config: RunConfig, made: Training, checkpoints: Checkpoints) -> tuple[State, Any, Restored | None]:
    """(state, frozen parameters, the checkpoint that it comes from or None); parameters are never held twice."""
    trained, frozen = split_params(params_of(made.model))
    restored = checkpoints.restore(state_shapes(trained, made.optimizer), made.shardings)
    if restored is not None and not frozen:
        return restored.state, {}, restored
    started = params_of(start_student(config.student, made.student, config.seed, made.mesh))
    trained, frozen = split_params(started)
    if restored is not None:
        return restored.state, frozen, restored
    return init_state(trained, made.optimizer, made.shardings), frozen, None


def _identity(config: RunConfig, run: RunDir, student: ModelConfig, batches: Batches) -> dict[str, Any]:
    manifest = read_manifest(run.tokens) or {"config": {}, "inputs": {}}
    return {
        **manifest["config"],
        "tokens": {"rows": batches.rows, "row_tokens": batches.row_tokens, "from": manifest["inputs"]},
        "train": effective(config.train),
        "student": effective(config.student),
        "model": student.to_hf(),
        "seed": config.seed,
    }


def describe(made: Training, parameters: int) -> str:
    """What is about to be trained, in one line for people."""
    devices = f"{made.mesh.size} {jax.devices()[0].platform} device(s)"
    hosts = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return (
        f"  {parameters:,} parameters, {made.steps:,} steps of {made.shape[0]} x {made.shape[1]} tokens "
        f"({made.epochs:.1f} epochs) on {devices}{hosts}"
    )
