"""Intervals and paired tests against values computed by hand and by scipy."""

from __future__ import annotations

import math

import pytest

from jaxdistill.evals.statistics import (
    accuracy,
    best_of,
    bootstrap,
    bootstrap_seeds,
    compare,
    majority,
    majority_at_k,
    paired_difference,
    pass_at_k,
    sign_test,
    wilson,
)


def test_wilson_by_hand():
    # 8 of 10 with z = 2: scale 1.4, centre (0.8 + 0.2) / 1.4, half 2 / 1.4 * sqrt(0.016 + 0.01)
    low, high = wilson(8, 10, z=2.0)
    assert low == pytest.approx(1 / 1.4 - 2 / 1.4 * math.sqrt(0.026), abs=1e-12)
    assert high == pytest.approx(1 / 1.4 + 2 / 1.4 * math.sqrt(0.026), abs=1e-12)


@pytest.mark.parametrize(("correct", "total"), [(0, 1), (1, 1), (0, 20), (20, 20), (1, 3), (81, 263), (431, 500)])
def test_wilson_matches_scipy(correct, total):
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(correct, total).proportion_ci(0.95, method="wilson")
    assert wilson(correct, total) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_at_the_ends():
    # 0 of n: the upper end is z**2 / (n + z**2); all of n mirrors it
    upper = 1.959963984540054**2 / (20 + 1.959963984540054**2)
    assert wilson(0, 20) == (0.0, pytest.approx(upper, abs=1e-12))
    assert wilson(20, 20) == (pytest.approx(1 - upper, abs=1e-12), 1.0)
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("correct", "total"), [(-1, 5), (6, 5), (0, -1)])
def test_wilson_refuses_impossible_counts(correct, total):
    with pytest.raises(ValueError, match="correct of"):
        wilson(correct, total)


def test_one_sample_a_problem_is_plain_wilson():
    outcomes = {str(i): [i < 30] for i in range(40)}
    found = accuracy(outcomes)
    assert (found.value, found.low, found.high) == (0.75, *wilson(30, 40))


def test_samples_that_repeat_each_other_add_nothing():
    once = accuracy({str(i): [i < 30] for i in range(40)})
    eight_times = accuracy({str(i): [i < 30] * 8 for i in range(40)})
    assert (eight_times.low, eight_times.high) == pytest.approx((once.low, once.high), abs=1e-12)


def test_samples_that_differ_within_a_problem_narrow_the_interval_but_never_below_independence():
    mixed = accuracy({str(i): [True, False, i % 2 == 0, True] for i in range(40)})
    independent = wilson(mixed.value * 160, 160)
    one = wilson(mixed.value * 40, 40)
    assert independent[0] >= mixed.low > one[0] and independent[1] <= mixed.high < one[1]
    same_everywhere = accuracy({str(i): [True, False] for i in range(40)})
    assert (same_everywhere.low, same_everywhere.high) == wilson(40, 80)


def test_all_correct_counts_problems_not_responses():
    found = accuracy({str(i): [True] * 8 for i in range(10)})
    assert (found.value, found.low, found.high) == (1.0, *wilson(10, 10))


def test_no_problems_is_no_knowledge():
    found = accuracy({})
    assert (found.low, found.high) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("wins", "losses", "p"),
    [(0, 0, 1.0), (1, 0, 1.0), (3, 3, 1.0), (5, 0, 2 / 32), (0, 5, 2 / 32), (8, 2, 2 * (1 + 10 + 45) / 1024)],
)
def test_sign_test_by_hand(wins, losses, p):
    assert sign_test(wins, losses) == pytest.approx(p, abs=1e-15)


@pytest.mark.parametrize(("wins", "losses"), [(1, 12), (59, 6), (103, 97), (900, 1100)])
def test_sign_test_matches_scipy(wins, losses):
    stats = pytest.importorskip("scipy.stats")
    assert sign_test(wins, losses) == pytest.approx(stats.binomtest(wins, wins + losses, 0.5).pvalue, rel=1e-9)


def test_sign_test_of_very_many_does_not_overflow():
    assert sign_test(20_000, 1_000) == 0.0  # smaller than the smallest float


def test_compare_pairs_by_problem():
    ours = {"a": [True], "b": [True], "c": [False], "d": [True], "only ours": [True]}
    theirs = {"a": [False], "b": [True], "c": [True], "d": [False], "only theirs": [True]}
    found = compare(ours, theirs)
    assert (found.wins, found.losses, found.ties) == (2, 1, 1)
    assert found.p == 1.0
    back = compare(theirs, ours)
    assert (back.wins, back.losses, back.p) == (1, 2, found.p)


def test_compare_with_unequal_sample_counts():
    found = compare({"a": [True, False, False], "b": [True, True]}, {"a": [True, True, False] * 2, "b": [True]})
    assert (found.wins, found.losses, found.ties) == (0, 1, 1)


def test_a_model_against_itself_is_all_ties():
    scores = {str(i): [i % 3 == 0] for i in range(50)}
    found = compare(scores, scores)
    assert (found.wins, found.losses, found.ties, found.p) == (0, 0, 50, 1.0)


# ------------------------------------------------------------------------------------------- several samples


@pytest.mark.parametrize(
    ("n", "correct", "k", "expected"),
    [
        (5, 2, 1, 2 / 5),
        (5, 2, 2, 1 - 3 / 10),  # C(3, 2) = 3 of C(5, 2) = 10 pairs hold no correct one
        (5, 2, 4, 1.0),
        (4, 0, 4, 0.0),
        (10, 1, 5, 0.5),
        (200, 3, 100, 1 - (100 * 99 * 98) / (200 * 199 * 198)),
    ],
)
def test_pass_at_k_by_hand(n, correct, k, expected):
    assert pass_at_k(n, correct, k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_is_unbiased():
    """Over all outcomes of n draws with chance p, its mean is 1 - (1 - p)^k; the plug-in estimate's is not."""
    n, k, p = 6, 3, 0.3
    weights = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    mean = sum(w * pass_at_k(n, c, k) for c, w in enumerate(weights))
    assert mean == pytest.approx(1 - (1 - p) ** k, abs=1e-12)
    plug_in = sum(w * (1 - (1 - c / n) ** k) for c, w in enumerate(weights))
    assert abs(plug_in - mean) > 0.01


def test_pass_at_k_refuses_what_cannot_be_estimated():
    with pytest.raises(ValueError, match="pass@4 of 3 samples"):
        pass_at_k(3, 1, 4)
    with pytest.raises(ValueError, match="4 correct of 3"):
        pass_at_k(3, 4, 1)


def test_majority_by_hand():
    assert majority(["7", "7", "8"], [True, True, False]) == 1.0
    assert majority(["7", "8", "8"], [True, False, False]) == 0.0
    assert majority(["7", "8"], [True, False]) == 0.5, "a tie is broken by chance"
    assert majority([None, None, "7"], [False, False, True]) == 1.0, "no answer is no vote"
    assert majority([None], [False]) == 0.0
    # of three pairs, {7, 7} is right, and two are ties
    assert majority_at_k(["7", "7", "8"], [True, True, False], 2) == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert majority_at_k(["7", "7", "8"], [True, True, False], 1) == pytest.approx(2 / 3)
    many = [str(i % 2) for i in range(20)]
    drawn = majority_at_k(many, [v == "1" for v in many], 10)
    assert drawn == majority_at_k(many, [v == "1" for v in many], 10) and 0.3 < drawn < 0.7


def test_best_of_by_hand():
    assert best_of([-1.0, -0.5, -2.0], [False, True, False]) == 1.0
    assert best_of([-0.5, -0.5], [False, True]) == 0.5


def test_a_bootstrap_of_ones_and_zeros_has_the_binomials_width():
    """The percentile interval of a mean of zeros and ones is the binomial's quantiles over n, but for noise."""
    stats = pytest.importorskip("scipy.stats")
    values = [float(i < 60) for i in range(200)]
    found = bootstrap(values)
    exact = stats.binom(200, 0.3).ppf([0.025, 0.975]) / 200
    assert found.value == pytest.approx(0.3)
    assert (found.low, found.high) == pytest.approx(tuple(exact), abs=0.0101)
    assert bootstrap(values) == found
    assert (bootstrap([1.0] * 20).low, bootstrap([1.0] * 20).high) == wilson(20, 20)
    assert (bootstrap([]).low, bootstrap([]).high) == (0.0, 1.0)


def test_pairing_takes_out_what_the_problems_have_in_common():
    ours = {str(i): float(i % 2) for i in range(100)}
    theirs = {str(i): float(i % 2 and i > 20) for i in range(100)} | {"other": 1.0}
    gap = paired_difference(ours, theirs)
    assert gap.problems == 100 and gap.value == pytest.approx(0.1)
    assert 0 < gap.low < 0.1 < gap.high < 0.2
    assert paired_difference({"a": 1.0}, {"b": 1.0}).problems == 0


def test_seeds_that_differ_widen_the_interval():
    np = pytest.importorskip("numpy")
    same = np.tile(np.array([1.0, 0.0] * 50), (3, 1))
    mean, low, high = bootstrap_seeds(same)
    assert mean == 0.5 and (low, high) == pytest.approx((0.4, 0.6), abs=0.011)
    apart = np.stack([np.ones(100), np.zeros(100), np.tile([1.0, 0.0], 50)])
    assert bootstrap_seeds(apart)[1:] == pytest.approx((0.0, 1.0), abs=0.2)
