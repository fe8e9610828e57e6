"""Draws the next token from logits: temperature, top-k and top-p, each row by its own random stream.

Dimension key: B rows, V vocabulary, N blocks of it, R rounds, C blocks or tokens.

What a row draws depends on its logits, its key and the sampling parameters alone. Logits are never sorted, which would
cost more than a small model's step: a nucleus is sampled by rejection, and thresholds are found by bisection.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

BLOCK = 256
"""Tokens are found in two steps, a block of this many and then one of its tokens, so that sums stay short."""

ROUNDS = 8
"""Draws of a nucleus before it is cut out after all; a draw fails with probability 1 - top_p at most."""


def greedy(logits_BV: Float[Array, "B V"]) -> Int[Array, " B"]:
    """The most probable token; the first of equals."""
    return jax.lax.platform_dependent(
        logits_BV, cpu=_greedy_on_cpu, default=lambda x: jnp.argmax(x, -1).astype(jnp.int32)
    )


def _greedy_on_cpu(logits_BV: jax.Array) -> jax.Array:
    # two plain reductions are faster there than argmax, which carries index and value along
    highest = jnp.max(logits_BV, axis=-1, keepdims=True)
    index = jnp.arange(logits_BV.shape[1], dtype=jnp.int32)[None]
    found = jnp.min(jnp.where(logits_BV == highest, index, logits_BV.shape[1]), axis=-1)
    # NaN equals nothing; the token stays one of the vocabulary
    return jnp.minimum(found, logits_BV.shape[1] - 1)


def sample(
    logits_BV: Float[Array, "B V"],
    keys_B: jax.Array,
    *,
    temperature: Float[Array, ""],
    top_k: Int[Array, ""] | None = None,
    top_p: Float[Array, ""] | None = None,
) -> Int[Array, " B"]:
    """One token a row from softmax(logits / temperature), cut to `top_k` tokens and then to the nucleus.

    Where tokens are equally probable, each cut keeps all or none of them.

    Args:
      keys_B: random keys; a key is used for one draw.
      temperature: above 0.
      top_k: keeps this many most probable tokens; None keeps all.
      top_p: keeps the smallest set of most probable tokens with at least this share of the probability that is left
        (Holtzman et al. 2020, arXiv:1904.09751, section 3.1); None keeps all.
    """
    uniform_BR2 = jax.vmap(lambda key: jax.random.uniform(key, (ROUNDS + 1, 2)))(keys_B)
    scores_BV = logits_BV / temperature
    weights_BV = jnp.exp(scores_BV - jnp.max(scores_BV, axis=-1, keepdims=True))
    if top_k is not None:
        above = _least(weights_BV, lambda above: above.sum(-1) < top_k)
        weights_BV = jnp.where(weights_BV >= above, weights_BV, 0.0)
    return _draw(weights_BV, uniform_BR2[:, 0]) if top_p is None else _sample_nucleus(weights_BV, uniform_BR2, top_p)


def _least(weights_BV: jax.Array, few: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The least number t in 0..1 for which `few` of the weights are above t, [B, 1], found bit by bit.

    Args:
      weights_BV: in 0..1, where floats are ordered as their bits are.
      few: bool [B, V], which weights are above t -> bool [B]; it stays true as t grows.
    """

    def halve(_, bounds):
        low, high = bounds  # few above `high`; not so above `low`
        middle = low + (high - low) // 2
        # bits of -1 are no number, and stand for less than 0
        ok = (middle >= 0) & few(weights_BV > jax.lax.bitcast_convert_type(middle, jnp.float32)[:, None])
        return jnp.where(ok, low, middle), jnp.where(ok, middle, high)

    one = jax.lax.bitcast_convert_type(jnp.float32(1), jnp.int32)
    start = (jnp.full(weights_BV.shape[:1], -1, jnp.int32), jnp.full(weights_BV.shape[:1], one, jnp.int32))
    _, high = jax.lax.fori_loop(0, 31, halve, start)
    return jax.lax.bitcast_convert_type(high, jnp.float32)[:, None]


def _sample_nucleus(weights_BV: jax.Array, uniform_BR2: jax.Array, top_p: jax.Array) -> jax.Array:
    """Draws from all tokens until the token is one of the nucleus: that has the nucleus' own distribution.

    A token is in the nucleus if the tokens that are more probable do not have `top_p` by themselves.
    """
    enough_B = top_p * weights_BV.sum(-1)

    def few(above_BV):
        return jnp.where(above_BV, weights_BV, 0.0).sum(-1) < enough_B

    def going_on(carry):
        round, _, found_B = carry
        return (round < ROUNDS) & ~jnp.all(found_B)

    def again(carry):
        round, token_B, found_B = carry
        drawn_B = _draw(weights_BV, uniform_BR2[:, round])
        weight_B1 = jnp.take_along_axis(weights_BV, drawn_B[:, None], axis=1)
        return round + 1, jnp.where(found_B, token_B, drawn_B), found_B | few(weights_BV > weight_B1)

    def by_cutting(token_B, found_B):
        nucleus = jnp.where(weights_BV >= _least(weights_BV, few), weights_BV, 0.0)
        return jnp.where(found_B, token_B, _draw(nucleus, uniform_BR2[:, ROUNDS]))

    B = weights_BV.shape[0]
    start = (jnp.int32(0), jnp.zeros(B, jnp.int32), jnp.zeros(B, bool))
    _, token_B, found_B = jax.lax.while_loop(going_on, again, start)
    return jax.lax.cond(jnp.all(found_B), lambda token, _: token, by_cutting, token_B, found_B)


def _draw(weights_BV: jax.Array, uniform_B2: jax.Array) -> jax.Array:
    """A token with probability proportional to its weight."""
    B, V = weights_BV.shape
    weights_BNV = jnp.pad(weights_BV, ((0, 0), (0, -V % BLOCK))).reshape(B, -1, BLOCK)
    block_B = _first_above(weights_BNV.sum(-1), uniform_B2[:, 0])
    inside = jnp.take_along_axis(weights_BNV, block_B[:, None, None], axis=1)[:, 0]
    # without any weight, as where logits are NaN, it is still a token
    return jnp.minimum(block_B * BLOCK + _first_above(inside, uniform_B2[:, 1]), V - 1)


def _first_above(weights_BC: jax.Array, uniform_B: jax.Array) -> jax.Array:
    """The first index whose running sum exceeds the row's share `uniform_B` (below 1) of the total."""
    reached = jnp.cumsum(weights_BC, axis=-1)
    chosen = jnp.sum(reached <= uniform_B[:, None] * reached[:, -1:], axis=-1, dtype=jnp.int32)
    return jnp.minimum(chosen, weights_BC.shape[1] - 1)
