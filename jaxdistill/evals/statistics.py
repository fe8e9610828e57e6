"""How sure a score is: intervals for one model, and paired comparisons of two models on the same problems.

Pure functions on plain numbers. With several samples a problem the responses are not independent of each other, so
everything here counts problems, not responses.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

Z95 = 1.959963984540054
"""Two-sided 95% quantile of the normal distribution."""
RESAMPLES = 4000
"""Of a bootstrap; its own error is then far below the interval's width."""


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """A share of correct responses with its 95% interval."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Difference:
    """A mean difference of two models over the problems that both answered, with its 95% interval."""

    value: float
    low: float
    high: float
    problems: int


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


# ------------------------------------------------------------------------------------------- several samples


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Chance that at least one of `k` samples is correct, estimated without bias from `correct` of `n` samples.

    It is 1 - C(n - correct, k) / C(n, k): of all ways to pick k of the n samples, the share that picks a correct one.

    Raises:
      ValueError: not 0 <= correct <= n, or not 1 <= k <= n.
    Source: Chen et al. 2021, arXiv:2107.03374, equation 1.
    """
    if not 0 <= correct <= n:
        raise ValueError(f"{correct} correct of {n}; give 0 <= correct <= n.")
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {n} samples cannot be estimated; draw at least k samples.")
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def majority(votes: Sequence[str | None], correct: Sequence[bool]) -> float:
    """Chance that the answer with most votes is correct; samples without an answer do not vote.

    Among answers with equally many votes each is taken with the same chance. A vote's group is correct if any of its
    samples is: two spellings of one answer are one vote only if the caller has made them equal.

    Args:
      votes: the answer of each sample, None where there is none.
      correct: whether each sample is correct.
    Source: self-consistency, Wang et al. 2022, arXiv:2203.11171.
    """
    counts: dict[str, int] = {}
    right: dict[str, bool] = {}
    for vote, good in zip(votes, correct, strict=True):
        if vote is not None:
            counts[vote] = counts.get(vote, 0) + 1
            right[vote] = right.get(vote, False) or good
    if not counts:
        return 0.0
    most = max(counts.values())
    leaders = [vote for vote, count in counts.items() if count == most]
    return sum(right[vote] for vote in leaders) / len(leaders)


def majority_at_k(votes: Sequence[str | None], correct: Sequence[bool], k: int, *, most: int = 200) -> float:
    """`majority` of k of the samples, averaged over all ways to pick them, or over `most` drawn ones if there are more.

    Raises:
      ValueError: not 1 <= k <= number of samples.
    """
    n = len(votes)
    if not 1 <= k <= n:
        raise ValueError(f"maj@{k} of {n} samples cannot be estimated; draw at least k samples.")
    if math.comb(n, k) <= most:
        picks: list[Sequence[int]] = list(itertools.combinations(range(n), k))
    else:
        random = np.random.default_rng(0)
        picks = [random.choice(n, size=k, replace=False).tolist() for _ in range(most)]
    return math.fsum(majority([votes[i] for i in pick], [correct[i] for i in pick]) for pick in picks) / len(picks)


def best_of(scores: Sequence[float], correct: Sequence[bool]) -> float:
    """Chance that the sample with the highest score is correct; equal scores are taken with equal chances."""
    top = max(scores)
    chosen = [good for score, good in zip(scores, correct, strict=True) if score == top]
    return sum(chosen) / len(chosen)


# ----------------------------------------------------------------------------------------------- bootstraps


def bootstrap(values: Sequence[float], *, resamples: int = RESAMPLES, seed: int = 0) -> Accuracy:
    """Mean of a value a problem in 0..1, with the 95% percentile interval of resampled problems.

    Where all problems have the same value, resampling cannot say how sure the mean is, and where that value is 0 or 1
    the interval is Wilson's.

    Source: Efron and Tibshirani 1993, chapter 13.
    """
    found = np.asarray(values, dtype=np.float64)
    if not len(found):
        return Accuracy(0.0, 0.0, 1.0)
    value = float(found.mean())
    if np.all(found == found[0]) and value in (0.0, 1.0):
        return Accuracy(value, *wilson(value * len(found), len(found)))
    low, high = _percentiles(lambda random: found[random.integers(len(found), size=len(found))].mean(), resamples, seed)
    return Accuracy(value, low, high)


def paired_difference(
    ours: Mapping[str, float], theirs: Mapping[str, float], *, resamples: int = RESAMPLES, seed: int = 0
) -> Difference:
    """Mean of ours minus theirs over the problems of both, with the 95% interval of resampled problems."""
    shared = [problem for problem in ours if problem in theirs]
    if not shared:
        return Difference(0.0, -1.0, 1.0, 0)
    found = np.array([ours[problem] - theirs[problem] for problem in shared])
    low, high = _percentiles(lambda random: found[random.integers(len(found), size=len(found))].mean(), resamples, seed)
    return Difference(float(found.mean()), low, high, len(shared))


def bootstrap_seeds(values: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float, float]:
    """Mean of values [seeds, problems], with the 95% interval when both seeds and problems are drawn anew.

    Every seed is a training of its own on all the problems, so rows and columns are resampled, each as a whole. With
    one seed the interval says nothing about how another training would have come out.

    Source: the crossed bootstrap, Owen 2007, "The pigeonhole bootstrap", Annals of Applied Statistics 1(2).
    """
    seeds, problems = values.shape

    def draw(random: np.random.Generator) -> float:
        rows = values[random.integers(seeds, size=seeds)].mean(0)
        return rows[random.integers(problems, size=problems)].mean()

    return float(values.mean()), *_percentiles(draw, resamples, seed)


def _percentiles(draw: Callable[[np.random.Generator], float], resamples: int, seed: int) -> tuple[float, float]:
    random = np.random.default_rng(seed)
    means = [draw(random) for _ in range(resamples)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
