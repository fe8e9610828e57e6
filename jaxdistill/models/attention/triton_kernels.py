"""The bodies of `triton`'s kernels: what one program does with its block of queries or keys.

`bounds_ref` is a line of `tiles.Tiles`. `width` is the head's true size: what an array holds beyond it is not read.

Dimension key: a tile is Q queries by C keys; D head_dim, widened to a power of 2.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxdistill.models.attention.pallas import LOG2E, dot, exp, load, store

MASKED = -1e30
NO_SCORE = -1e29
"""Below every real score and above a masked one: the weight of what is masked is 0 before any score was seen, too."""


class Tile(NamedTuple):
    """How one kernel is cut: Q queries by C keys, warps of 32 threads, and how many loads are under way at a time."""

    Q: int
    C: int
    warps: int
    stages: int


def attention_forward(
    q_ref,
    k_ref,
    v_ref,
    row_ids_ref,
    column_ids_ref,
    bounds_ref,
    out_ref,
    lse_ref,
    *,
    tile,
    window,
    width,
    blocks,
    interpret,
):
    """One block of queries of one head: its output, and the log of its softmax's sums."""
    Q, C = tile.Q, tile.C
    q, row_ids = load(q_ref, width), row_ids_ref[...]
    rows = bounds_ref[4] + (blocks - 1 - pl.program_id(0)) * Q + jnp.arange(Q, dtype=jnp.int32)

    def add(_, j, carry, masked):
        top, total, out = carry
        part = pl.ds(j * C, C)
        scores = dot(q, load(k_ref.at[part], width), 1)
        if masked:
            columns = j * C + jnp.arange(C, dtype=jnp.int32)
            seen = _visible(rows[:, None], columns[None], row_ids[:, None], column_ids_ref[part][None], window)
            scores = jnp.where(seen, scores, MASKED)
        new = jnp.maximum(top, scores.max(axis=1))
        p = exp(scores, (new * LOG2E)[:, None], interpret)
        shrink = jnp.exp2((top - new) * LOG2E)
        v = load(v_ref.at[part], width, _within(part, bounds_ref, masked))
        return new, total * shrink + p.sum(axis=1), out * shrink[:, None] + dot(p.astype(v.dtype), v, 0)

    empty = jnp.full((Q,), NO_SCORE), jnp.zeros((Q,)), jnp.zeros(q.shape, jnp.float32)
    top, total, out = _visit(bounds_ref, add, empty)
    # only padding has no key at all
    total = jnp.where(total > 0, total, 1.0)
    store(out_ref, (out / total[:, None]).astype(out_ref.dtype), width)
    lse_ref[...] = top + jnp.log(total)


def attention_queries(
    q_ref, k_ref, v_ref, g_ref, lse_ref, mean_ref, row_ids_ref, column_ids_ref, bounds_ref, dq_ref,
    *, tile, window, width, blocks, interpret,
):  # fmt: skip
    """One block of queries of one head: the queries' gradient."""
    Q, C = tile.Q, tile.C
    q, g, row_ids = load(q_ref, width), load(g_ref, width), row_ids_ref[...]
    lse, mean = (lse_ref[...] * LOG2E)[:, None], mean_ref[...][:, None]
    rows = bounds_ref[4] + (blocks - 1 - pl.program_id(0)) * Q + jnp.arange(Q, dtype=jnp.int32)

    def add(_, j, dq, masked):
        part = pl.ds(j * C, C)
        k = load(k_ref.at[part], width, _within(part, bounds_ref, masked))
        p = exp(dot(q, k, 1), lse, interpret)
        ds = p * (dot(g, load(v_ref.at[part], width), 1) - mean)
        if masked:
            columns = j * C + jnp.arange(C, dtype=jnp.int32)
            seen = _visible(rows[:, None], columns[None], row_ids[:, None], column_ids_ref[part][None], window)
            ds = jnp.where(seen, ds, 0.0)
        return dq + dot(ds.astype(k.dtype), k, 0)

    store(dq_ref, _visit(bounds_ref, add, jnp.zeros(q.shape, jnp.float32)).astype(dq_ref.dtype), width)


def attention_keys(
    q_ref, k_ref, v_ref, g_ref, lse_ref, mean_ref, row_ids_ref, column_ids_ref, bounds_ref, dk_ref, dv_ref,
    *, tile, window, width, heads, interpret,
):  # fmt: skip
    """One block of keys of one key head: the keys' and values' gradients, summed over its query heads.

    Scores are turned round, [C, Q]: the sums are over queries, and what they multiply stays in registers.
    """
    Q, C = tile.Q, tile.C
    k, v, column_ids = load(k_ref, width), load(v_ref, width), column_ids_ref[...]
    columns = pl.program_id(0) * C + jnp.arange(C, dtype=jnp.int32)
    start = bounds_ref[4]

    def add(head, i, carry, masked):
        dk, dv = carry
        part = pl.ds(i * Q, Q)
        q, g = (load(x.at[part, head], width, _within(part, bounds_ref, masked)) for x in (q_ref, g_ref))
        scores = dot(k, q, 1)
        if masked:
            rows = start + i * Q + jnp.arange(Q, dtype=jnp.int32)
            seen = _visible(rows[None], columns[:, None], row_ids_ref[part][None], column_ids[:, None], window)
            scores = jnp.where(seen, scores, MASKED)
        p = exp(scores, (lse_ref[head, part] * LOG2E)[None], interpret)
        dv = dv + dot(p.astype(g.dtype), g, 0)
        ds = p * (dot(v, g, 1) - mean_ref[head, part][None])
        return dk + dot(ds.astype(q.dtype), q, 0), dv

    zeros = jnp.zeros(k.shape, jnp.float32)
    dk, dv = _visit(bounds_ref, add, (zeros, zeros), repeats=heads)
    # values of padding may be NaN
    store(dk_ref, jnp.where((column_ids != 0)[:, None], dk, 0.0).astype(dk_ref.dtype), width)
    store(dv_ref, dv.astype(dv_ref.dtype), width)


def _visible(rows, columns, row_ids, column_ids, window):
    seen = (row_ids == column_ids) & (rows >= columns)
    return seen if window is None else seen & (columns > rows - window)


def _within(part, bounds_ref, masked):
    """Which tokens of a slice are not behind the row's last segment: what lies there may be NaN, and 0 * NaN is NaN.

    None if all are, as in blocks without a mask.
    """
    return part.start + jnp.arange(part.size, dtype=jnp.int32) < bounds_ref[5] if masked else None


def _visit(bounds_ref: Any, add: Any, carry: Any, repeats: int = 1) -> Any:
    """add(repeat, block, carry, masked) for each block that is to be visited, `repeats` times.

    One loop over the blocks without a mask, and one over those before and behind them: loads run ahead of both. The
    repeats are inside of each, for packed rows have but few blocks, too few to start a loop for.
    """
    first, clear_first, clear_end, end = (bounds_ref[i] for i in range(4))
    clear = clear_end - clear_first
    others = end - first - clear

    def without_mask(step, carry):
        repeat, i = _split(step, clear, repeats)
        return add(repeat, clear_first + i, carry, False)

    def with_mask(step, carry):
        repeat, i = _split(step, others, repeats)
        return add(repeat, first + i + jnp.where(first + i >= clear_first, clear, 0), carry, True)

    carry = jax.lax.fori_loop(0, clear * repeats, without_mask, carry)
    return jax.lax.fori_loop(0, others * repeats, with_mask, carry)


def _split(step: jax.Array, size: jax.Array, repeats: int) -> tuple[jax.Array, jax.Array]:
    # not 0: masked loads in interpret mode want their indices traced
    return (step - step, step) if repeats == 1 else (jax.lax.div(step, size), jax.lax.rem(step, size))
