"""Filters: each alone, then their order."""

from __future__ import annotations

import pytest

from jaxdistill.config import VerifyConfig
from jaxdistill.verify import Check, selection
from jaxdistill.verify.filters import ANSWER, FORM, TraceText, describe, measured
from jaxdistill.verify.texts import think_structure

GOOD = "<think>\n Ann=54\n</think>\nThe answer is \\boxed{54}."
RIGHT, WRONG, UNSURE = (Check(outcome, None, "", "") for outcome in ("correct", "incorrect", "undecided"))


def candidate(response=GOOD, check=RIGHT, *, sample=0, finish="stop", problem="p"):
    trace = TraceText(
        id=f"{problem}/{sample}", problem_id=problem, sample=sample, response=response, finish_reason=finish
    )
    return measured(describe(trace, check), {"loop": 0, "compression": 1.0, "refusals": 0})


def select(candidates, config):
    """The names of the filters that the candidates fall to."""
    return [rejection and rejection.name for rejection in selection.select(candidates, config)]


@pytest.mark.parametrize(
    ("response", "structure"),
    [
        (GOOD, "closed"),
        ("\n <think>a</think>b", "closed"),
        ("a</think>b", "closed"),
        ("<think></think>b", "empty"),
        ("<think>\n\n</think>\n\nb", "empty"),
        ("</think>b", "empty"),
        ("b", "absent"),
        ("", "broken"),
        ("  ", "broken"),
        ("<think>a", "broken"),
        ("<think>a</think>", "broken"),
        ("<think>a</think> \n", "broken"),
        ("x<think>a</think>b", "broken"),
        ("<think>a<think>b</think>c", "broken"),
        ("<think>a</think>b</think>c", "broken"),
        ("<think>a</think>b<think>c</think>d", "broken"),
        ("<think>a</think>b<think>c", "broken"),
    ],
)
def test_think_structure(response, structure):
    assert think_structure(response) == structure


@pytest.mark.parametrize(
    ("fallen", "settings", "name"),
    [
        (candidate(), {}, None),
        (candidate(finish="imported"), {}, None),
        (candidate(finish="error"), {}, "failed"),
        (candidate(finish="length"), {}, "truncated"),
        (candidate("no tags"), {}, "malformed"),
        (candidate("no tags"), {"think": "optional"}, None),
        (candidate("<think></think>a"), {}, "malformed"),
        (candidate("<think></think>a"), {"think": "optional"}, None),
        (candidate("<think>a"), {"think": "optional"}, "malformed"),
        (candidate(check=WRONG), {}, "incorrect"),
        (candidate(check=UNSURE), {}, "undecided"),
        (candidate(check=WRONG), {"answer": False}, None),
        (candidate(check=UNSURE), {"answer": False}, None),
    ],
)
def test_each_filter(fallen, settings, name):
    assert select([fallen], VerifyConfig(**settings)) == [name]


def test_the_first_filter_names_the_reason():
    worst = candidate("<think>a", WRONG, finish="error")
    fallen = [name for name, falls in (FORM | ANSWER).items() if falls(worst, VerifyConfig()) is not None]
    assert fallen == ["failed", "malformed", "incorrect"]
    assert select([worst], VerifyConfig()) == ["failed"]


def test_a_duplicate_is_one_of_a_kept_trace_of_the_same_problem():
    same = [
        candidate(sample=0, finish="length"),  # never kept, so it makes no duplicates
        candidate(sample=1),
        candidate(sample=2),
        candidate(GOOD + " ", sample=3),
        candidate(sample=0, problem="q"),
    ]
    assert select(same, VerifyConfig()) == ["truncated", None, "duplicate", None, None]
    assert select(same, VerifyConfig(drop_duplicates=False)) == ["truncated", None, None, None, None]


def test_the_lowest_sample_numbers_are_kept_whatever_the_order_of_the_files():
    traces = [candidate(f"<think>{n}</think>a", WRONG if n == 1 else RIGHT, sample=n) for n in (3, 0, 2, 1)]
    assert select(traces, VerifyConfig(keep_per_problem=2)) == ["surplus", None, None, "incorrect"]
    assert select(traces, VerifyConfig()) == [None, None, None, "incorrect"]


def test_a_surplus_is_counted_after_duplicates():
    traces = [candidate(sample=0), candidate(sample=1), candidate("<think>b</think>c", sample=2)]
    assert select(traces, VerifyConfig(keep_per_problem=2)) == [None, "duplicate", None]
