"""Contrastive losses: a response that is right against one that is wrong, of the same prompt.

Dimension key: P pairs. Everything is a function of log-probabilities summed over a response's tokens, and of their
numbers; how these come about is the caller's. A loss gives one value a pair, in fp32: the caller weighs, sums, divides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

SMALLEST = 1e-6
"""Nats a token below which `odds_ratio` sees no further difference: log(1 - p) is infinite at p = 1."""


@dataclass(frozen=True)
class Pairs:
    """What is known of P pairs.

    Attributes:
      chosen, rejected: the student's log p(response | prompt), in nats.
      chosen_tokens, rejected_tokens: tokens of the responses, 1 or more where a pair is real.
      chosen_reference, rejected_reference: the reference's log p(response | prompt); zeros if there is none.
    """

    chosen: Float[Array, " P"]
    rejected: Float[Array, " P"]
    chosen_tokens: Float[Array, " P"]
    rejected_tokens: Float[Array, " P"]
    chosen_reference: Float[Array, " P"]
    rejected_reference: Float[Array, " P"]


def margin(pairs: Pairs, *, beta: float, gap: float, normalize: bool) -> Float[Array, " P"]:
    """max(0, gap - beta * (log p(chosen) - log p(rejected))): a hinge, zero once the chosen one is ahead by the gap.

    Args:
      normalize: log-probabilities are means over tokens, so that neither length nor brevity is rewarded.
    Source: the rank loss of RRHF, Yuan et al. 2023, arXiv:2304.05302, section 3 (length-normalised, without a gap),
      with the gap of the calibration loss of SLiC-HF, Zhao et al. 2023, arXiv:2305.10425, section 2.
    """
    chosen, rejected = _scores(pairs, normalize)
    return jax.nn.relu(gap - beta * (chosen - rejected))


def dpo(pairs: Pairs, *, beta: float, gap: float, normalize: bool) -> Float[Array, " P"]:
    """-log sigmoid(beta * ((log p - log r)(chosen) - (log p - log r)(rejected)) - gap), r the reference.

    Args:
      gap: the offset of ODPO (Amini et al. 2024, arXiv:2402.10571), a constant one; 0 is DPO.
      normalize: of log-probabilities and reference; not in the paper (Tulu 3, arXiv:2411.15124, section 5, has it).
    Source: Rafailov et al. 2023, arXiv:2305.18290, section 4, equation 7.
    """
    chosen, rejected = _scores(pairs, normalize)
    chosen_reference, rejected_reference = _references(pairs, normalize)
    return -jax.nn.log_sigmoid(beta * ((chosen - chosen_reference) - (rejected - rejected_reference)) - gap)


def simpo(pairs: Pairs, *, beta: float, gap: float, normalize: bool) -> Float[Array, " P"]:
    """-log sigmoid(beta * (log p(chosen) - log p(rejected)) - gap), of means over tokens; no reference.

    Source: Meng et al. 2024, arXiv:2405.14734, section 2.3, equation 6 (beta 2 to 10, gap / beta 0.3 to 0.5 there).
    """
    chosen, rejected = _scores(pairs, normalize)
    return -jax.nn.log_sigmoid(beta * (chosen - rejected) - gap)


def odds_ratio(pairs: Pairs, *, beta: float, gap: float, normalize: bool) -> Float[Array, " P"]:
    """-log sigmoid(log odds(chosen) - log odds(rejected)), odds = p / (1 - p) of the geometric mean of p over tokens.

    The relative-ratio part of ORPO alone: its language-model part is the cross-entropy beside it, and its lambda the
    caller's weight. `beta` scales the log odds ratio and `gap` is subtracted; ORPO has 1 and 0.

    Source: Hong et al. 2024, arXiv:2403.07691, section 4, equations 4 to 7.
    """
    chosen, rejected = (_log_odds(s) for s in _scores(pairs, normalize))
    return -jax.nn.log_sigmoid(beta * (chosen - rejected) - gap)


def _log_odds(log_p: Float[Array, " P"]) -> Float[Array, " P"]:
    log_p = jnp.minimum(log_p, -SMALLEST)
    # log(1 - exp(log_p)), exact at both ends
    return log_p - jnp.log(-jnp.expm1(log_p))


def _scores(pairs: Pairs, normalize: bool) -> tuple[Float[Array, " P"], Float[Array, " P"]]:
    return _normalized(pairs, pairs.chosen, pairs.rejected, normalize)


def _references(pairs: Pairs, normalize: bool) -> tuple[Float[Array, " P"], Float[Array, " P"]]:
    return _normalized(pairs, pairs.chosen_reference, pairs.rejected_reference, normalize)


def _normalized(
    pairs: Pairs, chosen: Float[Array, " P"], rejected: Float[Array, " P"], normalize: bool
) -> tuple[Float[Array, " P"], Float[Array, " P"]]:
    chosen, rejected = chosen.astype(jnp.float32), rejected.astype(jnp.float32)
    if not normalize:
        return chosen, rejected
    return chosen / jnp.maximum(pairs.chosen_tokens, 1.0), rejected / jnp.maximum(pairs.rejected_tokens, 1.0)


@dataclass(frozen=True)
class Form:
    """One loss, and the numbers that its paper has."""

    loss: Callable[..., Float[Array, " P"]]
    beta: float
    gap: float
    normalize: bool
    reference: bool = False
    """Whether it needs the reference's log-probabilities."""


PREFERENCES: dict[str, Form] = {
    # neither paper has a gap for means over tokens; 1 nat harms (README)
    "margin": Form(margin, beta=1.0, gap=0.1, normalize=True),
    "dpo": Form(dpo, beta=0.1, gap=0.0, normalize=False, reference=True),
    "orpo": Form(odds_ratio, beta=1.0, gap=0.0, normalize=True),
    "simpo": Form(simpo, beta=2.0, gap=1.0, normalize=True),
}
