"""Distillation between two tokenizers: probabilities are compared by rank, as their tokens are not the same ones.

Dimension key: N tokens in one axis or two ([N] or [B, T]), k stored probabilities, E width, V vocabulary, C tokens of a
chunk.

This is an approximation: it makes the student as sure as the teacher is, rank by rank, and says nothing of which tokens
the probabilities are of; those the cross-entropy beside it has to teach.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxdistill.losses.chunked import (
    Result,
    add_cross_entropy,
    ce_inputs,
    fp32,
    log_softmax,
    mixed_result,
    real_size,
    weighted,
)
from jaxdistill.losses.sweep import Inputs, Plan, Sums
from jaxdistill.losses.vocabulary import Layout, Vocabulary


def sorted_distillation(
    hidden: Float[Array, "*N E"],
    projection: Float[Array, "V E"],
    logprobs: Float[Array, "*N k"],
    tail: Float[Array, "*N"],
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
    """Weighted sum of |p_(i) - q_(i)| over the ranks i, an approximate divergence between different vocabularies.

    p_(i) is the student's i-th highest probability, q_(i) the teacher's. Ranks beyond k are one bucket, so that it is
    never above the sum over all ranks, and grows to it with k. It is in 0..2, and has no unit.

    Args:
      logprobs: the teacher's k highest log-probabilities, highest first; -inf is no mass.
      tail: the teacher's mass on all other tokens.
      weights: 0 leaves a token out: where the two texts have no boundary in common.
      The others, and what is returned, are as for `chunked_distillation`, without `teacher_nll`.
    Raises:
      ValueError: more probabilities than the student has tokens; arguments out of range; shapes that the mesh does not
        divide.
    Source: Universal Logit Distillation, Boizard et al. 2024, arXiv:2402.12030, section 3 (there, over all ranks, and
      with tokens paired by their index; here, paired by where their text begins).
    """
    size, k = real_size(vocabulary, projection), logprobs.shape[-1]
    if k > size:
        raise ValueError(f"{k} of the teacher's probabilities, and the student has {size} tokens; give fewer.")
    inputs = {"mass": jnp.exp(fp32(logprobs)), "tail": fp32(tail), "weights": fp32(weights), "used": weights != 0}
    inputs |= ce_inputs(targets, ce_weights, weights)
    plan = Plan(Ranks(k), size, chunk, dtype or hidden.dtype, softcap, layout=layout)
    return mixed_result(plan, (hidden, projection), None, inputs, ce_weights)


@dataclass(frozen=True)
class Ranks:
    """Objective: the sum of differences between the k highest probabilities, rank by rank, and between the rests."""

    k: int

    def __call__(
        self, logits: Array, teacher: Array | None, inputs: Inputs, vocabulary: Vocabulary
    ) -> tuple[Sums, Array]:
        mass, tail, weights = inputs["mass"], inputs["tail"], inputs["weights"]
        p = jnp.exp(log_softmax(logits, vocabulary))
        highest, ids = vocabulary.top(p, self.k)
        slots = vocabulary.slots(p, ids)
        rest = vocabulary.total(p.at[slots].set(0.0, mode="drop"))
        loss = jnp.sum(jnp.abs(highest - mass), axis=-1) + jnp.abs(rest - tail)
        # d loss / d p, column by column, is a sign; ranks change where it does not matter
        signs = jnp.broadcast_to(jnp.sign(rest - tail)[:, None], p.shape)
        signs = signs.at[slots].set(jnp.sign(highest - mass), mode="drop")
        slopes = p * (signs - vocabulary.total(p * signs)[:, None])
        return add_cross_entropy(weighted(weights, loss), weighted(weights, slopes), logits, inputs, vocabulary)
