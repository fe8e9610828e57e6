"""Flash attention for GPUs, in Pallas' Triton backend: its work follows the pairs of tokens that see each other.

Three kernels: the forward pass by blocks of queries, and for the backward pass one by blocks of keys, which gives the
gradients of keys and values, and one by blocks of queries. Nothing is added up across programs, so the same inputs give
the same bits; scores are computed again in both (Dao 2023, arXiv:2307.08691, section 3, but for its atomic additions).
Each program visits the blocks that `tiles.make_tiles` found for it, for any number of segments, and masks only where a
block needs it. Key heads are read as they are: the sum over the query heads of one is inside the kernel, for it costs
no registers, where a gradient for each query head would be written and read again.

NEVER EXECUTED ON A GPU so far. Tested are the kernels' steps in interpret mode, and that they compile for an H100 (to
wgmma, cp.async and no spills, with JAX 0.10.2), a B200 and an L4.

Dimension key: B rows, T query tokens, S key tokens, H query heads, K key heads, G = H / K, D head_dim; a tile is Q
queries by C keys.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from jaxdistill.models.attention.pallas import kernel_call
from jaxdistill.models.attention.residuals import STATISTICS, name_residuals
from jaxdistill.models.attention.tiles import BOUNDS, PAD_ROW, make_tiles
from jaxdistill.models.attention.triton_kernels import Tile, attention_forward, attention_keys, attention_queries


class Sizes(NamedTuple):
    """The tiles of the three kernels."""

    forward: Tile
    keys: Tile
    queries: Tile


ROOMY: Mapping[int, Sizes] = {
    64: Sizes(Tile(128, 64, 4, 3), Tile(64, 128, 8, 3), Tile(128, 64, 8, 3)),
    128: Sizes(Tile(128, 64, 8, 3), Tile(64, 128, 8, 3), Tile(128, 64, 8, 3)),
    256: Sizes(Tile(128, 64, 8, 2), Tile(32, 64, 8, 2), Tile(128, 32, 8, 2)),
}
"""By the widest head, for GPUs with 227 KiB of shared memory a block (H100, B200): of tiles that ptxas takes without
spilling registers, large ones, so that keys and values are read less often. For 128 columns they are the defaults of
PyTorch's flex attention on an H100. Bytes of shared memory there: 66,048, 83,456 and 82,432 for 64 columns; 131,584,
165,376 and 164,352 for 128; 196,864, 131,456 and 196,736 for 256. Which are fastest is unmeasured."""
TIGHT: Mapping[int, Sizes] = {
    64: Sizes(Tile(128, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    128: Sizes(Tile(128, 64, 8, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    256: Sizes(Tile(64, 32, 8, 2), Tile(32, 32, 8, 2), Tile(64, 32, 8, 1)),
}
"""For GPUs with 99 KiB (RTX 30 to 50, L4, L40), which is within A100's 163 too. Two kernels spill up to 40 bytes."""


def sizes_of(head_dim: int, roomy: bool) -> Sizes:
    """The kernels' tiles for a head's size, and a GPU with much shared memory or little."""
    table = ROOMY if roomy else TIGHT
    return table[min(width for width in table if head_dim <= width)]


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
    roomy: bool = True,
    interpret: bool = False,
) -> Float[Array, "B T H D"]:
    """Flash attention; scores and sums in fp32, the result rounded once to the inputs' dtype.

    Padding gives zeros and gets zero gradients; behind a row's last segment it may be NaN.

    Args:
      q_BTHD: already scaled; like the keys and values, in the dtype of the matrix products.
      start: the index among the keys of the first query; may be traced.
      sizes: of the kernels' tiles, powers of 2 from 16; `sizes_of(D, roomy)` if absent.
      roomy: the GPU has as much shared memory as an H100.
      interpret: runs the kernels' steps as plain JAX, on any backend, slowly.
    """
    T, S = q_BTHD.shape[1], k_BSKD.shape[1]
    sizes = Sizes(*(_fitted(tile, T, S) for tile in sizes or sizes_of(q_BTHD.shape[3], roomy)))
    ids = segment_ids_BS.astype(jnp.int32)
    row_ids = jax.lax.dynamic_slice_in_dim(ids, start, T, axis=1)
    rows, columns = max(tile.Q for tile in sizes), max(tile.C for tile in sizes)
    row_ids = _pad(jnp.where(row_ids == 0, PAD_ROW, row_ids), rows, fill=PAD_ROW)
    q, k, v, ids = _pad(q_BTHD, rows), *(_pad(x, columns) for x in (k_BSKD, v_BSKD, ids))
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
    ids = row_ids, column_ids
    forward, keys, queries = (make_tiles(*ids, start, setting.window, tile.Q, tile.C) for tile in setting.sizes)
    out, lse = name_residuals(*_call_forward(setting, q, k, v, *ids, forward.of_queries))
    # small, and a dozen launches of kernels to find again
    bounds = checkpoint_name((keys.of_keys, queries.of_queries), STATISTICS)
    return out, (q, k, v, *ids, bounds, out, lse)


def _flash_backward(setting, saved, g):
    q, k, v, row_ids, column_ids, (of_keys, of_queries), out, lse = saved
    # what the softmax's normalisation sends back: Dao et al. 2022, arXiv:2205.14135, appendix B.2
    mean = jnp.sum(g.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    mean = jnp.where((row_ids != PAD_ROW)[..., None], mean, 0.0).swapaxes(1, 2)
    inputs = (q, k, v, g, lse, mean, row_ids, column_ids)
    return _call_queries(setting, *inputs, of_queries), *_call_keys(setting, *inputs, of_keys), None, None, None


_flash.defvjp(_flash_forward, _flash_backward)


class Specs(NamedTuple):
    """What a program sees of each array: its block of queries and all keys, or its block of keys and all queries."""

    queries: pl.BlockSpec
    keys: pl.BlockSpec
    sums: pl.BlockSpec
    row_ids: pl.BlockSpec
    column_ids: pl.BlockSpec
    bounds: pl.BlockSpec


# grids are (blocks, heads, rows): programs that run at the same time share keys and values in the cache. Blocks with
# most to visit, late queries and early keys, come first, so that none of them is left over at the end.


def _specs_by_queries(q: jax.Array, k: jax.Array, Q: int) -> Specs:
    (_, T, H, D), (S, K) = q.shape, k.shape[1:3]
    last, width = T // Q - 1, _width(D)
    return Specs(
        queries=pl.BlockSpec((None, Q, None, width), lambda n, h, b: (b, last - n, h, 0)),
        keys=pl.BlockSpec((None, S, None, width), lambda n, h, b: (b, 0, h // (H // K), 0)),
        sums=pl.BlockSpec((None, None, Q), lambda n, h, b: (b, h, last - n)),
        row_ids=pl.BlockSpec((None, Q), lambda n, h, b: (b, last - n)),
        column_ids=pl.BlockSpec((None, S), lambda n, h, b: (b, 0)),
        bounds=pl.BlockSpec((None, None, BOUNDS), lambda n, h, b: (b, last - n, 0)),
    )


def _specs_by_keys(q: jax.Array, k: jax.Array, C: int) -> Specs:
    (_, T, H, D), (_, K) = q.shape, k.shape[1:3]
    width = _width(D)
    return Specs(
        # all heads that share the key head
        queries=pl.BlockSpec((None, T, H // K, width), lambda m, h, b: (b, 0, h, 0)),
        keys=pl.BlockSpec((None, C, None, width), lambda m, h, b: (b, m, h, 0)),
        sums=pl.BlockSpec((None, H // K, T), lambda m, h, b: (b, h, 0)),
        row_ids=pl.BlockSpec((None, T), lambda m, h, b: (b, 0)),
        column_ids=pl.BlockSpec((None, C), lambda m, h, b: (b, m)),
        bounds=pl.BlockSpec((None, None, BOUNDS), lambda m, h, b: (b, m, 0)),
    )


def _width(head_dim: int) -> int:
    """Arrays in Triton are powers of 2."""
    return max(16, pl.next_power_of_2(head_dim))


def _body(kernel: Callable[..., None], setting: Setting, tile: Tile, D: int, **more: int) -> Callable[..., None]:
    return functools.partial(
        kernel, tile=tile, window=setting.window, width=D, interpret=setting.interpret, **more
    )  # fmt: skip


def _call_forward(setting, q, k, v, row_ids, column_ids, bounds):
    tile, (B, T, H, D) = setting.sizes.forward, q.shape
    at = _specs_by_queries(q, k, tile.Q)
    return kernel_call(
        _body(attention_forward, setting, tile, D, blocks=T // tile.Q),
        (jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, H, T), jnp.float32)),
        grid=(T // tile.Q, H, B),
        in_specs=(at.queries, at.keys, at.keys, at.row_ids, at.column_ids, at.bounds),
        out_specs=(at.queries, at.sums),
        warps=tile.warps, stages=tile.stages, interpret=setting.interpret, name="attention_forward",
    )(q, k, v, row_ids, column_ids, bounds)  # fmt: skip


def _call_queries(setting, q, k, v, g, lse, mean, row_ids, column_ids, bounds):
    tile, (B, T, H, D) = setting.sizes.queries, q.shape
    at = _specs_by_queries(q, k, tile.Q)
    return kernel_call(
        _body(attention_queries, setting, tile, D, blocks=T // tile.Q),
        (jax.ShapeDtypeStruct(q.shape, q.dtype),),
        grid=(T // tile.Q, H, B),
        in_specs=(at.queries, at.keys, at.keys, at.queries, at.sums, at.sums, at.row_ids, at.column_ids, at.bounds),
        out_specs=(at.queries,),
        warps=tile.warps, stages=tile.stages, interpret=setting.interpret, name="attention_queries",
    )(q, k, v, g, lse, mean, row_ids, column_ids, bounds)[0]  # fmt: skip


def _call_keys(setting, q, k, v, g, lse, mean, row_ids, column_ids, bounds):
    tile, (B, S, K, D) = setting.sizes.keys, k.shape
    at = _specs_by_keys(q, k, tile.C)
    return kernel_call(
        _body(attention_keys, setting, tile, D, heads=q.shape[2] // K),
        (jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)),
        grid=(S // tile.C, K, B),
        in_specs=(at.queries, at.keys, at.keys, at.queries, at.sums, at.sums, at.row_ids, at.column_ids, at.bounds),
        out_specs=(at.keys, at.keys),
        warps=tile.warps, stages=tile.stages, interpret=setting.interpret, name="attention_keys",
    )(q, k, v, g, lse, mean, row_ids, column_ids, bounds)  # fmt: skip
