"""Which blocks of queries and keys see each other, and which of them need no mask.

A kernel visits, for each block of queries, the key blocks from `first` to `end`; those from `clear_first` to
`clear_end`, a range inside of it, lie in one segment, wholly before the queries and inside the window: they need no
mask. The same, turned round, tells each block of keys its queries.

Dimension key: B rows, N query blocks of Q tokens, M key blocks of C tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

PAD_ROW = jnp.iinfo(jnp.int32).min
"""The segment of queries that are padding. That of such keys is 0: they never meet."""


BOUNDS = 6


class Tiles(NamedTuple):
    """int32 [B, blocks, BOUNDS]: first, clear_first, clear_end, end (excluded, and equal to first where there is none),
    the index among the keys of the first query of all, and how many of the row's keys (or queries, for blocks of keys)
    come before those that are padding to its end.
    """

    of_queries: Int[Array, "B N 6"]
    of_keys: Int[Array, "B M 6"]


def make_tiles(
    row_ids_BT: Int[Array, "B T"],
    column_ids_BS: Int[Array, "B S"],
    start: int | Int[Array, ""],
    window: int | None,
    Q: int,
    C: int,
) -> Tiles:
    """Cuts queries, the first of them at key `start`, and keys into blocks, and finds which meet.

    Ids that rise along the row, as packing writes them, are skipped exactly; other numberings are still right, and
    skip less.

    Args:
      row_ids_BT: segments of the queries, `PAD_ROW` for padding; T is a multiple of Q.
      column_ids_BS: segments of the keys, 0 for padding; S is a multiple of C.
    """
    B, T = row_ids_BT.shape
    S = column_ids_BS.shape[1]
    row_low, row_high, row_one = _ranges(row_ids_BT.reshape(B, T // Q, Q), PAD_ROW)
    low, high, one = _ranges(column_ids_BS.reshape(B, S // C, C), 0)
    first_row = start + Q * jnp.arange(T // Q, dtype=jnp.int32)[:, None]
    first_column = C * jnp.arange(S // C, dtype=jnp.int32)[None, :]
    reached = first_column <= first_row + Q - 1
    before = first_column + C - 1 <= first_row
    if window is not None:
        reached &= first_column + C - 1 > first_row - window
        before &= first_column > first_row + Q - 1 - window
    overlap = (high[:, None] >= row_low[..., None]) & (low[:, None] <= row_high[..., None])
    same = row_one[..., None] & one[:, None] & (low[:, None] == row_low[..., None])
    meet, clear = overlap & reached[None], same & before[None]
    queries, keys = _length(row_ids_BT, PAD_ROW), _length(column_ids_BS, 0)
    return Tiles(_bounds(meet, clear, start, keys), _bounds(meet.swapaxes(1, 2), clear.swapaxes(1, 2), start, queries))


def _length(ids: jax.Array, padding: int) -> jax.Array:
    """[B]: one more than the last token that is no padding."""
    return jnp.where(ids != padding, jnp.arange(1, ids.shape[1] + 1, dtype=jnp.int32)[None], 0).max(axis=1)


def _ranges(ids: jax.Array, padding: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The least and the greatest segment of each block, and if it is one segment from end to end."""
    most, least = jnp.iinfo(jnp.int32).max, jnp.iinfo(jnp.int32).min
    real = ids != padding
    low = jnp.where(real, ids, most).min(axis=-1)
    high = jnp.where(real, ids, least).max(axis=-1)
    return low, high, real.all(axis=-1) & (low == high)


def _bounds(
    meet: Bool[Array, "B N M"], clear: Bool[Array, "B N M"], start: int | jax.Array, length: Int[Array, " B"]
) -> Int[Array, "B N 6"]:
    """Blocks that `meet` from the first to the last; of those that are `clear`, the last run without a gap."""
    size = meet.shape[-1]
    index = jnp.arange(size, dtype=jnp.int32)[None, None]
    end = jnp.where(meet, index + 1, 0).max(axis=-1)
    first = jnp.minimum(jnp.where(meet, index, size).min(axis=-1), end)
    clear_end = jnp.where(clear, index + 1, 0).max(axis=-1)
    unclear = ~clear & (index < clear_end[..., None])
    clear_first = jnp.where(unclear, index + 1, 0).max(axis=-1)
    length = jnp.broadcast_to(length[:, None], first.shape)
    return jnp.stack([first, clear_first, clear_end, end, jnp.full_like(first, start), length], axis=-1)
