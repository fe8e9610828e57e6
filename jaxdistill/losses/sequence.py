"""Masked sequence cross-entropy: the loss of sequence-level distillation.

Dimension key: B rows, T positions, V vocabulary. A loss returns (sum, count), never a mean: the caller divides once,
for the whole global batch, so that gradients do not depend on how the batch was cut.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def shift(
    tokens_BT: Int[Array, "B T"], weights_BT: Float[Array, "B T"], segment_ids_BT: Int[Array, "B T"]
) -> tuple[Int[Array, "B T"], Float[Array, "B T"]]:
    """Targets and weights for position t, which predicts token t + 1.

    Args:
      weights_BT: how much each token counts when it is predicted.
    Returns:
      (targets, weights), where the last token of every segment and of every row predicts nothing.
    """
    targets = jnp.roll(tokens_BT, -1, axis=1)
    inside = (segment_ids_BT == jnp.roll(segment_ids_BT, -1, axis=1)) & (
        jnp.arange(tokens_BT.shape[1]) < tokens_BT.shape[1] - 1
    )[None]
    return targets, jnp.where(inside, jnp.roll(weights_BT, -1, axis=1), 0.0)


def cross_entropy(
    logits_BTV: Float[Array, "B T V"], targets_BT: Int[Array, "B T"], weights_BT: Float[Array, "B T"]
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """Weighted sum of -log p(target), in nats.

    Args:
      logits_BTV: any float dtype; sums are fp32.
      weights_BT: 0 leaves a position out, whatever its logits are, NaN included.
    Returns:
      (sum of weight * nll, sum of weights, sum of weights of the positions whose target has the highest logit).
    Source: Kim & Rush 2016, arXiv:1606.07947, section 3.2 (sequence-level distillation trains on the teacher's text).
    """
    used = weights_BT > 0
    logits = jnp.where(used[..., None], logits_BTV.astype(jnp.float32), 0.0)
    chosen = jnp.take_along_axis(logits, targets_BT[..., None], axis=-1)[..., 0]
    nll = jax.nn.logsumexp(logits, axis=-1) - chosen
    hits = jnp.argmax(logits, axis=-1) == targets_BT
    return jnp.sum(nll * weights_BT), jnp.sum(weights_BT), jnp.sum(hits * weights_BT)
