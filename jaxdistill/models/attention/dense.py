"""Attention with its scores written out: the fastest for small models and short rows, and the easiest to read.

Dimension key: B rows, T query tokens, S key tokens, H query heads, K key heads, G = H / K, D head_dim.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxdistill.layouts import rows_first
from jaxdistill.models.attention.residuals import ATTENDED
from jaxdistill.precision import precision_of

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
    B, T, H, D = q_BTHD.shape
    S, K = k_BSKD.shape[1:3]
    if T != S:
        spans = (Span(0, T, 0, S),)
        row_ids = jax.lax.dynamic_slice_in_dim(segment_ids_BS, start, T, axis=1)
        masks = (visible(start + jnp.arange(T), jnp.arange(S), row_ids, segment_ids_BS, window),)
    else:
        spans = spans_of(T, window)
        masks = tuple(
            visible(
                jnp.arange(s.first, s.end), jnp.arange(s.oldest, s.newest),
                segment_ids_BS[:, s.first : s.end], segment_ids_BS[:, s.oldest : s.newest], window,
            ) for s in spans
        )  # fmt: skip
    q = q_BTHD.reshape(B, T, K, H // K, D).transpose(0, 2, 3, 1, 4)
    out = _attend(spans, q, k_BSKD.transpose(0, 2, 1, 3), v_BSKD.transpose(0, 2, 1, 3), masks)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, H, D)


class Span(NamedTuple):
    """Queries `first` to `end`, and the keys `oldest` to `newest` that any of them may see; ends are excluded."""

    first: int
    end: int
    oldest: int
    newest: int


def spans_of(T: int, window: int | None) -> tuple[Span, ...]:
    """T queries of the same T keys in causal blocks."""
    blocks = QUERY_BLOCKS if T % QUERY_BLOCKS == 0 and T >= 64 else 1
    size = T // blocks
    return tuple(
        Span(first, first + size, 0 if window is None else max(0, first - window + 1), first + size)
        for first in range(0, T, size)
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(spans, q, k, v, masks):
    """q [B,K,G,T,D], k and v [B,K,S,D], a mask [B,t,s] for each span -> fp32 [B,K,G,T,D]."""
    return _attend_forward(spans, q, k, v, masks)[0]


def _attend_forward(spans, q, k, v, masks):
    B, K, G, _, D = q.shape
    q, k, v = (_written(x) for x in (q, k, v))
    outputs, saved = [], []
    for span, mask in zip(spans, masks, strict=True):
        keys = slice(span.oldest, span.newest)
        t, s = mask.shape[1:]
        scores = _product(_queries(q, span), k[:, :, keys], 3).reshape(B, K, G, t, s)
        # added, not chosen: XLA has the sum in one pass with the softmax. -1e30 plus any score is -1e30
        scores = scores + jnp.where(mask, 0.0, MASKED)[:, None, None]
        # what the weights add up to divides their values, which are fewer: no other pass over the scores
        weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
        total = jnp.sum(weights, axis=-1).reshape(B, K, G * t, 1)
        weights = _written(weights.astype(v.dtype).reshape(B, K, G * t, s))
        outputs.append((_product(weights, v[:, :, keys], 2) / total).reshape(B, K, G, t, D))
        saved.append((weights, total))
    # the weights have no name: there are T x T of them, and a pass over the scores gives them again
    out = checkpoint_name(jnp.concatenate(outputs, axis=3), ATTENDED)
    return out, (q, k, v, out, saved)


def _attend_backward(spans, residuals, g):
    """As `blocks` has it, from weights that were kept. They and the gradients of the scores are large, and products
    over queries would read them across: `_across` has the small side transposed.
    """
    q, k, v, out, saved = residuals
    B, K, G, _, D = q.shape
    mean = jnp.sum(g * out, axis=-1, keepdims=True)
    dq, dk, dv = [], [], []
    for span, (weights, total) in zip(spans, saved, strict=True):
        keys = slice(span.oldest, span.newest)
        queries = _queries(q, span)
        by_out = _written((_queries(g, span) / total).astype(v.dtype))
        # weights of what is masked are zero, and so are the gradients of their scores
        by_scores = weights * (_product(by_out, v[:, :, keys], 3) - _queries(mean, span) / total)
        by_scores = _written(by_scores.astype(k.dtype))
        dq.append(_product(by_scores, k[:, :, keys], 2).reshape(B, K, G, -1, D))
        dk.append(_across(queries, by_scores))
        dv.append(_across(by_out, weights))
    dq = jnp.concatenate(dq, axis=3).astype(q.dtype)
    return dq, _add_up(spans, dk, k), _add_up(spans, dv, v), None


_attend.defvjp(_attend_forward, _attend_backward)


def _queries(x: jax.Array, span: Span) -> jax.Array:
    """[B, K, G, T, D] -> [B, K, G * t, D]: a span's queries of all heads that share a key head are one matrix."""
    x = x[:, :, :, span.first : span.end]
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _product(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    """a [B, K, n, m] with axis `axis` of b, fp32."""
    sides, precision = (((3,), (axis,)), ((0, 1), (0, 1))), precision_of(a.dtype, b.dtype)
    found = jax.lax.dot_general(a, b, sides, precision=precision, preferred_element_type=jnp.float32)
    return _written(found, a.dtype)


def _across(small: jax.Array, large: jax.Array) -> jax.Array:
    """small [B, K, n, D] and large [B, K, n, s], summed over n: fp32 [B, K, D, s]."""
    return _product(_written(small.swapaxes(2, 3)), large, 2)


def _add_up(spans: Sequence[Span], parts: Sequence[jax.Array], like: jax.Array) -> jax.Array:
    """The sum [B, K, S, D] of the spans' parts [B, K, D, s], in `like`'s shape and dtype."""
    cuts = sorted({0, like.shape[2], *(at for span in spans for at in (span.oldest, span.newest))})
    pieces = []
    for first, end in itertools.pairwise(cuts):
        mine = [
            part[..., first - span.oldest : end - span.oldest]
            for span, part in zip(spans, parts, strict=True)
            if span.oldest <= first and end <= span.newest
        ]
        pieces.append(functools.reduce(jnp.add, mine).swapaxes(2, 3))
    return jnp.concatenate(pieces, axis=2).astype(like.dtype)


def _written(x: jax.Array, dtype: DTypeLike | None = None) -> jax.Array:
    """Keeps XLA for CPUs from computing bf16 products in fp32: it does so where it folds a transpose into one, and
    these are then also copied to fp32 (2 rows of 512 tokens, 6 heads, forward and back, with AMX: 51 -> 31 ms of
    processor time). A layout is not partitioned, though: several devices do without.

    Args:
      dtype: of the product's inputs, if x is not one of them but the product.
    """
    return rows_first(x) if (dtype or x.dtype) == jnp.bfloat16 and jax.device_count() == 1 else x
