"""How sure a score is: intervals for one model, and paired comparisons of two models on the same problems.

Pure functions on plain numbers. With several samples a problem the responses are not independent of each other, so
everything here counts problems, not responses.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

Z95 = 1.959963984540054
"""Two-sided 95% quantile of the normal distribution."""


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """A share of correct responses with its 95% interval."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One model against another on the problems that both answered."""

    wins: int
    losses: int
    ties: int
    p: float
    """Two-sided p-value of "neither model is better"."""


def wilson(correct: float, total: float, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of a share: it stays inside [0, 1] and is sound for small counts and shares of 0 or 1.

    Args:
      correct: successes; need not be a whole number, so that an effective sample size can be given.
      total: trials; with none at all the interval is (0, 1), nothing is known.
    Raises:
      ValueError: not 0 <= correct <= total.
    Source: Wilson 1927; Brown, Cai and DasGupta 2001, section 3.1.1.
    """
    if not 0 <= correct <= total:
        raise ValueError(f"{correct} correct of {total}; give 0 <= correct <= total.")
    if total == 0:
        return 0.0, 1.0
    share = correct / total
    scale = 1 + z * z / total
    centre = (share + z * z / (2 * total)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    low = 0.0 if correct == 0 else max(0.0, centre - half)
    high = 1.0 if correct == total else min(1.0, centre + half)
    return low, high


def accuracy(outcomes: Mapping[str, Sequence[bool]]) -> Accuracy:
    """Mean accuracy over problems, with a 95% interval that knows which responses share a problem.

    With one sample a problem this is the plain Wilson interval. With more, the spread of the problems' own means gives
    an effective sample size (at most the number of responses), and Wilson's interval is taken at that size.

    Args:
      outcomes: problem id -> whether each of its responses was correct, at least one.
    Source: the clustered standard errors of Miller 2024, arXiv:2411.00640.
    """
    if not outcomes:
        return Accuracy(0.0, 0.0, 1.0)
    means = [sum(each) / len(each) for each in outcomes.values()]
    value = math.fsum(means) / len(means)
    responses = sum(len(each) for each in outcomes.values())
    variance = math.fsum((mean - value) ** 2 for mean in means) / len(means)
    if value in (0.0, 1.0):
        size = float(len(means))  # no spread to measure: take the cautious end
    elif responses == len(means):
        size = float(responses)
    else:
        size = min(float(responses), value * (1 - value) * len(means) / variance if variance else math.inf)
    low, high = wilson(value * size, size)
    return Accuracy(value, low, high)


def compare(ours: Mapping[str, Sequence[bool]], theirs: Mapping[str, Sequence[bool]]) -> Comparison:
    """Exact sign test on the problems that both maps hold; with one sample a problem it is the exact McNemar test.

    A problem is won by the model that answers a larger share of its samples correctly; ties tell nothing about which
    model is better and stay out of the test.

    Source: McNemar 1947; Dietterich 1998 recommends it for two classifiers on one test set.
    """
    wins = losses = ties = 0
    for problem in ours.keys() & theirs.keys():
        # cross-multiplied, so that 1 of 3 equals 2 of 6 exactly
        mine = sum(ours[problem]) * len(theirs[problem])
        other = sum(theirs[problem]) * len(ours[problem])
        wins += mine > other
        losses += mine < other
        ties += mine == other
    return Comparison(wins, losses, ties, sign_test(wins, losses))


def sign_test(wins: int, losses: int) -> float:
    """Two-sided exact binomial p-value of `wins` against `losses` at even odds; 1 where there are none of either."""
    n = wins + losses
    tail, term = 0, 1
    for k in range(min(wins, losses) + 1):
        tail += term
        term = term * (n - k) // (k + 1)
    return min(1.0, 2 * tail / 2**n)
