"""Contrastive learning inside the step: a loss of pairs of responses beside the cross-entropy of the packed rows.

Dimension key: B rows of pairs, T tokens, C of them, E width, S segments of a row (a pair is two), P pairs of a batch.

A pair's loss is a function of two summed log-probabilities. Its derivatives by these are numbers; so the gradient is
that of a weighted cross-entropy, whose weights they are, and logits never exist whole.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxdistill.config import ContrastiveConfig
from jaxdistill.losses import PREFERENCES, Layout, Pairs, chunked_cross_entropy, shift
from jaxdistill.losses.preferences import Form
from jaxdistill.losses.sweep import default_chunk
from jaxdistill.models import Decoder, join_params, with_params
from jaxdistill.train.gradients import in_parts

METRICS = ("lm_loss", "pair_loss", "pair_accuracy", "pair_margin", "chosen_logprob", "rejected_logprob")
"""Means that a step has beside its loss; log-probabilities are those of a token, in nats."""
Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Contrast:
    """What a step has to know of it; all static.

    Attributes:
      segments: S, of the fullest row of pairs.
    """

    form: Form
    weight: float
    lm_weight: float
    beta: float
    gap: float
    normalize: bool
    segments: int

    @classmethod
    def of(cls, config: ContrastiveConfig, segments: int) -> Contrast:
        form = PREFERENCES[config.form]

        def given(name: str) -> Any:
            return getattr(form, name) if getattr(config, name) is None else getattr(config, name)

        return cls(
            form=form,
            weight=config.weight,
            lm_weight=config.lm_weight,
            beta=given("beta"),
            gap=given("gap"),
            normalize=given("normalize"),
            segments=segments,
        )

    def losses(self, pairs: Pairs) -> jax.Array:
        """One loss a pair, [P]."""
        return self.form.loss(pairs, beta=self.beta, gap=self.gap, normalize=self.normalize)

    def add_gradients(
        self,
        model: Decoder,
        params: Any,
        pairs: Batch,
        gradient: Any,
        metrics: dict[str, jax.Array],
        micro_batches: int,
        *,
        frozen: Any = None,
        dropout_key: jax.Array | None = None,
    ) -> tuple[Any, dict[str, jax.Array]]:
        """The cross-entropy's gradient and metrics with those of the pairs added.

        Args:
          pairs: packed rows of pairs; `reference` [B, S], the reference's log-probabilities, zeros where none is used.
        """
        found_gradient, found = pair_gradients(
            self, model, params, pairs, micro_batches, frozen=frozen, dropout_key=dropout_key
        )
        gradient = jax.tree.map(lambda a, b: self.lm_weight * a + self.weight * b, gradient, found_gradient)
        lm = metrics["loss"]
        return gradient, metrics | found | {
            "loss": self.lm_weight * lm + self.weight * found["pair_loss"],
            "lm_loss": lm,
        }


def pair_gradients(
    contrast: Contrast,
    model: Decoder,
    params: Any,
    batch: Batch,
    micro_batches: int = 1,
    *,
    frozen: Any = None,
    dropout_key: jax.Array | None = None,
) -> tuple[Any, dict[str, jax.Array]]:
    """Gradient of the mean loss over all pairs of the batch, however many micro-batches it is taken in.

    Returns:
      (gradient, {pair_loss, pair_accuracy, pair_margin, chosen_logprob, rejected_logprob}).
    """
    count = jnp.maximum(_pairs_in(batch, contrast.segments), 1.0)

    def part_of(params: Any, part: Batch, key: jax.Array | None) -> tuple[Any, dict[str, jax.Array]]:
        def loss(params: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
            whole = with_params(model, join_params(params, frozen or {}))
            return _surrogate(contrast, whole, part, key, count)

        (_, sums), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        return gradient, sums

    gradient, sums = in_parts(part_of, params, batch, dropout_key, micro_batches, model.mesh, axes_of)
    return gradient, {name: total / count for name, total in sums.items()}


def axes_of(name: str) -> tuple[str, str | None]:
    """Logical axes of an array of a batch of pairs: the reference's numbers are a segment's, the others a token's."""
    return "batch", None if name == "reference" else "sequence"


def _pairs_in(batch: Batch, segments: int) -> jax.Array:
    """How many pairs the batch has."""
    last_B = jnp.max(batch["segment_ids"], axis=1)
    return jnp.sum(jnp.minimum(last_B, segments) // 2).astype(jnp.float32)


def _surrogate(
    contrast: Contrast, model: Decoder, batch: Batch, dropout_key: jax.Array | None, count: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(what has the gradient of the sum of the pairs' losses / count, the sums behind the metrics)."""
    targets_BT, used_BT = _targets(batch)
    hidden_BTE = model.hidden(batch["tokens"], batch["positions"], batch["segment_ids"], dropout_key=dropout_key)
    sums_BS, tokens_BS = jax.lax.stop_gradient(response_logprobs(model, hidden_BTE, batch, contrast.segments))
    slopes_BS, sums = _slopes(contrast, sums_BS, tokens_BS, batch["reference"])
    at_BT = jnp.clip(batch["segment_ids"] - 1, 0, contrast.segments - 1)
    # loss falls as -log p does where the slope is negative
    weights_BT = -jnp.take_along_axis(slopes_BS, at_BT, axis=1) * used_BT / count
    total, _, _ = chunked_cross_entropy(
        hidden_BTE,
        model.projection(),
        targets_BT,
        jax.lax.stop_gradient(weights_BT),
        softcap=model.config.final_softcap,
        dtype=model.dtype,
        layout=Layout.of(model.mesh),
    )
    return total, sums


def _targets(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """(the token that each position predicts, 1.0 where it belongs to a response)."""
    return shift(batch["tokens"], (batch["regions"] > 0).astype(jnp.float32), batch["segment_ids"])


def response_logprobs(
    model: Decoder, hidden_BTE: jax.Array, batch: Batch, segments: int
) -> tuple[jax.Array, jax.Array]:
    """(log p of every segment's response, in nats; its number of tokens), both fp32 [B, S]."""
    targets_BT, used_BT = _targets(batch)
    logprobs_BT = jnp.where(used_BT > 0, _token_logprobs(model, hidden_BTE, targets_BT), 0.0)
    total = functools.partial(jax.ops.segment_sum, num_segments=segments + 1)
    sums_BS, tokens_BS = (jax.vmap(total)(x, batch["segment_ids"])[:, 1:] for x in (logprobs_BT, used_BT))
    return sums_BS, tokens_BS


def _token_logprobs(model: Decoder, hidden_BTE: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """fp32 log p(target) of every position, [B, T], from some positions' logits at a time."""
    B, T = targets_BT.shape
    ways = 1 if model.mesh is None else model.mesh.shape["data"] * model.mesh.shape["fsdp"]
    at_once = default_chunk(model.config.vocab_size, Layout.of(model.mesh))
    C = min(T, max(1, at_once * ways // B))

    def of(part: tuple[jax.Array, jax.Array]) -> jax.Array:
        hidden_BCE, targets_BC = part
        logits = model.project(hidden_BCE)
        # a sum, not a gather, as the vocabulary may be spread over devices
        is_target = jnp.arange(logits.shape[-1])[None, None] == targets_BC[..., None]
        return jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1) - jax.nn.logsumexp(logits, axis=-1)

    def cut(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, -T % C), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(B, -1, C, *x.shape[2:]), 1, 0)

    found = jax.lax.map(of, (cut(hidden_BTE), cut(targets_BT)))
    return jnp.moveaxis(found, 0, 1).reshape(B, -1)[:, :T]


def _slopes(
    contrast: Contrast, sums_BS: jax.Array, tokens_BS: jax.Array, reference_BS: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(derivative of the pairs' summed loss by every segment's log p, sums behind the metrics)."""
    real = (tokens_BS[:, 1::2] > 0).astype(jnp.float32).reshape(-1)

    def pairs_of(sums_BS: jax.Array) -> Pairs:
        columns = (x[:, first::2].reshape(-1) for x in (sums_BS, tokens_BS, reference_BS) for first in (0, 1))
        return Pairs(*columns)

    def total(sums_BS: jax.Array) -> jax.Array:
        return jnp.sum(contrast.losses(pairs_of(sums_BS)) * real)

    loss, slopes_BS = jax.value_and_grad(total)(sums_BS)
    pairs = pairs_of(sums_BS)
    counts = (jnp.maximum(n, 1.0) for n in (pairs.chosen_tokens, pairs.rejected_tokens))
    chosen_tokens, rejected_tokens = counts if contrast.normalize else (1.0, 1.0)
    ahead = pairs.chosen / chosen_tokens - pairs.rejected / rejected_tokens
    if contrast.form.reference:
        ahead -= pairs.chosen_reference / chosen_tokens - pairs.rejected_reference / rejected_tokens
    return slopes_BS, {
        "pair_loss": loss,
        "pair_accuracy": jnp.sum((ahead > 0) * real),
        "pair_margin": jnp.sum(ahead * real),
        "chosen_logprob": jnp.sum(pairs.chosen / jnp.maximum(pairs.chosen_tokens, 1.0) * real),
        "rejected_logprob": jnp.sum(pairs.rejected / jnp.maximum(pairs.rejected_tokens, 1.0) * real),
    }
