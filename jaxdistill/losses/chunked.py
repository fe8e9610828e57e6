"""Losses from hidden states and vocabulary projections, whose logits never exist whole.

Dimension key: N tokens in one axis or two ([N] or [B, T]), E width, V vocabulary, C tokens of a chunk.

A loss returns (sum, count, metrics), never a mean: the caller divides once, for the whole global batch. What the
gradients are taken of is the sum; weights, targets, the teacher and the metrics are constants to it.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxdistill.losses.divergences import Divergence
from jaxdistill.losses.sweep import Head, Inputs, Plan, Sums, sweep
from jaxdistill.losses.vocabulary import Layout, Vocabulary

Result = tuple[Float[Array, ""], Float[Array, ""], dict[str, Float[Array, ""]]]
"""(sum, count, metrics), all fp32."""


def chunked_cross_entropy(
    hidden: Float[Array, "*N E"],
    projection: Float[Array, "V E"],
    targets: Int[Array, "*N"],
    weights: Float[Array, "*N"],
    *,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    vocabulary: int | None = None,
    dtype: DTypeLike | None = None,
    chunk: int | None = None,
    layout: Layout | None = None,
) -> Result:
    """Weighted sum of -log p(target), in nats; `sequence.cross_entropy` without its logits.

    Args:
      hidden: what the projection takes, after the final norm.
      targets: already shifted: the token that each position predicts.
      weights: 0 leaves a token out: it costs nothing, whatever it holds, NaN included.
      z_loss: adds z_loss * (log sum exp)**2, which keeps logits from drifting.
      label_smoothing: this share of the target's probability is spread evenly over the vocabulary.
      softcap: logits are softcap * tanh(logits / softcap).
      vocabulary: number of real tokens; columns beyond have probability 0. All are real by default.
      dtype: of the matrix products' inputs, summed in fp32; by default that of `hidden`.
      chunk: tokens projected at once on a device; by default as many as `sweep.CHUNK_BYTES` allows.
      layout: how the arrays lie on a mesh; hidden must have the two axes [B, T] then, if T is split.
    Returns:
      (sum, count, metrics): count is the sum of weights; `nll` is the sum without smoothing and z-loss, `hits` the
      weights of the tokens whose target has the highest logit. A weighted target that is no token makes the sum NaN.
    Raises:
      ValueError: arguments out of range, or shapes that the mesh does not divide.
    Sources: Kim & Rush 2016, arXiv:1606.07947, section 3.2; z-loss: PaLM, arXiv:2204.02311, section 5; smoothing:
      Szegedy et al. 2016, arXiv:1512.00567, section 7; softcap: Gemma 2, arXiv:2408.00118, section 2.
    """
    objective = CrossEntropy(z_loss, label_smoothing)
    plan = Plan(objective, real_size(vocabulary, projection), chunk, dtype or hidden.dtype, softcap, layout=layout)
    inputs = {"targets": targets, "ce_weights": fp32(weights), "used": weights != 0}
    sums = sweep(plan, (hidden, projection), None, jax.lax.stop_gradient(inputs))
    total = sums.pop("sum")
    return total, jnp.sum(fp32(weights)), {"nll": sums["nll"], "hits": sums["hits"]}


def chunked_distillation(
    student_hidden: Float[Array, "*N E"],
    student_projection: Float[Array, "V E"],
    teacher_hidden: Float[Array, "*N F"],
    teacher_projection: Float[Array, "U F"],
    weights: Float[Array, "*N"],
    *,
    divergence: str = "forward_kl",
    parameter: float | None = None,
    temperature: float = 1.0,
    targets: Int[Array, "*N"] | None = None,
    ce_weights: Float[Array, "*N"] | None = None,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    vocabulary: int | None = None,
    dtype: DTypeLike | None = None,
    chunk: int | None = None,
    layout: Layout | None = None,
) -> Result:
    """Weighted sum of a divergence between teacher and student, in nats times temperature**2.

    Both models are projected chunk by chunk; gradients flow to the student alone.

    Args:
      weights: of each token's divergence; 0 leaves it out.
      divergence, parameter: see `divergences.DIVERGENCES` and `divergences.PARAMETERS`.
      temperature: divides both logits; the sum carries temperature**2, so that gradients keep their scale.
      targets, ce_weights: if given, ce_weights * -log p(target) at temperature 1 is added, from the same logits.
        A mix has `weights = share * w` and `ce_weights = (1 - share) * w`. Targets alone give metrics.
      vocabulary: number of real tokens; must be given if the projections differ in their padded columns.
      The others are as for `chunked_cross_entropy`.
    Returns:
      (sum, count, metrics): count is the sum of all weights, `weights` and `ce_weights`, so that sum / count is the
      weighted mean of both losses. Metrics: `kd` (the divergence's share of the sum) and `kd_count`; with targets also
      `nll`, `hits` and `ce_count` weighted as the cross-entropy is (as the divergence, if there are no `ce_weights`),
      and `teacher_nll`, an alarm for a wrongly loaded teacher, weighted as the divergence is.
    Raises:
      ValueError: arguments out of range or that do not fit together; shapes that the mesh does not divide.
    Sources: Hinton et al. 2015, arXiv:1503.02531, section 2; those of the divergences are at their functions.
    """
    sizes = student_projection.shape[0], teacher_projection.shape[0]
    if vocabulary is None and sizes[0] != sizes[1]:
        raise ValueError(f"student and teacher project to {sizes[0]} and {sizes[1]} columns; give vocabulary=.")
    size = real_size(vocabulary, student_projection, teacher_projection)
    check_temperature(temperature)
    inputs = {"weights": fp32(weights), "used": weights != 0} | ce_inputs(targets, ce_weights, weights)
    objective = Distillation(Divergence.of(divergence, parameter), temperature, targets is not None)
    plan = Plan(objective, size, chunk, dtype or student_hidden.dtype, softcap, teacher_softcap, layout)
    student, teacher = (student_hidden, student_projection), (teacher_hidden, teacher_projection)
    return mixed_result(plan, student, teacher, inputs, ce_weights)


def mixed_result(plan: Plan, student: Head, teacher: Head | None, inputs: Inputs, ce_weights: Array | None) -> Result:
    """The sweep of a distillation loss that may have a cross-entropy beside it."""
    if ce_weights is not None:
        inputs["used"] |= ce_weights != 0
    sums = sweep(plan, student, *jax.lax.stop_gradient((teacher, inputs)))
    total, count = sums.pop("sum"), jnp.sum(inputs["weights"])
    sums["kd_count"] = count
    if "ce_weights" in inputs:
        sums["ce_count"] = jnp.sum(inputs["metric_weights"])
        count += jnp.sum(inputs["ce_weights"])
    return total, count, sums


def ce_inputs(targets: Array | None, ce_weights: Array | None, weights: Array) -> Inputs:
    """What the cross-entropy beside a distillation loss takes, if there is one."""
    if targets is None:
        if ce_weights is not None:
            raise ValueError("ce_weights are given without targets; give both, or neither.")
        return {}
    if ce_weights is None:
        return {"targets": targets, "ce_weights": jnp.zeros_like(fp32(weights)), "metric_weights": fp32(weights)}
    return {"targets": targets, "ce_weights": fp32(ce_weights), "metric_weights": fp32(ce_weights)}


def real_size(vocabulary: int | None, *projections: Array) -> int:
    """The number of real tokens; ValueError if a projection has fewer columns."""
    columns = min(p.shape[0] for p in projections)
    if vocabulary is not None and not 0 < vocabulary <= columns:
        raise ValueError(f"vocabulary is {vocabulary}, but there are {columns} columns; set 1..{columns}.")
    return vocabulary or columns


def check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; set it above 0.")


def fp32(x: Array) -> Array:
    return x.astype(jnp.float32)


def weighted(weights: Array, x: Array) -> Array:
    """weights * x where weights are not 0, and 0 elsewhere, be x NaN: [C] times [C] or [C, W]."""
    weights = weights.reshape(weights.shape + (1,) * (x.ndim - weights.ndim))
    return jnp.where(weights != 0, weights * x, 0.0)


@dataclass(frozen=True)
class CrossEntropy:
    """Objective: -log p(target), with smoothing and z-loss."""

    z_loss: float = 0.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if self.z_loss < 0:
            raise ValueError(f"z_loss is {self.z_loss}; set it to 0 or above.")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing is {self.label_smoothing}; set a share in 0..1, below 1.")

    def __call__(
        self, logits: Array, teacher: Array | None, inputs: Inputs, vocabulary: Vocabulary
    ) -> tuple[Sums, Array]:
        weights, targets = inputs["ce_weights"], inputs["targets"]
        smoothing, size = self.label_smoothing, vocabulary.size
        log_z, hits = vocabulary.normalizer(logits, targets)
        nll = log_z - target_logit(logits, targets, vocabulary)
        loss, z_slope = nll, jnp.ones_like(log_z)
        if smoothing:
            mean = vocabulary.total(vocabulary.drop_padding(logits, 0.0)) / size
            loss = (1 - smoothing) * nll + smoothing * (log_z - mean)
        if self.z_loss:
            loss, z_slope = loss + self.z_loss * jnp.square(log_z), 1 + 2 * self.z_loss * log_z
        slopes = jnp.exp(logits - log_z[:, None]) * z_slope[:, None]
        slopes -= jnp.where(vocabulary.columns(logits) == targets[:, None], 1 - smoothing, 0.0)
        if smoothing:
            slopes -= vocabulary.drop_padding(jnp.full_like(logits, smoothing / size), 0.0)
        measured = inputs.get("metric_weights", weights)
        values = {
            "sum": weighted(weights, loss),
            "nll": weighted(measured, nll),
            "hits": weighted(measured, fp32(hits)),
        }
        return values, weighted(weights, slopes)


def target_logit(logits: Array, targets: Array, vocabulary: Vocabulary) -> Array:
    """logits [C, W] at targets [C]; NaN at what is no token, rather than a loss that looks right."""
    real = (targets >= 0) & (targets < vocabulary.size)
    return jnp.where(real, vocabulary.pick(logits, targets[:, None])[:, 0], jnp.nan)


@dataclass(frozen=True)
class Distillation:
    """Objective: a divergence of both models' logits, and a cross-entropy if there are targets."""

    divergence: Divergence
    temperature: float
    targets: bool

    def __call__(
        self, logits: Array, teacher: Array | None, inputs: Inputs, vocabulary: Vocabulary
    ) -> tuple[Sums, Array]:
        assert teacher is not None
        T, weights = self.temperature, inputs["weights"]
        log_p = log_softmax(logits / T, vocabulary)
        log_q = log_softmax(teacher / T, vocabulary)
        terms, slopes = self.divergence(log_q, log_p, vocabulary.total)
        slopes = slopes - jnp.exp(log_p) * vocabulary.total(slopes)[:, None]
        loss = weighted(weights, T**2 * vocabulary.total(terms))
        values, slopes = add_cross_entropy(loss, weighted(weights, T * slopes), logits, inputs, vocabulary)
        if self.targets:
            nll = vocabulary.logsumexp(teacher) - target_logit(teacher, inputs["targets"], vocabulary)
            values["teacher_nll"] = weighted(weights, nll)
        return values, slopes


def log_softmax(logits: Array, vocabulary: Vocabulary) -> Array:
    return logits - vocabulary.logsumexp(logits)[:, None]


def add_cross_entropy(
    kd: Array, slopes: Array, logits: Array, inputs: Inputs, vocabulary: Vocabulary
) -> tuple[Sums, Array]:
    """The values and slopes of a distillation loss, with those of the cross-entropy beside it."""
    if "ce_weights" not in inputs:
        return {"sum": kd, "kd": kd}, slopes
    values, more = CrossEntropy()(logits, None, inputs, vocabulary)
    return values | {"sum": kd + values["sum"], "kd": kd}, slopes + more
