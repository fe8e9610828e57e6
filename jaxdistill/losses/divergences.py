"""Divergences between a teacher's and a student's next-token distributions, column by column.

Dimension key: C tokens, W columns of the vocabulary (those that this device holds).

Every function takes the log-probabilities of teacher and student, fp32 [C, W], and `total`, which sums [C, W] over the
whole vocabulary. It returns (terms, slopes), both [C, W]: the divergence of a token is the total of its terms, in nats,
and slope = d divergence / d student log-probability, from which the gradient by the student's logits follows as
slope - p * total(slope), p being the student's probabilities. A multiple of p in the slope changes nothing; it is
chosen so that with identical inputs slopes, like terms, are exactly 0 everywhere.

Directions: forward KL is KL(teacher || student), reverse KL is KL(student || teacher).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

Total = Callable[[jax.Array], jax.Array]
Terms = tuple[jax.Array, jax.Array]


def forward_kl(teacher: jax.Array, student: jax.Array, total: Total, _: float) -> Terms:
    """KL(teacher || student): the student covers what the teacher does. Hinton et al. 2015, arXiv:1503.02531."""
    q = jnp.exp(teacher)
    return q * (teacher - student), jnp.exp(student) - q


def reverse_kl(teacher: jax.Array, student: jax.Array, total: Total, _: float) -> Terms:
    """KL(student || teacher): the student avoids what the teacher would not do. MiniLLM, arXiv:2306.08543."""
    terms = jnp.exp(student) * (student - teacher)
    return terms, terms


def jsd(teacher: jax.Array, student: jax.Array, total: Total, beta: float) -> Terms:
    """beta * KL(teacher || m) + (1 - beta) * KL(student || m), where m = beta * teacher + (1 - beta) * student.

    Divided by beta it tends to the forward KL as beta -> 0; divided by 1 - beta, to the reverse KL as beta -> 1. It is
    not special-cased there, as some libraries do, so it is continuous, and 0 at both ends.
    Source: GKD, Agarwal et al. 2023, arXiv:2306.13649, section 2.
    """
    gap = student - teacher
    mixed = _log_mixture(gap, 1 - beta)
    p = jnp.exp(student)
    return (1 - beta) * p * (gap - mixed) - beta * jnp.exp(teacher) * mixed, (1 - beta) * p * (gap - mixed)


def total_variation(teacher: jax.Array, student: jax.Array, total: Total, _: float) -> Terms:
    """Half the sum of |teacher - student|, in 0..1. f-distill, Wen et al. 2023, arXiv:2307.15190."""
    p, q = jnp.exp(student), jnp.exp(teacher)
    return 0.5 * jnp.abs(p - q), 0.5 * jnp.sign(p - q) * p


def skew_kl(teacher: jax.Array, student: jax.Array, total: Total, alpha: float) -> Terms:
    """KL(teacher || alpha * teacher + (1 - alpha) * student), at most -log(alpha).

    Source: DistiLLM, Ko et al. 2024, arXiv:2402.03898, section 3.1.
    """
    mixed = _log_mixture(student - teacher, 1 - alpha)  # log(m / teacher)
    return -jnp.exp(teacher) * mixed, (1 - alpha) * (jnp.exp(student) - jnp.exp(student - mixed))


def skew_reverse_kl(teacher: jax.Array, student: jax.Array, total: Total, alpha: float) -> Terms:
    """KL(student || alpha * student + (1 - alpha) * teacher), at most -log(alpha).

    Source: DistiLLM, Ko et al. 2024, arXiv:2402.03898, section 3.1.
    """
    gap = student - teacher
    excess = gap - _log_mixture(gap, alpha)  # log(student / m)
    p = jnp.exp(student)
    return p * excess, p * (excess - alpha * jnp.expm1(excess))


def adaptive_kl(teacher: jax.Array, student: jax.Array, total: Total, mu: float) -> Terms:
    """Forward and reverse KL, weighted token by token by where the two distributions differ.

    The head is the fewest tokens that hold the teacher's mass `mu`, its likeliest first; tokens of equal probability
    enter together. The forward KL, which fits heads first, weighs sum |teacher - student| over the head, the reverse
    KL, which fits tails first, that over the rest; the weights sum to 1 and are constants to the gradient.
    Source: AKL, Wu et al. 2024, arXiv:2404.02657.
    """
    p, q = jnp.exp(student), jnp.exp(teacher)
    apart = jnp.abs(q - p)
    head = total(jnp.where(_head(q, total, mu), apart, 0.0))
    everything = total(apart)
    share = jnp.where(everything > 0, head / jnp.where(everything > 0, everything, 1.0), 0.5)[:, None]
    forward, forward_slope = forward_kl(teacher, student, total, 0.0)
    reverse, reverse_slope = reverse_kl(teacher, student, total, 0.0)
    return (
        share * forward + (1 - share) * reverse,
        share * forward_slope + (1 - share) * reverse_slope,
    )


def _log_mixture(gap: jax.Array, share: float) -> jax.Array:
    """log((1 - share) + share * exp(gap)): exactly 0 at gap = 0, and finite at any gap."""
    below = jnp.log1p(share * jnp.expm1(jnp.minimum(gap, 0.0)))
    above = gap + jnp.log1p((1 - share) * jnp.expm1(-jnp.maximum(gap, 0.0)))
    return jnp.where(gap > 0, above, below)


def _head(q: jax.Array, total: Total, mu: float) -> jax.Array:
    """The fewest, likeliest columns that hold a mass of `mu`: bool [C, W].

    A column is in it if less than `mu` lies above. The threshold is found by bisection over the floats themselves, as
    sorting a vocabulary is slow, and would gather one that is spread over devices.
    """
    bits = jax.lax.bitcast_convert_type(q, jnp.int32)  # floats >= 0 are ordered as their bits are
    low = jnp.zeros(q.shape[:1], jnp.int32)
    high = jnp.full(q.shape[:1], 0x40000000, jnp.int32)  # 2.0: nothing lies above

    def halve(_: jax.Array, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        enough = total(jnp.where(bits > middle[:, None], q, 0.0)) < mu
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    _, high = jax.lax.fori_loop(0, 31, halve, (low, high))
    return bits >= high[:, None]


DIVERGENCES: dict[str, Callable[[jax.Array, jax.Array, Total, float], Terms]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "total_variation": total_variation,
    "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "adaptive_kl": adaptive_kl,
}
PARAMETERS = {"jsd": 0.5, "skew_kl": 0.1, "skew_reverse_kl": 0.1, "adaptive_kl": 0.5}
"""The divergences with a parameter (beta, alpha, alpha, mu, each strictly between 0 and 1), and its default."""


@dataclass(frozen=True)
class Divergence:
    """A divergence with its parameter: `Divergence.of("jsd", 0.3)`.

    Raises (by `of`):
      ValueError: an unknown name; a parameter not strictly between 0 and 1, or one where none is taken.
    """

    name: str
    parameter: float

    @classmethod
    def of(cls, name: str, parameter: float | None = None) -> Divergence:
        if name not in DIVERGENCES:
            raise ValueError(f"divergence {name!r} is unknown; choose one of {', '.join(DIVERGENCES)}.")
        if name not in PARAMETERS:
            if parameter is not None:
                raise ValueError(f"divergence {name} takes no parameter, got {parameter}; leave it out.")
            return cls(name, 0.0)
        parameter = PARAMETERS[name] if parameter is None else parameter
        if not 0 < parameter < 1:
            raise ValueError(
                f"divergence {name}: the parameter is {parameter}; set it strictly between 0 and 1 "
                "(for the ends there are forward_kl and reverse_kl)."
            )
        return cls(name, parameter)

    def __call__(self, teacher: jax.Array, student: jax.Array, total: Total) -> Terms:
        return DIVERGENCES[self.name](teacher, student, total, self.parameter)
