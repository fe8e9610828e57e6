"""Attention of one new token a row, which is written to the cache on the way: one kernel (Pallas, GPUs).

Dimension key: B rows, H query heads, K key heads, G = H / K, D head_dim, S slots.

Slot s of a row's cache holds the token at position s. A program owns a row and a key head: it norms and rotates the
queries and the key, walks along the row's own slots in blocks of one size, and writes the new key and value. So a
row's numbers depend on nothing but the row: not on other rows, nor on how long the cache is, which is not read beyond
the row's end.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from jaxdistill.models.attention.cached import KV
from jaxdistill.models.attention.dense import MASKED
from jaxdistill.models.attention.pallas import kernel_call

BLOCK = 64
"""Slots whose scores are taken at once."""


def append_and_attend(
    qkv_BKGD: Float[Array, "B K G2 D"],
    cache: KV,
    position_B: Int[Array, " B"],
    *,
    scale: float,
    window: int | None,
    norms: tuple[Float[Array, " D"], Float[Array, " D"], float] | None,
    rope: tuple[Float[Array, "B D2"], Float[Array, "B D2"]] | None,
    roomy: bool = True,
    interpret: bool = False,
) -> tuple[Float[Array, "B HD"], KV]:
    """Attends to the slots before `position_B` and to the new token; writes its key and value to that very slot.

    A position beyond the cache is not written, and sees the whole cache.

    Args:
      qkv_BKGD: for each key head its G queries, its key and its value, G + 2 in all; before norms and rotation.
      window: the query sees this many tokens, itself among them; None: all.
      norms: the queries' and keys' scales, as they multiply, and eps; None: no norms.
      rope: cos and sin for `position_B`; None: no rotation.
      roomy: see `pallas.is_roomy`.
      interpret: runs it without a GPU, slowly.
    Returns:
      (in qkv's dtype [B, H * D], the cache with the token).
    """
    B, K, heads, D = qkv_BKGD.shape
    named = {"qkv": qkv_BKGD, "position": position_B}
    if norms is not None:
        named |= {"q_scale": norms[0], "k_scale": norms[1]}
    if rope is not None:
        named |= {"cos": rope[0], "sin": rope[1]}
    kernel = functools.partial(
        _kernel, names=(*named, "old_keys", "old_values", "out", "keys", "values"), scale=scale, window=window,
        eps=0.0 if norms is None else norms[2],
    )  # fmt: skip
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in cache]
    call = kernel_call(
        kernel,
        [jax.ShapeDtypeStruct((B, K, heads - 2, D), qkv_BKGD.dtype), *shapes],
        grid=(B, K),
        warps=4,
        # a block of keys and values is as large as a third of a small GPU's shared memory from 256 columns on
        stages=3 if roomy or D < 256 else 2,
        interpret=interpret,
        name="append_and_attend",
        aliases={len(named): 1, len(named) + 1: 2},
    )
    out, keys, values = call(*named.values(), *cache)
    return out.reshape(B, K * (heads - 2) * D), KV(keys, values)


def _kernel(*refs, names: tuple[str, ...], scale: float, window: int | None, eps: float) -> None:
    at = dict(zip(names, refs, strict=True))
    b, k = pl.program_id(0), pl.program_id(1)
    _, _, heads, D = at["qkv"].shape
    G, S, dtype = heads - 2, at["keys"].shape[3], at["keys"].dtype
    position = at["position"][b]
    # a matrix product has 16 rows at least; those beyond the group's repeat its last
    P = max(16, pl.next_power_of_2(G))
    queries = jnp.minimum(jnp.arange(P), G - 1)
    halves = pl.ds(0, D // 2), pl.ds(D // 2, D // 2)

    q = [at["qkv"][b, k, queries, half].astype(jnp.float32) for half in halves]
    key = [at["qkv"][b, k, G, half].astype(jnp.float32) for half in halves]
    value = at["qkv"][b, k, G + 1, :].astype(dtype)
    if "q_scale" in at:
        q = _normed(q, [at["q_scale"][half][None] for half in halves], D, eps)
        key = _normed(key, [at["k_scale"][half] for half in halves], D, eps)
    if "cos" in at:
        cos, sin = at["cos"][b, :], at["sin"][b, :]
        q, key = _rotated(q, cos[None], sin[None]), _rotated(key, cos, sin)
    q, key = [(x * scale).astype(dtype) for x in q], [x.astype(dtype) for x in key]

    dot = functools.partial(jnp.dot, preferred_element_type=jnp.float32)

    def along(i, carry):
        highest, total, mixed = carry
        slots = pl.ds(i * BLOCK, BLOCK)
        scores = sum(dot(x, at["old_keys"][b, k, half, slots]) for x, half in zip(q, halves, strict=True))
        index = i * BLOCK + jnp.arange(BLOCK)
        seen = index < position
        if window is not None:
            seen &= index > position - window
        scores = jnp.where(seen[None], scores, MASKED)
        now = jnp.maximum(highest, jnp.max(scores, axis=1))
        shrink, weights = jnp.exp(highest - now), jnp.exp(scores - now[:, None])
        more = dot(weights.astype(dtype), at["old_values"][b, k, slots, :])
        return now, total * shrink + jnp.sum(weights, axis=1), mixed * shrink[:, None] + more

    # the new token, which every query sees, begins the sums
    wide = jnp.float32
    score = sum(jnp.sum(x.astype(wide) * y.astype(wide)[None], axis=1) for x, y in zip(q, key, strict=True))
    start = (score, jnp.ones((P,), wide), jnp.broadcast_to(value.astype(wide)[None], (P, D)))
    first = 0 if window is None else jnp.maximum(position - window + 1, 0) // BLOCK
    _, total, mixed = jax.lax.fori_loop(first, pl.cdiv(jnp.minimum(position, S), BLOCK), along, start)
    out = (mixed / total[:, None]).astype(at["out"].dtype)
    at["out"][b, k, queries, :] = out

    @pl.when(position < S)
    def _():
        for x, half in zip(key, halves, strict=True):
            at["keys"][b, k, half, position] = x
        at["values"][b, k, position, :] = value


def _normed(halves: list[jax.Array], scales: list[jax.Array], size: int, eps: float) -> list[jax.Array]:
    """`layers.rms_norm` of vectors that are held in two halves."""
    squares = sum(jnp.sum(x * x, axis=-1, keepdims=True) for x in halves)
    factor = jax.lax.rsqrt(squares / size + eps)
    return [x * factor * scale for x, scale in zip(halves, scales, strict=True)]


def _rotated(halves: list[jax.Array], cos: jax.Array, sin: jax.Array) -> list[jax.Array]:
    """`layers.apply_rope`, likewise."""
    a, b = halves
    return [a * cos - b * sin, b * cos + a * sin]
