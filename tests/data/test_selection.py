"""Which traces are learned from (`data.take`), and in which form (`data.edit`)."""

from __future__ import annotations

import pytest

from jaxdistill.config import EditConfig, TakeConfig
from jaxdistill.data.selection import VerdictText, donors, edited, limited, wants
from jaxdistill.records import RunDir, Trace, split_response, write_records


def verdict(name: str, rejected_for: str | None, problem: str = "p") -> VerdictText:
    outcome = {None: "correct", "duplicate": "correct", "incorrect": "incorrect"}.get(rejected_for, "undecided")
    return VerdictText(name, problem, outcome, rejected_for is None, rejected_for)


def trace(name: str, response: str) -> Trace:
    thinking, content = split_response(response)
    return Trace(
        id=name, problem_id=name.split("/")[0], style="plain", sample=0, engine="import", teacher="", revision="",
        temperature=0.0, top_p=1.0, max_tokens=0, seed=0, prompt_ids=[], output_ids=[], response=response,
        thinking=thinking, content=content, finish_reason="imported",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("take", "taken"),
    [
        ("kept", [None]),
        ("unverified", [None, "incorrect", "undecided"]),
        ("incorrect", ["incorrect"]),
    ],
)
def test_what_a_verdict_must_say(take, taken):
    reasons = [None, "truncated", "malformed", "incorrect", "undecided", "duplicate", "surplus"]
    assert [r for r in reasons if wants(verdict("a", r), TakeConfig(verdicts=take))] == taken


def test_so_many_a_problem(tmp_path):
    verdicts = [verdict(f"{p}/plain/{s}", None if s != 1 else "incorrect", p) for p in "ab" for s in (10, 0, 1, 2)]
    run = RunDir(tmp_path)
    assert limited(run, TakeConfig(), verdicts) is None
    found = limited(run, TakeConfig(per_problem=2), verdicts)
    assert found == {"a/plain/0", "a/plain/2", "b/plain/0", "b/plain/2"}


def test_the_shortest_and_the_longest(tmp_path):
    run = RunDir(tmp_path)
    traces = [trace("a/0", "x" * 9), trace("a/1", "x" * 3), trace("b/0", "x"), trace("c/0", "xy"), trace("c/1", "xyz")]
    write_records(run.traces / "traces.parquet", Trace, traces)
    verdicts = [verdict(t.id, None, t.problem_id) for t in traces]
    assert limited(run, TakeConfig(length="shortest"), verdicts) == {"a/1", "c/0"}, "b has no choice"
    assert limited(run, TakeConfig(length="longest"), verdicts) == {"a/0", "c/1"}
    with pytest.raises(ValueError, match="no problem has two"):
        limited(run, TakeConfig(length="longest"), verdicts[2:3])


def test_inserted_steps_come_from_other_traces(tmp_path):
    responses = {f"t{i}": f"<think>\n s{i}a\n s{i}b\n</think>\n{i}" for i in range(3)}
    write_records(tmp_path / "traces.parquet", Trace, [trace(n, r) for n, r in responses.items()])
    edit = EditConfig(kind="inserted_steps", rate=1.0)
    steps = donors([(tmp_path, {"t0", "t1"})], edit)
    assert steps == [("t0", " s0a"), ("t0", " s0b"), ("t1", " s1a"), ("t1", " s1b")]
    response, content = edited("t0", responses["t0"], "0", edit, steps)
    assert content == "0" and "s0" not in response and response.count(" s1") == 2
    assert donors([(tmp_path, {"t0"})], EditConfig(kind="shuffled_steps")) == []
    assert edited("t0", "x", "y", None, []) == ("x", "y")


def test_a_wrong_answer_is_also_the_content(tmp_path):
    response, content = edited(
        "t", "<think>\n a=5\n</think>\nIt is 5.", "It is 5.", EditConfig(kind="wrong_answer"), []
    )
    assert content == response.rpartition("</think>\n")[2] != "It is 5."
