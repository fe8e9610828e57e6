"""Distillation from a teacher's log-probabilities of few tokens: its k likeliest, k sampled ones, or the student's own.

Dimension key: N tokens in one axis or two ([N] or [B, T]), k stored tokens, E width, V vocabulary, C tokens of a chunk.

The student's log-sum-exp runs over its whole vocabulary, and what lies outside of the k tokens is kept, as one bucket
or by a sampled token: renormalising both sides to the k tokens hides real divergence.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxdistill.losses.chunked import (
    Result,
    add_cross_entropy,
    ce_inputs,
    check_temperature,
    fp32,
    mixed_result,
    real_size,
    target_logit,
    weighted,
)
from jaxdistill.losses.sweep import Inputs, Plan, Sums
from jaxdistill.losses.vocabulary import LOWEST, Layout, Vocabulary


def topk_distillation(
    hidden: Float[Array, "*N E"],
    projection: Float[Array, "V E"],
    ids: Int[Array, "*N k"],
    logprobs: Float[Array, "*N k"],
    tail: Float[Array, "*N"] | None,
    weights: Float[Array, "*N"],
    *,
    temperature: float = 1.0,
    log_normalizer: Float[Array, "*N"] | None = None,
    targets: Int[Array, "*N"] | None = None,
    ce_weights: Float[Array, "*N"] | None = None,
    softcap: float | None = None,
    vocabulary: int | None = None,
    dtype: DTypeLike | None = None,
    chunk: int | None = None,
    layout: Layout | None = None,
) -> Result:
    """Weighted sum of the forward KL over k stored tokens and one bucket for all others, in nats times temperature**2.

    It is never above the KL over the whole vocabulary, and grows to it with k.

    Args:
      ids: distinct tokens of a position; a negative one is an empty slot.
      logprobs: the teacher's true log-probabilities of `ids`, at temperature 1 and never renormalised; -inf is no mass.
      tail: the teacher's mass on all other tokens, in 0..1, at `temperature`; None takes it as 1 minus that of the
        stored tokens, which is as good as the logprobs' rounding: of fp16 ones, about 1e-3.
      temperature: other than 1 needs `log_normalizer`, as k logprobs do not say what the whole distribution becomes.
      log_normalizer: log of the sum of p**(1 / temperature) over the teacher's whole vocabulary, p at temperature 1.
      The others, and what is returned, are as for `chunked_distillation`, without `teacher_nll`.
    Raises:
      ValueError: a temperature without its normalizer; arguments out of range; shapes that the mesh does not divide.
    Source: the data-processing inequality bounds it (Cover & Thomas 2006, section 2.9); DESIGN keeps every tail.
    """
    check_temperature(temperature)
    if (temperature != 1) != (log_normalizer is not None):
        raise ValueError(
            f"temperature is {temperature}, log_normalizer is {'absent' if log_normalizer is None else 'given'}; "
            "stored logprobs need it at any temperature but 1, and only there."
        )
    size = real_size(vocabulary, projection)
    log_q = fp32(logprobs)
    if log_normalizer is not None:
        log_q = log_q / temperature - fp32(log_normalizer)[..., None]
    log_q = jnp.where(ids >= 0, log_q, -jnp.inf)
    # with every token stored, nothing is left, and what rounding leaves is noise
    if ids.shape[-1] >= size:
        tail = jnp.zeros_like(fp32(weights))
    elif tail is None:
        tail = _one_minus_exp(jax.nn.logsumexp(log_q, axis=-1))
    inputs = {"ids": ids, "mass": jnp.exp(log_q), "log_q": log_q, "tail": fp32(tail)}
    inputs |= {"weights": fp32(weights), "used": weights != 0} | ce_inputs(targets, ce_weights, weights)
    plan = Plan(Stored(temperature, True), size, chunk, dtype or hidden.dtype, softcap, layout=layout)
    return mixed_result(plan, (hidden, projection), None, inputs, ce_weights)


def sampled_distillation(
    hidden: Float[Array, "*N E"],
    projection: Float[Array, "V E"],
    ids: Int[Array, "*N k"],
    sample_weights: Float[Array, "*N k"],
    logprobs: Float[Array, "*N k"] | None,
    weights: Float[Array, "*N"],
    *,
    targets: Int[Array, "*N"] | None = None,
    ce_weights: Float[Array, "*N"] | None = None,
    softcap: float | None = None,
    vocabulary: int | None = None,
    dtype: DTypeLike | None = None,
    chunk: int | None = None,
    layout: Layout | None = None,
) -> Result:
    """An unbiased estimate of the forward KL, and of its gradient, from tokens sampled from the teacher; in nats.

    Args:
      ids: sampled tokens; they may repeat. A negative one is an empty slot.
      sample_weights: how much each counts. For n draws from the teacher itself, how often the token came, divided by n;
        for n draws from a proposal r, that times teacher / r. Their expectation is the teacher's probability.
      logprobs: the teacher's true log-probabilities of `ids`. Without them the sum is that of the cross-entropy
        between teacher and student, which differs by the teacher's entropy, and has the same gradient.
      The others, and what is returned, are as for `chunked_distillation`, without `teacher_nll`. A single estimate may
      be below 0.
    Raises:
      ValueError: arguments out of range; shapes that the mesh does not divide.
    Source: Random Sampling Knowledge Distillation, Anshumann et al. 2025, arXiv:2503.16870.
    """
    mass = jnp.where(ids >= 0, fp32(sample_weights), 0.0)
    log_q = jnp.zeros_like(mass) if logprobs is None else fp32(logprobs)
    inputs = {"ids": ids, "mass": mass, "log_q": log_q, "weights": fp32(weights), "used": weights != 0}
    inputs |= ce_inputs(targets, ce_weights, weights)
    size = real_size(vocabulary, projection)
    plan = Plan(Stored(1.0, False), size, chunk, dtype or hidden.dtype, softcap, layout=layout)
    return mixed_result(plan, (hidden, projection), None, inputs, ce_weights)


def sampled_reverse_kl(
    hidden: Float[Array, "*N E"],
    projection: Float[Array, "V E"],
    ids: Int[Array, "*N k"],
    logprobs: Float[Array, "*N k"],
    own: Float[Array, "*N"],
    weights: Float[Array, "*N"],
    *,
    targets: Int[Array, "*N"],
    ce_weights: Float[Array, "*N"] | None = None,
    softcap: float | None = None,
    vocabulary: int | None = None,
    dtype: DTypeLike | None = None,
    chunk: int | None = None,
    layout: Layout | None = None,
) -> Result:
    """An unbiased estimate of KL(student || teacher) and of its gradient, at tokens drawn by the student; in nats.

    With p the student, q the teacher, S the k tokens, x the drawn one and a = log p - log q, the value is the sum of
    p a over S, exactly, plus a(x) where x is not in S; the gradient is the sum of a grad p over S, plus a(x) grad log
    p(x) where x is not in S. Without any S it is the policy gradient whose advantage is the teacher's log-probability
    minus the student's; the more of p is in S, the less both vary, down to the divergence itself. The gradient is an
    estimate of its own, not the derivative of the value.

    Args:
      ids: distinct tokens, chosen without regard to which was drawn; a negative one is an empty slot.
      logprobs: the teacher's log-probabilities of `ids`.
      own: the teacher's log-probabilities of the drawn tokens.
      targets: the drawn tokens, shifted: drawn from this very student, at temperature 1, or it is no such estimate.
      The others, and what is returned, are as for `chunked_distillation`, without `teacher_nll`. A single estimate may
      be below 0.
    Sources: "On-Policy Distillation", Thinking Machines Lab 2025, for no S; some terms of an expectation summed, the
      others sampled: Liu et al. 2019, arXiv:1810.04777, section 3; of KL: Amini et al. 2025, arXiv:2504.10637.
    """
    inputs = {"ids": ids, "log_q": fp32(logprobs), "own": fp32(own), "weights": fp32(weights), "used": weights != 0}
    inputs |= ce_inputs(targets, ce_weights, weights)
    size = real_size(vocabulary, projection)
    plan = Plan(Drawn(), size, chunk, dtype or hidden.dtype, softcap, layout=layout)
    return mixed_result(plan, (hidden, projection), None, inputs, ce_weights)


def _one_minus_exp(x: Array) -> Array:
    """1 - exp(x), without cancellation; 0 where rounding has put x above 0."""
    return -jnp.expm1(jnp.minimum(x, 0.0))


@dataclass(frozen=True)
class Stored:
    """Objective: the sum of mass * (log_q - log p) over stored tokens, and the same of the bucket if there is one."""

    temperature: float
    bucket: bool

    def __call__(
        self, logits: Array, teacher: Array | None, inputs: Inputs, vocabulary: Vocabulary
    ) -> tuple[Sums, Array]:
        T, ids, mass, weights = self.temperature, inputs["ids"], inputs["mass"], inputs["weights"]
        scaled = logits / T
        log_z = vocabulary.logsumexp(scaled)
        log_p = vocabulary.pick(scaled, ids) - log_z[:, None]
        loss = jnp.sum(jnp.where(mass != 0, mass * (inputs["log_q"] - log_p), 0.0), axis=-1)
        slopes = jnp.exp(scaled - log_z[:, None]) * (jnp.sum(mass, axis=-1) + inputs.get("tail", 0.0))[:, None]
        slots = vocabulary.slots(scaled, ids)
        if self.bucket:
            tail = inputs["tail"]
            # the student's own mass outside the k tokens, summed where it is, not as 1 minus the rest
            others = scaled.at[slots].set(LOWEST, mode="drop")
            log_rest = vocabulary.logsumexp(others)
            loss += jnp.where(tail > 0, tail * (jnp.log(tail) - log_rest + log_z), 0.0)
            slopes -= tail[:, None] * jnp.exp(others - log_rest[:, None])
        slopes = slopes.at[slots].add(-mass, mode="drop")
        kd, slopes = weighted(weights, T**2 * loss), weighted(weights, T * slopes)
        return add_cross_entropy(kd, slopes, logits, inputs, vocabulary)


@dataclass(frozen=True)
class Drawn:
    """Objective: p * (log p - log q) over stored tokens, and log p - log q of the student's draw outside of them."""

    def __call__(
        self, logits: Array, teacher: Array | None, inputs: Inputs, vocabulary: Vocabulary
    ) -> tuple[Sums, Array]:
        ids, drawn, weights = inputs["ids"], inputs["targets"], inputs["weights"]
        log_z = vocabulary.logsumexp(logits)
        log_p = vocabulary.pick(logits, ids) - log_z[:, None]
        terms = jnp.where(ids >= 0, jnp.exp(log_p) * (log_p - inputs["log_q"]), 0.0)
        rest = target_logit(logits, drawn, vocabulary) - log_z - inputs["own"]
        rest = jnp.where(jnp.any(ids == drawn[:, None], axis=-1), 0.0, rest)
        loss = jnp.sum(terms, axis=-1) + rest
        # grad p_i is p_i (e_i - p), grad log p_x is e_x - p
        slopes = -loss[:, None] * jnp.exp(logits - log_z[:, None])
        slopes = slopes.at[vocabulary.slots(logits, ids)].add(terms, mode="drop")
        slopes = slopes.at[vocabulary.slots(logits, drawn[:, None])].add(rest[:, None], mode="drop")
        return add_cross_entropy(weighted(weights, loss), weighted(weights, slopes), logits, inputs, vocabulary)
