"""What a training computes, from shapes alone: no data, no weights, no device need be there."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from jaxdistill.config import TrainConfig
from jaxdistill.data.rows import FIELDS
from jaxdistill.models import Decoder, Lora, ModelConfig, abstract_model, param_shardings, params_of, split_params
from jaxdistill.models.load import stored
from jaxdistill.parallel import mesh as meshes
from jaxdistill.train.contrastive import Contrast
from jaxdistill.train.distill import Distillation
from jaxdistill.train.optimizer import make_optimizer, make_schedule
from jaxdistill.train.step import Batch, State, make_step, state_shapes, state_shardings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """The compiled part of a training."""

    shape: tuple[int, int]
    """Of a global batch: rows, tokens."""
    steps: int
    mesh: Mesh
    student: ModelConfig
    lora: Lora | None
    model: Decoder
    """With shapes for parameters."""
    optimizer: optax.GradientTransformation
    shardings: State
    step: jax.stages.Wrapped


def make_program(
    train: TrainConfig,
    student: ModelConfig,
    lora: Lora | None,
    mesh: Mesh,
    *,
    row_tokens: int,
    steps: int,
    seed: int,
    contrast: Contrast | None = None,
    distillation: Distillation | None = None,
) -> Program:
    """
    Args:
      mesh: its devices may be described ones, see `jax.experimental.topologies`.
      row_tokens: of a packed row.
      contrast: of rows of pairs that every batch has beside the packed ones.
      distillation: what `train.distill` comes to; without it the loss is the cross-entropy alone.
    Raises:
      ValueError: a mesh that does not fit the model or the batch.
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if (train.batch_rows // train.micro_batches) % ways:
        raise ValueError(
            f"train.batch_rows={train.batch_rows} in {train.micro_batches} micro-batches does not divide over {ways} "
            "devices (data x fsdp); choose batch_rows as a multiple of micro_batches x data x fsdp."
        )
    if row_tokens % mesh.shape["context"]:
        raise ValueError(f"data.row_tokens={row_tokens} does not divide over context={mesh.shape['context']} devices.")
    optimizer = make_optimizer(train.optimizer, steps)
    shardings = state_shardings(student, optimizer, mesh, lora)
    model = abstract_model(student, dtype=train.compute_dtype, remat=train.remat, mesh=mesh, lora=lora)
    step = make_step(
        model,
        optimizer,
        shardings,
        region_weights=(train.thinking_weight, train.answer_weight),
        micro_batches=train.micro_batches,
        seed=seed,
        schedule=make_schedule(train.optimizer, steps),
        spike=train.spike,
        contrast=contrast,
        distillation=distillation,
    )
    return Program(
        shape=(train.batch_rows, row_tokens),
        steps=steps,
        mesh=mesh,
        student=student,
        lora=lora,
        model=model,
        optimizer=optimizer,
        shardings=shardings,
        step=step,
    )


def abstract_inputs(made: Program, base_dtype: str = "float32") -> tuple[State, Batch, Any]:
    """(state, batch, frozen parameters) of `made.step`, as shapes with dtypes and shardings.

    Args:
      base_dtype: of the parameters that are not trained, see `models.load_hf`.
    """
    trained, frozen = split_params(params_of(made.model))
    state = state_shapes(trained, made.optimizer)
    batch = {name: jax.ShapeDtypeStruct(made.shape, dtype) for name, dtype in FIELDS.items()}
    where = meshes.sharding(made.mesh, ("batch", "sequence"), shape=made.shape, name="batch")
    held = jax.tree.map_with_path(lambda path, p: jax.eval_shape(lambda: stored(p, path[-1].key, base_dtype)), frozen)
    _, shardings = split_params(param_shardings(made.student, made.mesh, lora=made.lora))
    return (
        jax.tree.map(_placed, state, made.shardings),
        jax.tree.map(lambda x: _placed(x, where), batch),
        # a quantized matrix is several arrays, which lie as it does
        jax.tree.map(lambda s, tree: jax.tree.map(lambda x: _placed(x, s), tree), shardings, held),
    )


def _placed(x: Any, where: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
