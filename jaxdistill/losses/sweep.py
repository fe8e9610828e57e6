"""One sweep over chunks of trained tokens: project, score, and form the gradients at once.

Dimension key: N tokens of a device, C tokens of a chunk, E width, V vocabulary, W columns of it that a device holds.

Logits exist for one chunk at a time. Tokens that no loss weighs are compacted away first, so they never reach the
projection; the number of chunks is a traced number, so that shapes are static and masked tokens still cost nothing. The
gradients by hidden states and projection are formed in the forward sweep, while the chunk's logits are there: three
matrix products instead of the four of a backward pass that projects again (Liger Kernel, Hsu et al. 2024,
arXiv:2410.10989, section 3.2, does the same). Without differentiation there is one product alone.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxdistill.losses.products import gradients, product
from jaxdistill.losses.vocabulary import LOWEST, Layout, Vocabulary

Sums = dict[str, jax.Array]
Inputs = dict[str, jax.Array]
Head = tuple[jax.Array, jax.Array]
"""(hidden states [..., E], projection [V, E])"""

CHUNK_BYTES = {"cpu": 160 << 20, "gpu": 1280 << 20, "tpu": 2048 << 20}
"""fp32 logits of one chunk, by backend. Larger chunks add to the projection's gradient less often, which moves all of
it each time; smaller ones save memory. CPU: measured (tools/bench_losses.py). GPU: by the bytes that the compiled step
moves for it, 80 GB with 512 MiB and 20 GB with 1,280, of 32,768 tokens and 151,936 columns of 1,024."""


CHUNKS = "vocabulary_chunks"
"""Scope of the loop over chunks, whose length is known at run time only: `plan` and profiles go by it."""


@runtime_checkable
class Objective(Protocol):
    """What is computed of one chunk. Instances are hashable: they are static to the compiler."""

    def __call__(
        self, logits: jax.Array, teacher: jax.Array | None, inputs: Inputs, vocabulary: Vocabulary
    ) -> tuple[Sums, jax.Array]:
        """fp32 logits [C, W], the teacher's likewise, inputs [C, ...] -> (weighted values [C] by name, slopes [C, W]).

        The slopes are the derivative of the value named "sum" by the student's logits.
        """
        ...


@dataclass(frozen=True)
class Plan:
    """What is static in a sweep.

    Attributes:
      vocabulary: number of real tokens; columns beyond are left out.
      chunk: tokens projected at once, on each device.
      dtype: of the matrix products' inputs; products are summed in fp32.
      softcap: logits are softcap * tanh(logits / softcap); None: as they are.
      layout: how the arrays lie on a mesh; None on one device.
    """

    objective: Objective
    vocabulary: int
    chunk: int | None
    dtype: Any
    softcap: float | None = None
    teacher_softcap: float | None = None
    layout: Layout | None = None

    def __post_init__(self) -> None:
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"chunk is {self.chunk}; project at least one token at a time.")
        for name, cap in (("softcap", self.softcap), ("teacher_softcap", self.teacher_softcap)):
            if cap is not None and cap <= 0:
                raise ValueError(f"{name} is {cap}; set it above 0, or None for logits as they are.")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def sweep(plan: Plan, student: Head, teacher: Head | None, inputs: Inputs) -> Sums:
    """Totals over all tokens by name; "sum" is differentiable by the student's hidden states and projection alone.

    Args:
      inputs: per-token arrays, [..., E]'s leading axes first; "used" (bool) says which tokens are looked at.
    """
    return _run(plan, student, teacher, inputs, ())[0]


def _forward(plan: Plan, student: Any, teacher: Any, inputs: Any) -> tuple[Sums, tuple[jax.Array | None, ...]]:
    # a projection that is frozen, as beside adapters, needs no gradient: a third of the products, and all its memory
    wanted = WANTED if student[1].perturbed else WANTED[:1]
    student, teacher, inputs = jax.tree.map(
        lambda x: x.value, (student, teacher, inputs), is_leaf=lambda x: hasattr(x, "perturbed")
    )
    sums, found = _run(plan, student, teacher, inputs, wanted)
    return sums, tuple(found.get(name) for name in WANTED)


def _backward(plan: Plan, saved: tuple[jax.Array | None, ...], cotangents: Any) -> tuple[Any, ...]:
    scale = cotangents["sum"]
    if isinstance(scale, jax.custom_derivatives.SymbolicZero):  # differentiated by a metric, which is a constant
        return (None, None), None, None
    return tuple(None if g is None else (g * scale).astype(g.dtype) for g in saved), None, None


sweep.defvjp(_forward, _backward, symbolic_zeros=True)
WANTED = ("hidden", "projection")
"""By what the sum can be differentiated."""
Gradients = dict[str, jax.Array]
"""By some of `WANTED`."""


def _run(
    plan: Plan, student: Head, teacher: Head | None, inputs: Inputs, wanted: tuple[str, ...]
) -> tuple[Sums, Gradients]:
    """(totals, `wanted` gradients in the student's shapes and dtypes), by one device or by every device of a mesh."""
    if plan.layout is None:
        return _run_local(plan, student, teacher, inputs, wanted)
    layout, lead = plan.layout, student[0].ndim - 1
    columns = layout.mesh.shape[layout.columns]
    width = -(-student[1].shape[0] // columns) * columns
    padded = (student[0], _resize(student[1], width))
    teacher = None if teacher is None else (teacher[0], _resize(teacher[1], width))
    weights = PartitionSpec(layout.columns, layout.embed)

    def spec_of(head: Head, name: str) -> tuple[PartitionSpec, PartitionSpec]:
        tokens = layout.tokens(head[0].shape, lead)
        layout.check(head[0].shape, tokens, f"{name} hidden states")
        layout.check(head[1].shape, weights, f"{name} projection")
        return tokens, weights

    student_spec = spec_of(padded, "student")
    run = jax.shard_map(
        functools.partial(_run_local, plan, wanted=wanted),
        mesh=layout.mesh,
        in_specs=(
            student_spec,
            None if teacher is None else spec_of(teacher, "teacher"),
            {name: layout.tokens(x.shape, lead) for name, x in inputs.items()},
        ),
        out_specs=(PartitionSpec(), {n: s for n, s in zip(WANTED, student_spec, strict=True) if n in wanted}),
        check_vma=False,  # what is equal on which devices is made so below, by hand
    )
    sums, found = run(padded, teacher, inputs)
    if "projection" in found:
        found["projection"] = _resize(found["projection"], student[1].shape[0])
    return sums, found


def _resize(projection: jax.Array, rows: int) -> jax.Array:
    """Cuts off padded tokens, or adds some, so that columns of student and teacher lie on the same devices."""
    V = projection.shape[0]
    return projection[:rows] if rows <= V else jnp.pad(projection, ((0, rows - V), (0, 0)))


def _run_local(
    plan: Plan, student: Head, teacher: Head | None, inputs: Inputs, wanted: tuple[str, ...]
) -> tuple[Sums, Gradients]:
    """The sweep over the tokens and columns of one device."""
    layout = plan.layout
    hidden, projection = student
    lead, E = hidden.ndim - 1, hidden.shape[-1]
    tokens = hidden.reshape(-1, hidden.shape[-1])
    weights = _whole_width(projection, plan)
    W = weights.shape[0]
    if layout is None:
        first, columns = jnp.int32(0), 1
    else:
        columns = layout.mesh.shape[layout.columns]
        first = jax.lax.axis_index(layout.columns) * W
    vocabulary = Vocabulary(
        first, plan.vocabulary, W * columns > plan.vocabulary, layout.columns if layout and columns > 1 else None
    )
    if teacher is not None:
        # a teacher with another number of padded columns gets the student's
        teacher = teacher[0].reshape(-1, teacher[0].shape[-1]), _resize(_whole_width(teacher[1], plan), W)
    inputs = {name: x.reshape(-1, *x.shape[lead:]) for name, x in inputs.items()}
    sums, found = _loop(plan, (tokens, weights), teacher, inputs, vocabulary, wanted)

    if layout is not None:
        sums = jax.lax.psum(sums, layout.token_axes(lead))
    if "hidden" in found:
        by_hidden = found["hidden"] if layout is None else jax.lax.psum(found["hidden"], layout.columns)
        found["hidden"] = by_hidden.reshape(*hidden.shape[:-1], E).astype(hidden.dtype)
    if "projection" in found:
        by_weights = found["projection"] if layout is None else _spread(found["projection"], layout, lead)
        found["projection"] = by_weights.astype(projection.dtype)
    return sums, found


def _spread(by_weights: jax.Array, layout: Layout, lead: int) -> jax.Array:
    """The projection's gradient [W, E], summed over the devices' tokens, as the projection itself lies on them."""
    axes = layout.token_axes(lead)
    by_weights = jax.lax.psum(by_weights, tuple(a for a in axes if a not in layout.embed))
    for axis in layout.embed:
        if axis in axes:
            by_weights = jax.lax.psum_scatter(by_weights, axis, scatter_dimension=1, tiled=True)
        else:  # its devices have seen the same tokens
            size = by_weights.shape[1] // layout.mesh.shape[axis]
            by_weights = jax.lax.dynamic_slice_in_dim(by_weights, jax.lax.axis_index(axis) * size, size, 1)
    return by_weights


def _whole_width(projection: jax.Array, plan: Plan) -> jax.Array:
    """This device's columns of the projection at full width E, in the products' dtype: [W, E]."""
    projection = projection.astype(plan.dtype)
    if plan.layout is None:
        return projection
    return jax.lax.all_gather(projection, plan.layout.embed, axis=1, tiled=True)


def default_chunk(columns: int, layout: Layout | None = None) -> int:
    """Tokens whose fp32 logits fill `CHUNK_BYTES`, a power of two.

    Args:
      layout: its mesh says for which backend, which need not be that of this machine.
    """
    backend = jax.default_backend() if layout is None else layout.mesh.devices.flat[0].platform
    tokens = CHUNK_BYTES.get(backend, CHUNK_BYTES["gpu"]) // (4 * columns)
    return 1 << max(tokens.bit_length() - 1, 3)


def _loop(
    plan: Plan,
    student: Head,
    teacher: Head | None,
    inputs: Inputs,
    vocabulary: Vocabulary,
    wanted: tuple[str, ...],
) -> tuple[Sums, Gradients]:
    """Chunk after chunk of the used tokens; gradients [N, E], in the tokens' dtype or fp32, and fp32 [W, E]."""
    tokens, weights = student
    (N, E), W = tokens.shape, weights.shape[0]
    C = min(plan.chunk or default_chunk(W, plan.layout), max(N, 1))
    slots = -(-N // C) * C
    used = inputs["used"]
    order = jnp.nonzero(used, size=slots, fill_value=N)[0]  # positions of the used tokens, then N

    def score(at: jax.Array) -> tuple[jax.Array, jax.Array, Sums, jax.Array]:
        rows = jax.lax.dynamic_slice_in_dim(order, at * C, C)

        def take(x: jax.Array) -> jax.Array:
            return x.at[rows].get(mode="fill", fill_value=0)

        chunk = take(tokens).astype(plan.dtype)
        logits = _logits(chunk, weights, plan.softcap)
        theirs = None
        if teacher is not None:
            theirs = vocabulary.drop_padding(
                _logits(take(teacher[0]).astype(plan.dtype), teacher[1], plan.teacher_softcap), LOWEST
            )
        values, slopes = plan.objective(
            vocabulary.drop_padding(logits, LOWEST), theirs, {n: take(x) for n, x in inputs.items()}, vocabulary
        )
        if wanted and plan.softcap is not None:
            slopes = slopes * (1 - jnp.square(logits / plan.softcap))
        return chunk, rows, values, slopes

    names = jax.eval_shape(score, jnp.int32(0))[2]
    carry: Any = {name: jnp.zeros((), jnp.float32) for name in names}
    if wanted:
        by_weights = jnp.zeros((W, E), jnp.float32) if "projection" in wanted else None
        # every row of the first is written once, so it can be rounded at once, unless devices add theirs; the second is
        # added to
        kept = jnp.float32 if vocabulary.axis else tokens.dtype
        carry = (carry, jnp.zeros((slots, E), kept), by_weights)

    def body(at: jax.Array, carry: Any) -> Any:
        sums = carry[0] if wanted else carry
        chunk, _, values, slopes = score(at)
        sums = {name: total + jnp.sum(values[name]) for name, total in sums.items()}
        if not wanted:
            return sums
        by_chunk, by_weights = gradients(slopes, chunk, weights, carry[2])
        by_chunk = by_chunk.astype(carry[1].dtype)
        return sums, jax.lax.dynamic_update_slice_in_dim(carry[1], by_chunk, at * C, 0), by_weights

    with jax.named_scope(CHUNKS):
        found = jax.lax.fori_loop(0, (jnp.sum(used) + C - 1) // C, body, carry)
    if not wanted:
        return found, {}
    sums, compact, by_weights = found
    # back to where the tokens came from; a gather, as scatters are slow
    place = jnp.clip(jnp.cumsum(used) - 1, 0)
    by_hidden = jnp.where(used[:, None], compact[place], 0)
    return sums, {"hidden": by_hidden} | ({} if by_weights is None else {"projection": by_weights})


def _logits(tokens: jax.Array, weights: jax.Array, cap: float | None) -> jax.Array:
    logits = product(tokens, weights, ((1,), (1,)), weights.dtype)
    return logits if cap is None else cap * jnp.tanh(logits / cap)
