"""Reads given texts with the JAX model: how likely each token of a target is, and whether it would write them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROUND = 64
"""Sequences are padded to a multiple of this, so that few shapes are compiled."""
POSITIONS = 128
"""Positions whose logits are held at once, so that a large vocabulary fits."""


@dataclasses.dataclass(frozen=True)
class Reading:
    """What the model thinks of one target."""

    logprobs: np.ndarray
    """Of its tokens, in nats."""
    greedy: bool
    """Whether every token of it is the likeliest at its place: greedy decoding would have written just this."""

    @property
    def probability(self) -> float:
        return float(np.exp(self.logprobs.sum()))

    @property
    def mean(self) -> float:
        """Mean logprob of a token, which does not punish length."""
        return float(self.logprobs.mean())


class Reader:
    """One checkpoint, loaded once in fp32."""

    def __init__(self, checkpoint: Path, batch: int):
        """Args: `batch` sequences are read at once."""
        import jax

        from jaxdistill.models import load_hf, params_of, with_params

        self._model = load_hf(checkpoint, dtype="float32")
        self._params, self._batch = params_of(self._model), batch
        model = self._model

        def read(params: Any, tokens: Any, places: Any) -> tuple[Any, Any]:
            return score_places(with_params(model, params), tokens, places)

        self._read = jax.jit(read)

    def read(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Reading]:
        """One reading a (prefix ids, target ids) pair, in their order.

        Raises:
          ValueError: an empty prefix or target, or a pair that does not fit into the model's context.
        """
        context = self._model.config.max_position_embeddings
        for prefix, target in pairs:
            if not len(prefix) or not len(target):
                raise ValueError("a reading needs a prefix and a target of at least one token each.")
            if len(prefix) + len(target) > context:
                raise ValueError(f"{len(prefix) + len(target)} tokens to read > {context}, the model's context.")
        order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
        found: dict[int, Reading] = {}
        for start in range(0, len(order), self._batch):
            part = order[start : start + self._batch]
            found |= zip(part, self._read_batch([pairs[i] for i in part]), strict=True)
        return [found[i] for i in range(len(pairs))]

    def _read_batch(self, pairs: list[tuple[Sequence[int], Sequence[int]]]) -> list[Reading]:
        longest = max(len(prefix) + len(target) for prefix, target in pairs)
        width, most = _round(longest, ROUND), _round(max(len(target) for _, target in pairs), 8)
        tokens = np.zeros((self._batch, width), np.int32)
        places = np.ones((self._batch, most), np.int32)
        for row, (prefix, target) in enumerate(pairs):
            tokens[row, : len(prefix) + len(target)] = [*prefix, *target]
            places[row, : len(target)] = np.arange(len(prefix), len(prefix) + len(target))
        logprobs, best = (np.asarray(part) for part in self._read(self._params, tokens, places))
        return [
            Reading(logprobs[row, : len(target)], bool(best[row, : len(target)].all()))
            for row, (_, target) in enumerate(pairs)
        ]


def score_places(model: Any, tokens_BT: Any, places_BA: Any) -> tuple[Any, Any]:
    """Logprobs of the tokens at some places, each given all before it, and whether each is the likeliest: [B, A] both.

    What stands behind a row's last place does not matter: a token sees none after it.

    Args:
      places_BA: at least 1, as the first token follows nothing.
    """
    import jax
    import jax.numpy as jnp

    hidden_BTE = model.hidden(tokens_BT)
    before_BAE = jnp.take_along_axis(hidden_BTE, places_BA[..., None] - 1, axis=1)
    targets_BA = jnp.take_along_axis(tokens_BT, places_BA, axis=1)
    count, width = targets_BA.size, before_BAE.shape[-1]
    size = min(POSITIONS, count)
    padding = -count % size
    states = jnp.pad(before_BAE.reshape(count, width), ((0, padding), (0, 0))).reshape(-1, 1, size, width)
    targets = jnp.pad(targets_BA.reshape(count), (0, padding)).reshape(-1, size)

    def score(part: tuple[Any, Any]) -> tuple[Any, Any]:
        logits_TV = model.project(part[0])[0]
        chosen_T = jnp.take_along_axis(logits_TV, part[1][:, None], axis=1)[:, 0]
        return chosen_T - jax.nn.logsumexp(logits_TV, axis=-1), chosen_T >= logits_TV.max(-1)

    logprobs, best = jax.lax.map(score, (states, targets))
    return logprobs.reshape(-1)[:count].reshape(targets_BA.shape), best.reshape(-1)[:count].reshape(targets_BA.shape)


def _round(number: int, to: int) -> int:
    return -(-number // to) * to
