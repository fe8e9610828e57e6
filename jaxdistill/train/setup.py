"""Everything that a training needs before its first step, from the config and the run's folders."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax

from jaxdistill.config import RunConfig, effective, to_dict
from jaxdistill.data.rows import Batches
from jaxdistill.models import ModelConfig, params_of, split_params
from jaxdistill.models.student import lora_of, start_student, student_shape
from jaxdistill.parallel.mesh import make_mesh
from jaxdistill.records import RunDir, read_manifest
from jaxdistill.tokenization import end_of_turn, load_tokenizer
from jaxdistill.train.answering import set_up_answerer
from jaxdistill.train.checkpoint import Checkpoints, Restored
from jaxdistill.train.contrastive import Contrast
from jaxdistill.train.distill import set_up_distillation, teacher_shape
from jaxdistill.train.feed import TrainRows
from jaxdistill.train.grading import set_up_grader
from jaxdistill.train.on_policy import Rollouts, graded
from jaxdistill.train.pairs import PairFeed, reference_identity, reference_logprobs, set_up_contrast
from jaxdistill.train.program import Program, make_program, settle
from jaxdistill.train.step import State, init_state, state_shapes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training(Program):
    """A training, ready to begin or to go on."""

    config: RunConfig
    """Of the run, with nothing of the step left open."""
    rows: TrainRows
    epochs: float
    contrast: Contrast | None
    pairs: PairFeed | None
    """The rows of pairs of every step, where the training is contrastive."""
    rollouts: Rollouts | None
    """The rows that the student samples itself, where the training is on policy."""
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
    batches = Batches(run.tokens, batch_rows=config.train.batch_rows, seed=config.seed)
    tokenizer = load_tokenizer(str(run.tokenizer))
    student, lora = student_shape(config.student, len(tokenizer), batches.row_tokens), lora_of(config.student)
    mesh = make_mesh(to_dict(config.train.mesh))
    base = config.student.lora.base_dtype if config.student.lora else "float32"
    t = settle(config.train, student, lora, mesh, batches.row_tokens, base_dtype=base, teacher=teacher_shape(config))
    config = dataclasses.replace(config, train=t)
    steps = t.steps or math.ceil((t.epochs or 0) * batches.rows / t.batch_rows)
    contrast, pairs = set_up_contrast(config, run, mesh, student.vocab_size)
    distillation, teacher, of_teacher = set_up_distillation(config, run, mesh, steps, batches, student.vocab_size)
    vocabulary, grader, of_grader = set_up_grader(config, run, batches.row_tokens, student.vocab_size)
    made = make_program(
        t,
        student,
        lora,
        mesh,
        row_tokens=batches.row_tokens,
        steps=steps,
        seed=config.seed,
        contrast=contrast,
        distillation=distillation if t.distill is not None and t.distill.distills else None,
        on_policy=graded(t, distillation, vocabulary),
        max_segments=_most_segments(run, pairs),
    )
    held_out = t.evaluate.rows if t.evaluate else 0
    stored = t.distill is not None and t.distill.source == "stored"
    rows = TrainRows(batches, seed=config.seed, vocabulary=student.vocab_size, held_out=held_out, stored=stored)
    rollouts = None
    if t.on_policy is not None:
        assert made.on_policy is not None and made.on_policy.vocabulary is not None
        answerer = set_up_answerer(t, run, batches.row_tokens, end_of_turn(tokenizer))
        rollouts = Rollouts(t, made, rows, answerer, grader, vocabulary=made.on_policy.vocabulary, seed=config.seed)
    return Training(
        **{field.name: getattr(made, field.name) for field in dataclasses.fields(made)},
        config=config,
        rows=rows,
        epochs=steps * t.batch_rows / batches.rows,
        contrast=contrast,
        pairs=pairs,
        rollouts=rollouts,
        identity=_identity(config, run, student, batches) | of_teacher | of_grader,
        teacher=teacher,
    )


def start_state(run: RunDir, made: Training, checkpoints: Checkpoints) -> tuple[State, Any, Restored | None]:
    """(state, frozen parameters, the checkpoint that it comes from or None); parameters are never held twice."""
    config = made.config
    trained, frozen = split_params(params_of(made.model))
    restored = checkpoints.restore(state_shapes(trained, made.optimizer), made.shardings)
    check = config.student.check and restored is None  # what goes on was compared when it began

    def start() -> tuple[Any, Any]:
        model = start_student(config.student, made.student, config.seed, made.mesh, check=check)
        return split_params(params_of(model))

    if made.contrast is not None and made.pairs is not None:
        identity = reference_identity(config, run)
        reference_logprobs(made.contrast, made.pairs, made.model, run.checkpoints, identity, start)
    if restored is not None and not frozen:
        return restored.state, {}, restored
    trained, frozen = start()
    if restored is not None:
        return restored.state, frozen, restored
    return init_state(trained, made.optimizer, made.shardings), frozen, None


def _most_segments(run: RunDir, pairs: PairFeed | None) -> int | None:
    """The most segments of a row; None if the rows were prepared before it was counted."""
    packed = (read_manifest(run.tokens) or {}).get("counts", {}).get("most_segments")
    return packed if packed is None or pairs is None else max(packed, pairs.rows.segments)


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
    parts = f" in {made.micro_batches} parts" if made.micro_batches > 1 else ""
    t = made.config.train
    remat = f", remat {t.remat}" if t.remat != "none" else ""
    return (
        f"  {parameters:,} parameters, {made.steps:,} steps of {made.shape[0]} x {made.shape[1]} tokens{parts} "
        f"({made.epochs:.1f} epochs) on {devices}{hosts}, {t.compute_dtype}{remat}"
    )
