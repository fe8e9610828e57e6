"""A teacher's next-token distributions at tokens that are there already, by one forward pass in JAX.

Dimension key: B rows, T tokens, N scored tokens, E width, V vocabulary, k kept tokens.

No server and no vLLM is needed, k may be anything up to V, and instead of the likeliest tokens it can keep random draws
(arXiv:2503.16870). Logits exist for `CHUNK` tokens at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.models import Decoder, params_of, with_params
from jaxdistill.traces.engines import Request
from jaxdistill.traces.logprobs import TopLogprobs

CHUNK = 256
"""Tokens projected at once."""
BATCH_TOKENS = 1 << 14
"""Tokens, padding included, that a forward pass takes at most, unless one row is longer."""


class Scorer:
    """Scores batches of sequences by one model."""

    def __init__(self, model: Decoder, k: int, vocabulary: int, *, random: bool = False, temperature: float = 1.0):
        """
        Args:
          k: likeliest tokens, or random draws.
          vocabulary: number of real tokens; the model's other columns are left out.
          random: draw k tokens from each distribution. They come back each once, with the logarithm of its share of the
            draws, and -inf in the slots that are left.
          temperature: divides the logits, of the sequence's own tokens too.
        Raises:
          ValueError: more tokens are wanted than there are.
        """
        if k > vocabulary and not random:
            raise ValueError(f"traces.logprobs={k}, of a vocabulary of {vocabulary} tokens; lower it.")
        self._random, self._params, self._run = (
            random,
            params_of(model),
            _compiled(model, k, vocabulary, random, temperature),
        )

    def score(self, requests: Sequence[Request]) -> Iterator[tuple[int, TopLogprobs]]:
        """(index, distributions at the response's tokens) of every request, the shortest first."""
        order = sorted(range(len(requests)), key=lambda i: requests[i].room)
        while order:
            count = 1
            while count < len(order) and _up(requests[order[count]].room, 64) * (count + 1) <= BATCH_TOKENS:
                count += 1
            part, order = order[:count], order[count:]
            found = _score_batch(self._run, self._params, [requests[i] for i in part], self._random)
            yield from zip(part, found, strict=True)


def _score_batch(run: Any, params: Any, requests: list[Request], random: bool) -> Iterator[TopLogprobs]:
    answers = [r.response_ids or [] for r in requests]
    whole = [r.prompt_ids + answer for r, answer in zip(requests, answers, strict=True)]
    # few shapes, as each is compiled
    B, T = 1 << (len(whole) - 1).bit_length(), _up(max(map(len, whole)), 64)
    tokens = np.zeros((B, T), np.int32)
    for row, ids in zip(tokens, whole, strict=False):
        row[: len(ids)] = ids
    # the distribution at token t is what follows from the tokens before it
    places, seeds = [], []
    for b, (request, ids, answer) in enumerate(zip(requests, whole, answers, strict=True)):
        places.append(b * T + np.arange(len(request.prompt_ids), len(ids)) - 1)
        seeds.append((request.seed * 1_000_003 + np.arange(len(answer))) % (1 << 31))
    flat, drawn = np.concatenate(places), np.concatenate([np.array(answer, np.int32) for answer in answers])
    slots = max(CHUNK, 1 << (len(flat) - 1).bit_length())
    padded = [np.pad(x, (0, slots - len(flat))).astype(np.int32) for x in (flat, drawn, np.concatenate(seeds))]
    ids, logprobs, own = (np.asarray(x)[: len(flat)] for x in run(params, tokens, *padded))
    ends = np.cumsum([len(answer) for answer in answers])[:-1]
    for parts in zip(*(np.split(x, ends) for x in (ids, logprobs, own)), strict=True):
        yield _merged(*parts) if random else TopLogprobs(*parts)


def _compiled(model: Decoder, k: int, vocabulary: int, random: bool, temperature: float) -> Any:
    """(params, tokens, places, drawn tokens, seeds) -> (ids [N, k], logprobs [N, k], the drawn tokens' [N])."""

    def run(params, tokens_BT, where_N, drawn_N, seeds_N):
        whole = with_params(model, params)
        hidden = whole.hidden(tokens_BT).reshape(-1, model.config.hidden_size)

        def chunk(inputs):
            where, drawn, seeds = inputs
            log_q = jax.nn.log_softmax(whole.project(hidden[where][None])[0, :, :vocabulary] / temperature)
            own = jnp.take_along_axis(log_q, drawn[:, None], axis=1)[:, 0]
            if not random:
                values, ids = jax.lax.top_k(log_q, k)
                return ids, values, own
            # by the inverse of the distribution function: k numbers a token, not k a column
            below = jnp.cumsum(jnp.exp(log_q), axis=1)
            uniform = jax.vmap(lambda seed: jax.random.uniform(jax.random.key(seed), (k,)))(seeds)
            ids = jax.vmap(functools.partial(jnp.searchsorted, side="right"))(below, uniform * below[:, -1:])
            ids = jnp.sort(jnp.minimum(ids, vocabulary - 1).astype(jnp.int32), axis=1)
            return ids, jnp.zeros_like(uniform), own

        found = jax.lax.map(chunk, tuple(x.reshape(-1, CHUNK) for x in (where_N, drawn_N, seeds_N)))
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)

    return jax.jit(run)


def _merged(ids: np.ndarray, _: np.ndarray, own: np.ndarray) -> TopLogprobs:
    """Sorted draws [N, n] -> every token once, the most frequent first, with the logarithm of its share."""
    N, n = ids.shape
    new = np.concatenate([np.ones((N, 1), bool), ids[:, 1:] != ids[:, :-1]], 1)
    group = np.cumsum(new, 1) - 1
    counts = np.zeros((N, n), np.int64)
    np.add.at(counts, (np.arange(N)[:, None], group), 1)
    tokens = np.zeros((N, n), np.int32)
    np.put_along_axis(tokens, group, ids, 1)
    order = np.argsort(-counts, axis=1, kind="stable")
    counts, tokens = np.take_along_axis(counts, order, 1), np.take_along_axis(tokens, order, 1)
    with np.errstate(divide="ignore"):
        return TopLogprobs(tokens, np.log(counts / n).astype(np.float32), own)


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
