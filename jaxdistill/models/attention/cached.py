"""Attention of one new token a row to a key-value cache.

Dimension key: B rows, H query heads, K key heads, G = H / K, D head_dim, S slots, R slots of the recent part.

A row's cache has two parts. Slot s < S of the first holds the token at position s, so rows of any length lie beside
each other; it is only read. The tokens since then lie in the recent part, R slots, where all rows write to the same
slot: that is a slice, while a write to a place of its own for every row is a loop over rows on some backends.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxdistill.models.attention.dense import MASKED
from jaxdistill.precision import precision_of

BLOCK = 64
"""Slots whose sum is taken at once; caches of more slots have a multiple of it."""


class KV(NamedTuple):
    """One layer's keys [B, K, D, slots] and values [B, K, slots, D]: both products read them as they lie."""

    keys: jax.Array
    values: jax.Array

    @classmethod
    def of(cls, k_BTKD: jax.Array, v_BTKD: jax.Array, dtype: DTypeLike) -> KV:
        """Keys and values of T tokens, as attention takes them, as T slots."""
        return cls(k_BTKD.astype(dtype).transpose(0, 2, 3, 1), v_BTKD.astype(dtype).transpose(0, 2, 1, 3))

    @classmethod
    def empty(cls, rows: int, heads: int, slots: int, head_dim: int, dtype: DTypeLike) -> KV:
        return cls(jnp.zeros((rows, heads, head_dim, slots), dtype), jnp.zeros((rows, heads, slots, head_dim), dtype))

    @property
    def slots(self) -> int:
        return self.values.shape[2]

    def resized(self, slots: int) -> KV:
        """The same with empty slots appended, or with the last ones cut off."""
        more = (0, max(0, slots - self.slots))
        keys = jnp.pad(self.keys, ((0, 0), (0, 0), (0, 0), more))[..., :slots]
        return KV(keys, jnp.pad(self.values, ((0, 0), (0, 0), more, (0, 0)))[:, :, :slots])

    def written(self, new: KV, at: jax.Array) -> KV:
        """The same with `new` in the slots from `at` on, which is one slot for all rows, or one a row [B]."""
        write = jax.lax.dynamic_update_slice_in_dim
        if at.ndim:
            keys = jax.vmap(lambda old, new, at: write(old, new, at, axis=2))(self.keys, new.keys, at)
            return KV(keys, jax.vmap(lambda old, new, at: write(old, new, at, axis=1))(self.values, new.values, at))
        return KV(write(self.keys, new.keys, at, axis=3), write(self.values, new.values, at, axis=2))


def attend_cached(
    q_BHD: Float[Array, "B H D"],
    cache: KV,
    recent: KV,
    length_B: Int[Array, " B"],
    at: Int[Array, ""],
    *,
    scale: float,
    window: int | None,
    dtype: DTypeLike,
    platform: str,
) -> Float[Array, "B HD"]:
    """Attends to the first `length_B` slots of `cache` and the slots 0..at of `recent`; returns fp32 [B, H * D].

    The query's position is length_B + at. What lies in other slots does not matter, as long as it is finite.

    Args:
      window: the query sees this many tokens, itself among them; None: all.
      dtype: of the matrix products' inputs; scores, softmax and sums are fp32.
      platform: `cpu`, `gpu` or `tpu`, see `attention.platform_of`.
    """
    B, H, D = q_BHD.shape
    K, S, R = cache.keys.shape[1], cache.slots, recent.slots
    q = (q_BHD * scale).reshape(B, K, H // K, D).astype(dtype)
    slot_S, slot_R = jnp.arange(S), jnp.arange(R)
    old_BS = slot_S[None] < length_B[:, None]
    new_R = slot_R <= at
    if window is not None:
        old_BS &= slot_S[None] > (length_B + at - window)[:, None]
        new_R &= slot_R > at - window
    old = jnp.where(old_BS[:, None, None], _scores(q, cache.keys, dtype, platform), MASKED)
    # two products with the same queries, XLA for GPUs would make one of: with both caches' keys copied into one array
    apart = "cpu" if platform == "gpu" else platform
    new = jnp.where(new_R[None, None, None], _scores(q, recent.keys, dtype, apart), MASKED)
    highest = jnp.maximum(old.max(-1, keepdims=True), new.max(-1, keepdims=True))
    old, new = jnp.exp(old - highest), jnp.exp(new - highest)
    total = _total(old) + new.sum(-1, keepdims=True)
    out = _mixed(old / total, cache.values, dtype) + _mixed(new / total, recent.values, dtype)
    return out.reshape(B, H * D)


# A longer cache must not change how sums are rounded. So slots are summed in blocks of one size, whose sums are then
# added in order: more slots add zeros at the end.


def _scores(q_BKGD: jax.Array, k_BKDS: jax.Array, dtype: DTypeLike, platform: str) -> jax.Array:
    k_BKDS = k_BKDS.astype(dtype)
    if platform == "cpu":
        # the same sum over D for every slot, while a matrix product's kernel depends on the number of slots
        return jnp.sum(q_BKGD[..., None].astype(jnp.float32) * k_BKDS[:, :, None].astype(jnp.float32), axis=3)
    precision = precision_of(dtype)
    return jnp.einsum("bkgd,bkds->bkgs", q_BKGD, k_BKDS, precision=precision, preferred_element_type=jnp.float32)


def _blocks(x: jax.Array, axis: int) -> jax.Array:
    """Cuts an axis of slots into (blocks, slots of a block)."""
    size = min(BLOCK, x.shape[axis])
    return x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])


def _total(weights_BKGS: jax.Array) -> jax.Array:
    folded = _blocks(weights_BKGS, 3).sum(3)
    # or XLA would make one sum over all slots of the two
    return jax.lax.optimization_barrier(folded).sum(-1, keepdims=True)


def _mixed(weights_BKGS: jax.Array, v_BKSD: jax.Array, dtype: DTypeLike) -> jax.Array:
    weights, values = _blocks(weights_BKGS.astype(dtype), 3), _blocks(v_BKSD.astype(dtype), 2)
    precision = precision_of(dtype)
    out = jnp.einsum("bkgns,bknsd->bkngd", weights, values, precision=precision, preferred_element_type=jnp.float32)
    return out.sum(2)
