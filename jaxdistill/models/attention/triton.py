"""Our own flash attention for GPUs, in Pallas' Triton backend: its work follows the pairs of tokens that see each other.

Three kernels: the forward pass by blocks of queries, and in the backward pass the keys' and values' gradients by blocks
of keys and the queries' by blocks of queries, so that nothing is added up across programs: the same inputs give the same
bits (Dao 2023, arXiv:2307.08691, sections 3.1 and 3.2; there are no atomics as in section 3.2). Each visits the blocks that
`tiles.make_tiles` found, whatever the number of segments, and masks only where a block needs it.

NEVER EXECUTED ON A GPU so far. Tested are the kernels' steps in interpret mode, and that they compile for an H100.

Dimension key: B rows, T query tokens, S key tokens, H query heads, K key heads, G = H / K, D head_dim; a tile is Q
queries by C keys.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from jaxdistill.models.attention.pallas import dot, kernel_call, load, store
from jaxdistill.models.attention.residuals import name_residuals
from jaxdistill.models.attention.tiles import PAD_ROW, make_tiles

LOG2E = math.log2(math.e)
MASKED = -1e30
NO_SCORE = -1e29
"""Below every real score and above a masked one: the weight of what is masked is 0 before any score was seen, too."""


class Tile(NamedTuple):
    """How one kernel is cut: Q queries by C keys, warps of 32 threads, and loads of keys (or queries) under way."""

    Q: int
    C: int
    warps: int
    stages: int


class Sizes(NamedTuple):
    forward: Tile
    keys: Tile
    queries: Tile


def sizes_of(head_dim: int) -> Sizes:
    if head_dim <= 64:
        return Sizes(Tile(128, 64, 4, 3), Tile(64, 128, 8, 2), Tile(128, 64, 8, 2))
    if head_dim <= 128:
        return Sizes(Tile(128, 64, 4, 2), Tile(64, 128, 8, 2), Tile(128, 64, 8, 2))
    return Sizes(Tile(128, 32, 8, 2), Tile(32, 64, 8, 1), Tile(64, 32, 8, 2))


class Setting(NamedTuple):
    """What the kernels are compiled for."""

    sizes: Sizes
    window: int | None
    interpret: bool


def attend_triton(
    q_BTHD: Float[Array, "B T H D"],
    k_BSKD: Float[Array, "B S K D"],
    v_BSKD: Float[Array, "B S K D"],
    segment_ids_BS: Int[Array, "B S"],
    *,
    window: int | None = None,
    start: int | Int[Array, ""] = 0,
    sizes: Sizes | None = None,
    interpret: bool = False,
) -> Float[Array, "B T H D"]:
    """Flash attention; scores and sums in fp32, the result rounded once to the inputs' dtype. Padding gives zeros.

    Args:
      q_BTHD: already scaled; like the keys and values, in the dtype of the matrix products.
      start: the index among the keys of the first query; may be traced.
      sizes: of the kernels' tiles, powers of 2 from 16; `sizes_of(D)` if absent.
      interpret: runs the kernels' steps as plain JAX, on any backend, slowly.
    """
    T, S = q_BTHD.shape[1], k_BSKD.shape[1]
    sizes = Sizes(*(_fitted(tile, T, S) for tile in sizes or sizes_of(q_BTHD.shape[3])))
    ids = segment_ids_BS.astype(jnp.int32)
    row_ids = jax.lax.dynamic_slice_in_dim(ids, start, T, axis=1)
    # what is padding may be NaN, and 0 * NaN would reach others
    q = jnp.where((row_ids != 0)[:, :, None, None], q_BTHD, 0)
    k, v = (jnp.where((ids != 0)[:, :, None, None], x, 0) for x in (k_BSKD, v_BSKD))
    rows, columns = max(tile.Q for tile in sizes), max(tile.C for tile in sizes)
    q, row_ids = _pad(q, rows), _pad(jnp.where(row_ids == 0, PAD_ROW, row_ids), rows, fill=PAD_ROW)
    k, v, ids = (_pad(x, columns) for x in (k, v, ids))
    setting = Setting(sizes, window, interpret)
    return _flash(setting, q, k, v, row_ids, ids, jnp.asarray(start, jnp.int32))[:, :T]


def _fitted(tile: Tile, T: int, S: int) -> Tile:
    """Short rows take smaller tiles; products of matrices need 16."""
    return tile._replace(**{
        name: max(16, min(size, pl.next_power_of_2(length)))
        for name, size, length in (("Q", tile.Q, T), ("C", tile.C, S))
    })  # fmt: skip


def _pad(x: jax.Array, size: int, fill: int = 0) -> jax.Array:
    """Fills axis 1 up to a multiple of `size`."""
    widths = [(0, -x.shape[1] % size if axis == 1 else 0) for axis in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=fill)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(setting, q, k, v, row_ids, column_ids, start):
    """q [B,T,H,D], k and v [B,S,K,D], padded to whole tiles -> [B,T,H,D] in their dtype."""
    return _flash_forward(setting, q, k, v, row_ids, column_ids, start)[0]


def _flash_forward(setting, q, k, v, row_ids, column_ids, start):
    out, lse = name_residuals(*_call_forward(setting, q, k, v, row_ids, column_ids, start))
    return out, (q, k, v, row_ids, column_ids, start, out, lse)


def _flash_backward(setting, saved, g):
    q, k, v, row_ids, column_ids, start, out, lse = saved
    g = jnp.where((row_ids != PAD_ROW)[:, :, None, None], g, 0)
    # what the softmax's normalisation sends back: Dao et al. 2022, arXiv:2205.14135, appendix B.2
    mean = jnp.sum(g.astype(jnp.float32) * out.astype(jnp.float32), axis=-1).swapaxes(1, 2)
    inputs = (q, k, v, g, lse, mean, row_ids, column_ids, start)
    return _call_queries(setting, *inputs), *_call_keys(setting, *inputs), None, None, None


_flash.defvjp(_flash_forward, _flash_backward)


# grids are (blocks, heads, rows): programs that run at the same time share their keys and values in the cache. Blocks with
# most to visit, late queries and early keys, come first, so that none of them is left over at the end.


def _call_forward(setting, q, k, v, row_ids, column_ids, start):
    sizes, window, interpret = setting
    (B, T, H, D), (S, K), tile = q.shape, k.shape[1:3], sizes.forward
    tiles, blocks, width = make_tiles(row_ids, column_ids, start, window, tile.Q, tile.C), T // tile.Q, _width(D)
    queries = pl.BlockSpec((None, tile.Q, None, width), lambda n, h, b: (b, blocks - 1 - n, h, 0))
    keys = pl.BlockSpec((None, S, None, width), lambda n, h, b: (b, 0, h // (H // K), 0))
    return kernel_call(
        functools.partial(attention_forward, tile=tile, window=window, width=D, blocks=blocks),
        (jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, H, T), jnp.float32)),
        grid=(blocks, H, B),
        in_specs=(
            queries, keys, keys,
            pl.BlockSpec((None, tile.Q), lambda n, h, b: (b, blocks - 1 - n)),
            pl.BlockSpec((None, S), lambda n, h, b: (b, 0)),
            pl.BlockSpec((None, None, 5), lambda n, h, b: (b, blocks - 1 - n, 0)),
        ),
        out_specs=(queries, pl.BlockSpec((None, None, tile.Q), lambda n, h, b: (b, h, blocks - 1 - n))),
        warps=tile.warps, stages=tile.stages, interpret=interpret,
    )(q, k, v, row_ids, column_ids, tiles.of_queries)  # fmt: skip


def _call_queries(setting, q, k, v, g, lse, mean, row_ids, column_ids, start):
    sizes, window, interpret = setting
    (B, T, H, D), (S, K), tile = q.shape, k.shape[1:3], sizes.queries
    tiles, blocks, width = make_tiles(row_ids, column_ids, start, window, tile.Q, tile.C), T // tile.Q, _width(D)
    queries = pl.BlockSpec((None, tile.Q, None, width), lambda n, h, b: (b, blocks - 1 - n, h, 0))
    keys = pl.BlockSpec((None, S, None, width), lambda n, h, b: (b, 0, h // (H // K), 0))
    sums = pl.BlockSpec((None, None, tile.Q), lambda n, h, b: (b, h, blocks - 1 - n))
    return kernel_call(
        functools.partial(attention_queries, tile=tile, window=window, width=D, blocks=blocks),
        (jax.ShapeDtypeStruct(q.shape, q.dtype),),
        grid=(blocks, H, B),
        in_specs=(
            queries, keys, keys, queries, sums, sums,
            pl.BlockSpec((None, tile.Q), lambda n, h, b: (b, blocks - 1 - n)),
            pl.BlockSpec((None, S), lambda n, h, b: (b, 0)),
            pl.BlockSpec((None, None, 5), lambda n, h, b: (b, blocks - 1 - n, 0)),
        ),
        out_specs=(queries,),
        warps=tile.warps, stages=tile.stages, interpret=interpret,
    )(q, k, v, g, lse, mean, row_ids, column_ids, tiles.of_queries)[0]  # fmt: skip


def _call_keys(setting, q, k, v, g, lse, mean, row_ids, column_ids, start):
    sizes, window, interpret = setting
    (B, T, H, D), (S, K), tile = q.shape, k.shape[1:3], sizes.keys
    tiles, width, G = make_tiles(row_ids, column_ids, start, window, tile.Q, tile.C), _width(D), H // K
    queries = pl.BlockSpec((None, T, G, width), lambda m, h, b: (b, 0, h, 0))
    keys = pl.BlockSpec((None, tile.C, None, width), lambda m, h, b: (b, m, h, 0))
    sums = pl.BlockSpec((None, G, T), lambda m, h, b: (b, h, 0))
    return kernel_call(
        functools.partial(attention_keys, tile=tile, window=window, width=D, heads=G),
        (jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)),
        grid=(S // tile.C, K, B),
        in_specs=(
            queries, keys, keys, queries, sums, sums,
            pl.BlockSpec((None, T), lambda m, h, b: (b, 0)),
            pl.BlockSpec((None, tile.C), lambda m, h, b: (b, m)),
            pl.BlockSpec((None, None, 5), lambda m, h, b: (b, m, 0)),
        ),
        out_specs=(keys, keys),
        warps=tile.warps, stages=tile.stages, interpret=interpret,
    )(q, k, v, g, lse, mean, row_ids, column_ids, tiles.of_keys)  # fmt: skip


def _width(head_dim: int) -> int:
    """Arrays in Triton are powers of 2."""
    return max(16, pl.next_power_of_2(head_dim))


def attention_forward(
    q_ref, k_ref, v_ref, row_ids_ref, column_ids_ref, bounds_ref, out_ref, lse_ref, *, tile, window, width, blocks
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
        p = jnp.exp2(scores * LOG2E - (new * LOG2E)[:, None])
        shrink = jnp.exp2((top - new) * LOG2E)
        v = load(v_ref.at[part], width)
        return new, total * shrink + p.sum(axis=1), out * shrink[:, None] + dot(p.astype(v.dtype), v, 0)

    empty = jnp.full((Q,), NO_SCORE), jnp.zeros((Q,)), jnp.zeros(q.shape, jnp.float32)
    top, total, out = _visit(bounds_ref, add, empty)
    # only padding has no key at all
    total = jnp.where(total > 0, total, 1.0)
    store(out_ref, (out / total[:, None]).astype(out_ref.dtype), width)
    lse_ref[...] = top + jnp.log(total)


def attention_queries(
    q_ref, k_ref, v_ref, g_ref, lse_ref, mean_ref, row_ids_ref, column_ids_ref, bounds_ref, dq_ref,
    *, tile, window, width, blocks,
):  # fmt: skip
    """One block of queries of one head: the queries' gradient."""
    Q, C = tile.Q, tile.C
    q, g, row_ids = load(q_ref, width), load(g_ref, width), row_ids_ref[...]
    lse, mean = (lse_ref[...] * LOG2E)[:, None], mean_ref[...][:, None]
    rows = bounds_ref[4] + (blocks - 1 - pl.program_id(0)) * Q + jnp.arange(Q, dtype=jnp.int32)

    def add(_, j, dq, masked):
        part = pl.ds(j * C, C)
        k = load(k_ref.at[part], width)
        scores = dot(q, k, 1)
        if masked:
            columns = j * C + jnp.arange(C, dtype=jnp.int32)
            seen = _visible(rows[:, None], columns[None], row_ids[:, None], column_ids_ref[part][None], window)
            scores = jnp.where(seen, scores, MASKED)
        p = jnp.exp2(scores * LOG2E - lse)
        ds = p * (dot(g, load(v_ref.at[part], width), 1) - mean)
        return dq + dot(ds.astype(k.dtype), k, 0)

    store(dq_ref, _visit(bounds_ref, add, jnp.zeros(q.shape, jnp.float32)).astype(dq_ref.dtype), width)


def attention_keys(
    q_ref, k_ref, v_ref, g_ref, lse_ref, mean_ref, row_ids_ref, column_ids_ref, bounds_ref, dk_ref, dv_ref,
    *, tile, window, width, heads,
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
        q, g = load(q_ref.at[part, head], width), load(g_ref.at[part, head], width)
        scores = dot(k, q, 1)
        if masked:
            rows = start + i * Q + jnp.arange(Q, dtype=jnp.int32)
            seen = _visible(rows[None], columns[:, None], row_ids_ref[part][None], column_ids[:, None], window)
            scores = jnp.where(seen, scores, MASKED)
        p = jnp.exp2(scores * LOG2E - (lse_ref[head, part] * LOG2E)[None])
        dv = dv + dot(p.astype(g.dtype), g, 0)
        ds = p * (dot(v, g, 1) - mean_ref[head, part][None])
        return dk + dot(ds.astype(q.dtype), q, 0), dv

    zeros = jnp.zeros(k.shape, jnp.float32)
    dk, dv = _visit(bounds_ref, add, (zeros, zeros), repeats=heads)
    store(dk_ref, dk.astype(dk_ref.dtype), width)
    store(dv_ref, dv.astype(dv_ref.dtype), width)


def _visible(rows, columns, row_ids, column_ids, window):
    seen = (row_ids == column_ids) & (rows >= columns)
    return seen if window is None else seen & (columns > rows - window)


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


def _split(step: jax.Array, size: jax.Array, repeats: int) -> tuple[Any, jax.Array]:
    return (0, step) if repeats == 1 else (jax.lax.div(step, size), jax.lax.rem(step, size))
