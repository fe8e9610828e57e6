"""Attention with its scores written out: the fastest for small models and short rows, and the easiest to read.

Dimension key: B rows, T query tokens, S key tokens, H query heads, K key heads, G = H / K, D head_dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# below every score, yet finite: a row without any key to attend to gives a number, not NaN
MASKED = -1e30
# queries are taken in this many causal blocks, so that keys of the future cost nothing
QUERY_BLOCKS = 4


def visible(
    rows: jax.Array, columns: jax.Array, row_ids: jax.Array, column_ids: jax.Array, window: int | None
) -> jax.Array:
    """Which keys each query sees, bool [..., T, S], by their indices [T], [S] and segment ids [..., T], [..., S].

    A query sees the keys of its own segment up to itself, and no more than `window` of them.
    """
    near = rows[:, None] >= columns[None, :]
    if window is not None:
        near &= columns[None, :] > rows[:, None] - window
    same = row_ids[..., :, None] == column_ids[..., None, :]
    return same & near.reshape((1,) * (same.ndim - 2) + near.shape)


def attend_dense(
    q_BTHD: Float[Array, "B T H D"],
    k_BSKD: Float[Array, "B S K D"],
    v_BSKD: Float[Array, "B S K D"],
    segment_ids_BS: Int[Array, "B S"],
    *,
    window: int | None = None,
    start: int | Int[Array, ""] = 0,
) -> Float[Array, "B T H D"]:
    """Attention through fp32 scores [B, H, T, S].

    Args:
      q_BTHD: already scaled; like the keys and values, in the dtype of the matrix products.
      start: the index among the keys of the first query; may be traced.
    """
    T, S = q_BTHD.shape[1], k_BSKD.shape[1]
    if T != S:
        row_ids = jax.lax.dynamic_slice_in_dim(segment_ids_BS, start, T, axis=1)
        mask = visible(start + jnp.arange(T), jnp.arange(S), row_ids, segment_ids_BS, window)
        return _attend(q_BTHD, k_BSKD, v_BSKD, mask)
    blocks = QUERY_BLOCKS if T % QUERY_BLOCKS == 0 and T >= 64 else 1
    size = T // blocks
    outputs = []
    for i in range(blocks):
        first, end = i * size, (i + 1) * size
        # the oldest key that the block's first query sees
        oldest = 0 if window is None else max(0, first - window + 1)
        mask = visible(
            jnp.arange(first, end), jnp.arange(oldest, end),
            segment_ids_BS[:, first:end], segment_ids_BS[:, oldest:end], window,
        )  # fmt: skip
        outputs.append(_attend(q_BTHD[:, first:end], k_BSKD[:, oldest:end], v_BSKD[:, oldest:end], mask))
    return jnp.concatenate(outputs, axis=1)


def _attend(q_BTHD, k_BSKD, v_BSKD, mask_BTS):
    B, T, H, D = q_BTHD.shape
    K = k_BSKD.shape[2]
    q = q_BTHD.reshape(B, T, K, H // K, D).transpose(0, 2, 3, 1, 4)
    out = _weigh(q, k_BSKD.transpose(0, 2, 1, 3), v_BSKD.transpose(0, 2, 1, 3), mask_BTS[:, None, None])
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, H, D)


@jax.custom_vjp
def _weigh(q, k, v, mask):
    """q [B,K,G,T,D], k and v [B,K,S,D], mask [B,1,1,T,S] -> fp32 [B,K,G,T,D]."""
    return _weigh_forward(q, k, v, mask)[0]


def _weigh_forward(q, k, v, mask):
    weights = jax.nn.softmax(jnp.where(mask, _einsum("bkgtd,bksd->bkgts", q, k), MASKED), axis=-1)
    out = _einsum("bkgts,bksd->bkgtd", weights.astype(v.dtype), v)
    return out, (q, k, v, weights, out)


def _weigh_backward(saved, g):
    """As `blocks` has it, but for the sums over queries. They are products of fp32 numbers, for XLA's on CPUs know bf16
    only along rows, and come out transposed, [D, S]: for [S, D], what is many times as large would be transposed.
    """
    q, k, v, weights, out = saved
    mean = jnp.sum(g * out, axis=-1, keepdims=True)
    dv = _einsum("bkgtd,bkgts->bkds", g, weights).swapaxes(-1, -2)
    # weights of what is masked are zero, and so are the gradients of their scores
    ds = weights * (_einsum("bkgtd,bksd->bkgts", g.astype(v.dtype), v) - mean)
    dk = _einsum("bkgtd,bkgts->bkds", q.astype(jnp.float32), ds).swapaxes(-1, -2)
    dq = _einsum("bkgts,bksd->bkgtd", ds.astype(k.dtype), k)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_weigh.defvjp(_weigh_forward, _weigh_backward)


def _einsum(pattern: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(pattern, a, b, preferred_element_type=jnp.float32)
