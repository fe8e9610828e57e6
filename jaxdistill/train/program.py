"""What a training computes, from shapes alone: no data, no weights, no device need be there."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdistill.config import TrainConfig
from jaxdistill.data.rows import FIELDS
from jaxdistill.data.topk import STORED_DTYPES, stored_shapes
from jaxdistill.models import (
    AttentionOptions,
    Decoder,
    Lora,
    ModelConfig,
    abstract_model,
    param_shardings,
    params_of,
    split_params,
)
from jaxdistill.models.attention import pallas as triton
from jaxdistill.models.attention import platform_of
from jaxdistill.models.load import stored
from jaxdistill.parallel import mesh as meshes
from jaxdistill.parallel.mesh import RULES
from jaxdistill.parallel.options import step_options
from jaxdistill.train.contrastive import Contrast
from jaxdistill.train.defaults import (
    compute_dtype_of,
    layer_parts_of,
    micro_batches_of,
    remat_of,
    step_size,
    teacher_bytes,
)
from jaxdistill.train.distill import Distillation
from jaxdistill.train.optimizer import make_optimizer, make_schedule
from jaxdistill.train.step import State, make_step, state_shapes, state_shardings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """The compiled part of a training."""

    shape: tuple[int, int]
    """Of a global batch: rows, tokens."""
    micro_batches: int
    """The parts that a step is taken in."""
    steps: int
    mesh: Mesh
    student: ModelConfig
    lora: Lora | None
    model: Decoder
    """With shapes for parameters."""
    optimizer: optax.GradientTransformation
    shardings: State
    step: jax.stages.Wrapped
    distillation: Distillation | None
    on_policy: Distillation | None = None
    """How the teacher grades rows that the student has sampled."""


def settle(
    train: TrainConfig,
    student: ModelConfig,
    lora: Lora | None,
    mesh: Mesh,
    row_tokens: int,
    *,
    base_dtype: str = "float32",
    memory: float | None = None,
    teacher: ModelConfig | None = None,
) -> TrainConfig:
    """`train` with nothing left open: its `micro_batches`, `compute_dtype` and `remat` are those of this mesh.

    Args:
      base_dtype: of parameters that are not trained.
      memory: bytes of one device, for devices that are not here; those that are tell themselves.
      teacher: the shape of the one that is distilled online, if there is one.
    Raises:
      ValueError: a remat policy or an attention kernel that the devices do not have.
    """
    platform, dropout = platform_of(mesh), lora is not None and lora.dropout > 0
    parts = micro_batches_of(train, platform, mesh.shape, row_tokens, student.hidden_size, dropout=dropout)
    dtype = compute_dtype_of(train, platform)
    if train.remat == "offload" and platform == "cpu":
        raise ValueError("train.remat: offload is for GPUs and TPUs; on CPUs set full, or leave it out.")
    if train.attention not in KERNELS_OF[platform]:
        known = ", ".join(KERNELS_OF[platform])
        raise ValueError(f"train.attention: {train.attention} does not run on a {platform}; choose one of {known}.")
    missing = triton.why_not(dtype, student.head_dim, mesh.devices.flat[0]) if train.attention == "triton" else None
    if missing:
        raise ValueError(f"train.attention: triton cannot be had here: {missing}; set auto, which takes the next best.")
    trained, frozen = (
        sum(x.size for x in jax.tree.leaves(p)) for p in split_params(params_of(abstract_model(student, lora=lora)))
    )
    size = step_size(
        train, student, mesh.shape, row_tokens, parts,
        trained=trained, frozen=frozen, frozen_bytes=PARAM_BYTES[base_dtype], itemsize=jax.numpy.dtype(dtype).itemsize,
    )  # fmt: skip
    if teacher is not None and train.distill is not None:
        numbers = sum(x.size for x in jax.tree.leaves(params_of(abstract_model(teacher))))
        byte = PARAM_BYTES[train.distill.dtype]
        size = dataclasses.replace(size, teacher=teacher_bytes(train, teacher, numbers, byte, mesh.shape, size))
    remat: Any = remat_of(train, platform, student, size, memory or memory_of(mesh))
    return dataclasses.replace(train, micro_batches=parts, compute_dtype=cast(Any, dtype), remat=remat)


KERNELS_OF = {
    "gpu": ("auto", "triton", "cudnn", "blocks", "dense"),
    "tpu": ("auto", "splash", "blocks", "dense"),
    "cpu": ("auto", "blocks", "dense"),
}
"""`train.attention` by platform; elsewhere a kernel would be interpreted, slowly, or not run at all."""
PARAM_BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.1, "nf4": 0.6}
"""Of one parameter that is not trained, its scales included."""


def memory_of(mesh: Mesh) -> float | None:
    """Bytes that a program may use on one of these devices; None if they do not tell."""
    if mesh.devices.flat[0].platform == "cpu":
        return None
    try:
        found = mesh.local_devices[0].memory_stats() if mesh.local_devices else None
    except (RuntimeError, jax.errors.JaxRuntimeError):  # a device that is only described
        return None
    return float(found["bytes_limit"]) if found and "bytes_limit" in found else None


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
    on_policy: Distillation | None = None,
    max_segments: int | None = None,
) -> Program:
    """
    Args:
      mesh: its devices may be described ones, see `jax.experimental.topologies`.
      row_tokens: of a packed row.
      contrast: of rows of pairs that every batch has beside the packed ones.
      distillation: what `train.distill` comes to; without it the loss is the cross-entropy alone.
      on_policy: what `train.on_policy` comes to.
      max_segments: the most segments of any row, where it is known.
    Raises:
      ValueError: a mesh that does not fit the model or the batch.
    """
    train = settle(train, student, lora, mesh, row_tokens)
    ways, micro_batches = mesh.shape["data"] * mesh.shape["fsdp"], train.micro_batches
    assert micro_batches is not None
    if (train.batch_rows // micro_batches) % ways:
        raise ValueError(
            f"train.batch_rows={train.batch_rows} in {micro_batches} micro-batches does not divide over {ways} "
            "devices (data x fsdp); choose batch_rows as a multiple of micro_batches x data x fsdp."
        )
    if row_tokens % mesh.shape["context"]:
        raise ValueError(f"data.row_tokens={row_tokens} does not divide over context={mesh.shape['context']} devices.")
    optimizer = make_optimizer(train.optimizer, steps)
    shardings = state_shardings(student, optimizer, mesh, lora)
    attention = AttentionOptions(train.attention, max_segments, train.deterministic)
    model = abstract_model(
        student, dtype=train.compute_dtype, remat=train.remat, mesh=mesh, lora=lora, attention=attention,
        layer_parts=layer_parts_of(
            platform_of(mesh), train.remat, train.batch_rows // micro_batches // ways, row_tokens, lora is not None
        ),
    )  # fmt: skip
    step = make_step(
        model,
        optimizer,
        shardings,
        region_weights=(train.thinking_weight, train.answer_weight),
        micro_batches=micro_batches,
        seed=seed,
        schedule=make_schedule(train.optimizer, steps),
        spike=train.spike,
        contrast=contrast,
        distillation=distillation,
        on_policy=on_policy,
        options=step_options(
            platform_of(mesh), device_kind=mesh.devices.flat[0].device_kind, deterministic=train.deterministic
        ),
    )
    return Program(
        shape=(train.batch_rows, row_tokens),
        micro_batches=micro_batches,
        steps=steps,
        mesh=mesh,
        student=student,
        lora=lora,
        model=model,
        optimizer=optimizer,
        shardings=shardings,
        step=step,
        distillation=distillation,
        on_policy=on_policy,
    )


def abstract_inputs(
    made: Program, base_dtype: str = "float32", *, teacher_dtype: str = "bfloat16", replicate: bool = False
) -> tuple[Any, Any, Any, Any]:
    """(state, batch, frozen parameters, teacher's parameters) of `made.step`: shapes with dtypes and shardings.

    Args:
      base_dtype: of the parameters that are not trained, see `models.load_hf`.
      teacher_dtype, replicate: as in `train.distill`.
    """
    trained, frozen = split_params(params_of(made.model))
    state = state_shapes(trained, made.optimizer)
    _, shardings = split_params(param_shardings(made.student, made.mesh, lora=made.lora))
    taught = None if made.distillation is None else made.distillation.teacher
    rules = {**RULES, "embed": None} if replicate else RULES
    shapes, where = batch_shapes(made.shape, made.mesh, made.distillation)
    return (
        jax.tree.map(_placed, state, made.shardings),
        {name: jax.ShapeDtypeStruct(*shapes[name], sharding=where[name]) for name in shapes},
        _held(frozen, shardings, base_dtype),
        None if taught is None else _held(
            params_of(taught), param_shardings(taught.config, made.mesh, rules), teacher_dtype
        ),
    )  # fmt: skip


def batch_shapes(
    shape: tuple[int, int], mesh: Mesh, distillation: Distillation | None
) -> tuple[dict[str, tuple[tuple[int, ...], Any]], dict[str, jax.sharding.Sharding]]:
    """(shape and dtype, sharding) of every array of a batch, by name."""
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {name: (shape, dtype) for name, dtype in FIELDS.items()}
    if distillation is not None and distillation.stored is not None:
        for name, more in stored_shapes(distillation.stored.k).items():
            shapes[name] = ((*shape, *more), STORED_DTYPES[name])
    axes = ("batch", "sequence", None)
    return shapes, {n: meshes.sharding(mesh, axes[: len(s)], shape=s, name="batch") for n, (s, _) in shapes.items()}


def _held(params: Any, shardings: Any, dtype: str) -> Any:
    """Parameters that are not trained; a quantized matrix is several arrays, which lie as it does."""
    held = jax.tree.map_with_path(lambda path, p: jax.eval_shape(lambda p: stored(p, path[-1].key, dtype), p), params)
    return jax.tree.map(lambda s, tree: jax.tree.map(lambda x: _placed(x, _fitting(x, s)), tree), shardings, held)


def _fitting(x: Any, like: NamedSharding) -> NamedSharding:
    """A matrix's sharding for an array that comes with it: axes that are too short stay whole, as those of scales."""
    spec: list[Any] = list(like.spec[: x.ndim])
    axes = [target if x.shape[i] % meshes.ways(like.mesh, target) == 0 else None for i, target in enumerate(spec)]
    return NamedSharding(like.mesh, PartitionSpec(*axes))


def _placed(x: Any, where: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
