"""Flash attention in plain JAX: memory grows with T, never with T², on every backend and for every size.

Scores exist for one block of queries and one block of keys at a time; the softmax is carried from one key block to the
next, and the backward pass computes the scores again (Dao et al. 2022, arXiv:2205.14135, algorithms 1 and 4).
Rows of the batch are taken one by one, so that each skips the key blocks that it does not need.

Dimension key: B rows, N query blocks of Q tokens, M key blocks of C tokens, K key heads, G query heads a key head,
D head_dim.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxdistill.models.attention.dense import MASKED, visible
from jaxdistill.models.attention.residuals import name_residuals
from jaxdistill.precision import precision_of

BLOCK = 512
"""Tokens a block: large enough to keep a GPU's matrix units busy, small enough that packed rows have blocks to skip."""
KEY_BLOCKS = "key_blocks"
"""Scope of the loops over key blocks, whose length depends on the segments: `plan` and profiles go by it."""


class Plan(NamedTuple):
    """What does not depend on queries, keys or values."""

    rows: jax.Array
    """int32 [N, Q]: each query's index among the keys."""
    columns: jax.Array
    """int32 [M, C]."""
    row_ids: jax.Array
    """int32 [B, N, Q]: the segment of each query."""
    column_ids: jax.Array
    """int32 [B, M, C]."""
    first: jax.Array
    """int32 [B, N]: the first key block that a query block needs."""
    end: jax.Array
    """int32 [B, N]: one more than the last."""


def attend_blocks(
    q_BTHD: Float[Array, "B T H D"],
    k_BSKD: Float[Array, "B S K D"],
    v_BSKD: Float[Array, "B S K D"],
    segment_ids_BS: Int[Array, "B S"],
    *,
    window: int | None = None,
    start: int | Int[Array, ""] = 0,
    block: int | None = None,
) -> Float[Array, "B T H D"]:
    """Attention block by block; skips key blocks of the future, beyond the window, or of other segments alone.

    Args:
      q_BTHD: already scaled; like the keys and values, in the dtype of the matrix products.
      start: the index among the keys of the first query; may be traced.
      block: tokens a block, `BLOCK` if absent; any T and S will do, the last block is padded.
    """
    B, T, H, D = q_BTHD.shape
    S, K = k_BSKD.shape[1:3]
    Q, C = min(block or BLOCK, T), min(block or BLOCK, S)
    plan = make_plan(segment_ids_BS, T, start, window, Q, C)
    q = _pad(q_BTHD, Q).reshape(B, -1, Q, K, H // K, D).transpose(0, 1, 3, 4, 2, 5)
    k, v = (_pad(x, C).reshape(B, -1, C, K, D).transpose(0, 1, 3, 2, 4) for x in (k_BSKD, v_BSKD))
    out = _flash(q, k, v, plan, window)
    return out.transpose(0, 1, 4, 2, 3, 5).reshape(B, -1, H, D)[:, :T]


def make_plan(segment_ids_BS: jax.Array, T: int, start: int | jax.Array, window: int | None, Q: int, C: int) -> Plan:
    """Cuts T queries, the first of them at key `start`, and S keys into blocks, and finds which meet.

    Segments whose numbers rise along the row, as packing writes them, are skipped exactly; other numberings are
    still right, and skip less.
    """
    S = segment_ids_BS.shape[1]
    # padding comes after the segments: a number above all keeps the ids rising
    ids = jnp.where(segment_ids_BS == 0, jnp.iinfo(jnp.int32).max, segment_ids_BS.astype(jnp.int32))
    row_ids = jax.lax.dynamic_slice_in_dim(ids, start, T, axis=1)
    # what fills the last block lies behind every real token, so none sees it
    row_ids, column_ids = (
        _pad(x, size, fill=jnp.iinfo(jnp.int32).max).reshape(x.shape[0], -1, size)
        for x, size in ((row_ids, Q), (ids, C))
    )
    N, M = row_ids.shape[1], column_ids.shape[1]
    rows = start + jnp.arange(N * Q, dtype=jnp.int32).reshape(N, Q)
    columns = jnp.arange(M * C, dtype=jnp.int32).reshape(M, C)
    meet = columns[None, :, 0] <= jnp.minimum(rows[:, None, -1], S - 1)
    if window is not None:
        meet &= columns[None, :, -1] > rows[:, None, 0] - window
    low, high = row_ids.min(axis=-1)[:, :, None], row_ids.max(axis=-1)[:, :, None]
    meet = meet[None] & (column_ids.max(axis=-1)[:, None] >= low) & (column_ids.min(axis=-1)[:, None] <= high)
    first = jnp.argmax(meet, axis=-1).astype(jnp.int32)
    end = M - jnp.argmax(meet[..., ::-1], axis=-1).astype(jnp.int32)
    return Plan(rows, columns, row_ids, column_ids, first, jnp.where(meet.any(axis=-1), end, first))


def _pad(x: jax.Array, size: int, fill: int = 0) -> jax.Array:
    """Fills axis 1 up to a multiple of `size`."""
    widths = [(0, -x.shape[1] % size if axis == 1 else 0) for axis in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=fill)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _flash(q, k, v, plan, window):
    """q [B,N,K,G,Q,D], k and v [B,M,K,C,D] -> fp32 [B,N,K,G,Q,D]."""
    return _flash_forward(q, k, v, plan, window)[0]


def _flash_forward(q, k, v, plan, window):
    def one_row(row):
        q, k, v, row_ids, column_ids, first, end = row

        def one_block(_, x):
            q, rows, row_ids, first, end = x

            def add(j, carry):
                top, total, out = carry
                scores, mask = _scores(q, k[j], rows, plan.columns[j], row_ids, column_ids[j], window)
                new = jnp.maximum(top, scores.max(axis=-1))
                # masked scores equal `new` where a query has met no key yet
                p = jnp.where(mask[None, None], jnp.exp(scores - new[..., None]), 0.0)
                shrink = jnp.exp(top - new)
                out = out * shrink[..., None] + _einsum("kgqc,kcd->kgqd", p.astype(v.dtype), v[j])
                return new, total * shrink + p.sum(axis=-1), out

            like = q[..., 0].astype(jnp.float32)
            empty = jnp.full_like(like, MASKED), jnp.zeros_like(like), jnp.zeros_like(q, dtype=jnp.float32)
            with jax.named_scope(KEY_BLOCKS):
                top, total, out = jax.lax.fori_loop(first, end, add, empty)
            # only what fills the last block has no key at all
            total = jnp.where(total > 0, total, 1.0)
            return None, (out / total[..., None], top + jnp.log(total))

        return jax.lax.scan(one_block, None, (q, plan.rows, row_ids, first, end))[1]

    out, logsumexp = name_residuals(*jax.lax.map(one_row, (q, k, v, *plan[2:])))
    return out, (q, k, v, plan, out, logsumexp)


def _flash_backward(window, saved, g):
    q, k, v, plan, out, logsumexp = saved
    # what the softmax's normalisation sends back: Dao et al. 2022, appendix B.2
    mean = jnp.sum(g * out, axis=-1)

    def one_row(row):
        q, k, v, g, logsumexp, mean, row_ids, column_ids, first, end = row

        def one_block(carry, x):
            q, g, logsumexp, mean, rows, row_ids, first, end = x

            def add(j, carry):
                dq, dk, dv = carry
                scores, mask = _scores(q, k[j], rows, plan.columns[j], row_ids, column_ids[j], window)
                p = jnp.where(mask[None, None], jnp.exp(scores - logsumexp[..., None]), 0.0)
                dv = _add_at(dv, j, _einsum("kgqc,kgqd->kcd", p.astype(v.dtype), g))
                ds = (p * (_einsum("kgqd,kcd->kgqc", g, v[j]) - mean[..., None])).astype(q.dtype)
                dk = _add_at(dk, j, _einsum("kgqc,kgqd->kcd", ds, q))
                return dq + _einsum("kgqc,kcd->kgqd", ds, k[j]), dk, dv

            with jax.named_scope(KEY_BLOCKS):
                dq, dk, dv = jax.lax.fori_loop(first, end, add, (jnp.zeros_like(q, dtype=jnp.float32), *carry))
            return (dk, dv), dq

        zeros = jnp.zeros_like(k, dtype=jnp.float32), jnp.zeros_like(v, dtype=jnp.float32)
        (dk, dv), dq = jax.lax.scan(
            one_block, zeros, (q, g.astype(v.dtype), logsumexp, mean, plan.rows, row_ids, first, end)
        )
        return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)

    return *jax.lax.map(one_row, (q, k, v, g, logsumexp, mean, *plan[2:])), None


_flash.defvjp(_flash_forward, _flash_backward)


def _scores(q, k, rows, columns, row_ids, column_ids, window):
    """fp32 scores [K, G, Q, C] of one block with one block, and the mask [Q, C] that they went through."""
    mask = visible(rows, columns, row_ids, column_ids, window)
    return jnp.where(mask[None, None], _einsum("kgqd,kcd->kgqc", q, k), MASKED), mask


def _add_at(total: jax.Array, j: jax.Array, x: jax.Array) -> jax.Array:
    """total[j] += x, as a slice: XLA updates it in place, where a scatter may copy."""
    return jax.lax.dynamic_update_index_in_dim(total, total[j] + x, j, axis=0)


def _einsum(pattern: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(pattern, a, b, precision=precision_of(a.dtype, b.dtype), preferred_element_type=jnp.float32)
