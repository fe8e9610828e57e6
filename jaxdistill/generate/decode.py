"""Batched decoding with a key-value cache.

Dimension key: B rows, P prompt slots, N new tokens, S = P + N cache slots, V vocabulary.
A row's output is a pure function of its prompt, its seed and the sampling parameters: prompts are grouped by their own
length and every batch has the same B rows, so it does not matter what else is being decoded.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxdistill.models import Decoder

# prompts are padded to a multiple of this, which bounds the number of compiled shapes
PROMPT_STEP = 32


def decode(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    *,
    max_tokens: int,
    temperature: float,
    top_p: float = 1.0,
    stop_ids: Sequence[int],
    batch: int = 256,
) -> Iterator[tuple[int, list[int], Literal["stop", "length"]]]:
    """Yields (index into `prompts`, output ids with the stop token, `stop` or `length`), batch by batch.

    Args:
      seeds: one a prompt; unused where `temperature` is 0 (greedy).
      batch: rows decoded at once; a smaller last batch is filled up with copies.
    """
    graph, params = nnx.split(model)
    groups: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        groups.setdefault(-(-max(1, len(prompt)) // PROMPT_STEP) * PROMPT_STEP, []).append(index)
    for width in sorted(groups):
        for start in range(0, len(groups[width]), batch):
            rows = groups[width][start : start + batch]
            padded = rows + [rows[-1]] * (batch - len(rows))
            tokens, lengths = np.zeros((batch, width), np.int32), np.zeros(batch, np.int32)
            for row, index in enumerate(padded):
                prompt = prompts[index]
                tokens[row, width - len(prompt) :] = prompt  # left-padded: every row's next slot is the same
                lengths[row] = len(prompt)
            output = _decode_batch(
                graph, params, tokens, lengths,
                np.array([seeds[i] for i in padded], np.uint32), np.array(stop_ids, np.int32),
                np.float32(temperature), np.float32(top_p),
                max_tokens=max_tokens, greedy=temperature == 0, nucleus=top_p < 1,
            )  # fmt: skip
            for row, ids in zip(rows, np.asarray(output)[: len(rows)].tolist(), strict=True):
                end = next((i for i, token in enumerate(ids) if token in stop_ids), None)
                yield row, ids if end is None else ids[: end + 1], "length" if end is None else "stop"


@functools.partial(jax.jit, static_argnums=0, static_argnames=("max_tokens", "greedy", "nucleus"))
def _decode_batch(
    graph: Any, params: Any, tokens_BP: jax.Array, lengths_B: jax.Array, seeds_B: jax.Array, stop_ids: jax.Array,
    temperature: jax.Array, top_p: jax.Array, *, max_tokens: int, greedy: bool, nucleus: bool,
) -> jax.Array:  # fmt: skip
    """Prefill, then one token at a time until every row has stopped; returns int32 [B, N]."""
    model: Decoder = nnx.merge(graph, params)
    c = model.config
    B, P = tokens_BP.shape
    S = P + max_tokens
    keys_B = jax.vmap(jax.random.key)(seeds_B)

    def pick(logits_BV: jax.Array, position: jax.Array) -> jax.Array:
        if greedy:
            return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        scores = logits_BV / temperature
        if nucleus:
            scores = _keep_nucleus(scores, top_p)
        # one random stream a row and position, whatever the batch
        noise = jax.vmap(lambda key: jax.random.gumbel(jax.random.fold_in(key, position), scores.shape[1:]))(keys_B)
        return jnp.argmax(scores + noise, axis=-1).astype(jnp.int32)

    slots_S = jnp.arange(S)
    real_BS = slots_S[None, :] >= (P - lengths_B)[:, None]
    positions_BP = jnp.maximum(jnp.arange(P)[None, :] - (P - lengths_B)[:, None], 0)
    visible_BPS = real_BS[:, None, :] & (slots_S[None, :] <= jnp.arange(P)[:, None])[None]
    empty = jnp.zeros((B, S, c.num_kv_heads, c.head_dim), model.dtype)
    logits, cache = model.step(tokens_BP, positions_BP, [(empty, empty)] * c.num_layers, jnp.int32(0), visible_BPS)
    token_B = pick(logits, jnp.int32(0))

    def going_on(carry):
        n, _, _, _, done_B = carry
        return (n < max_tokens) & ~jnp.all(done_B)

    def one_token(carry):
        n, token_B, output_BN, cache, done_B = carry
        output_BN = jax.lax.dynamic_update_slice_in_dim(output_BN, jnp.where(done_B, 0, token_B)[:, None], n, axis=1)
        done_B = done_B | jnp.isin(token_B, stop_ids)
        at = P + n
        visible = real_BS[:, None, :] & (slots_S <= at)[None, None, :]
        logits, cache = model.step(token_B[:, None], (lengths_B + n)[:, None], cache, at, visible)
        return n + 1, pick(logits, n + 1), output_BN, cache, done_B

    start = (jnp.int32(0), token_B, jnp.zeros((B, max_tokens), jnp.int32), cache, jnp.zeros(B, bool))
    return jax.lax.while_loop(going_on, one_token, start)[2]


def _keep_nucleus(scores_BV: jax.Array, top_p: jax.Array) -> jax.Array:
    """Leaves the smallest set of tokens whose probability reaches `top_p` (Holtzman et al. 2020, arXiv:1904.09751)."""
    ordered = jnp.sort(scores_BV, axis=-1, descending=True)
    before = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1) - jax.nn.softmax(ordered, axis=-1)
    least = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(scores_BV >= least, scores_BV, -jnp.inf)
