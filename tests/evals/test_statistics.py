"""Intervals and paired tests against values computed by hand and by scipy."""

from __future__ import annotations

import math

import pytest

from jaxdistill.evals.statistics import accuracy, compare, sign_test, wilson


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
