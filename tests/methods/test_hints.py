"""Rationalization: what shows the hint is left out, and what is left is learned without it."""

import dataclasses

import pytest

from jaxdistill.config import StarConfig
from jaxdistill.methods.hints import REJECTED, hinted, shows_hint, write_rationalized
from jaxdistill.records import Problem, RunDir, Trace, Verdict, read_manifest, read_records
from tests.data.made import make_trace, write_run

HINT = StarConfig().hint
PROBLEM = Problem(
    id="p", prompt="Ann has 12 pens. Bob has 3 more. How many has Bob?", answer="15", domain="math", source="test"
)


def trace(thinking: str, content: str = "The answer is \\boxed{15}.") -> Trace:
    return make_trace("p/plain/0", "p", 0, f"<think>\n{thinking}\n</think>\n{content}")


@pytest.mark.parametrize(
    "thinking",
    [
        " Ann=12\n Bob=12+3=15",
        "Bob has three more than Ann.\nSo 12+3, which is 15. The correct answer is 15.",
        "First I look at Ann: she has 12.\nTo get the answer, add 3.\nThat gives 15.",
        "12+3=15",
    ],
)
def test_honest_reasoning_passes(thinking):
    assert shows_hint(trace(thinking), PROBLEM, HINT) is None


@pytest.mark.parametrize(
    ("thinking", "reason"),
    [
        ("The hint says 15.\n12+3=15", "says 'hint'"),
        ("We know that the answer is 15.\nSo 12+3.", "says 'know that the answer'"),
        ("The given answer must fit.\n12+3=15", "says 'given answer'"),
        ("Now, hint, the answer is 15\n12+3", "says 'hint'"),
        (" Bob=15\n Ann=12", "begins with the answer"),
    ],
)
def test_reasoning_that_shows_the_hint_is_found(thinking, reason):
    assert shows_hint(trace(thinking), PROBLEM, HINT) == reason


def test_words_of_ones_own_hint_may_not_be_repeated():
    hint = "{problem} (A bird whispered to me: {answer}.)"
    assert (
        shows_hint(trace("Ann has 12.\nA bird whispered to me 15."), PROBLEM, hint)
        == "repeats 'a bird whispered to me'"
    )
    # the problem's own words are no sign
    assert shows_hint(trace("Ann has 12 pens. Bob has 3 more.\n15"), PROBLEM, hint) is None


def test_a_problem_about_hints_is_no_leak():
    problem = dataclasses.replace(PROBLEM, prompt="A game has 12 hints. 3 more hint cards come. How many?")
    assert shows_hint(trace("12 hint cards and 3\n15"), problem, HINT) is None


def test_the_hint_is_in_the_question_and_not_in_what_is_learned(tmp_path):
    samples = [
        ("p", "math", trace(" Ann=12\n Bob=12+3=15").response, True),
        ("q", "math", trace("The hint says 15.\n 12+3").response, True),
        ("r", "math", trace(" Ann=9", "\\boxed{9}").response, False),
    ]
    asked = write_run(tmp_path / "asked", samples)
    problems = [dataclasses.replace(PROBLEM, id=name) for name in "pqr"]
    assert "Hint: the answer is 15." in hinted(problems[0], HINT)
    target = RunDir(tmp_path / "rationalized")
    counts = write_rationalized(StarConfig(), problems, asked, target)
    assert counts == {"traces": 3, "correct": 2, REJECTED: 1, "kept": 1}
    assert [p.prompt for p in read_records(target.problems, Problem)] == [PROBLEM.prompt] * 3
    verdicts = {v.problem_id: v for v in read_records(target.verdicts, Verdict)}
    assert verdicts["p"].kept
    assert (verdicts["q"].rejected_for, verdicts["q"].detail) == (REJECTED, "says 'hint'")
    assert verdicts["r"].rejected_for == "incorrect"
    assert {t.id for t in read_records(target.traces, Trace)} == {f"{name}/rationalized/0" for name in "pqr"}
    # done before: left as it is
    stamp = (target.verdicts / "manifest.json").stat().st_mtime_ns
    assert write_rationalized(StarConfig(), problems, asked, target) == counts
    assert (target.verdicts / "manifest.json").stat().st_mtime_ns == stamp
    assert read_manifest(target.verdicts)["stage"] == "verify"
