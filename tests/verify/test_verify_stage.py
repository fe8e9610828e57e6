"""The verify stage on small run directories."""

from __future__ import annotations

import pytest

from jaxdistill import config as configs
from jaxdistill.records import Problem, RunDir, Trace, Verdict, read_records, split_response, write_records
from jaxdistill.verify.stage import verify


def make_config(**settings):
    return configs.build(
        {
            "name": "test",
            "run_dir": "runs/test",
            "problems": {"source": "demo", "count": 3},
            "traces": {"engine": "import"},
            "verify": settings,
            "data": {"row_tokens": 64},
            "student": {"init": "some/model"},
            "train": {"batch_rows": 2, "steps": 1, "optimizer": {"learning_rate": 1e-3}},
        }
    )


def problem(name, answer):
    return Problem(id=name, prompt="How many?", answer=answer, domain="math", source="test:1")


def trace(problem_id, sample, response, finish_reason="stop"):
    thinking, content = split_response(response)
    return Trace(
        id=f"{problem_id}/plain/{sample}",
        problem_id=problem_id,
        style="plain",
        sample=sample,
        engine="jax",
        teacher="demo",
        revision="1",
        temperature=1.0,
        top_p=1.0,
        max_tokens=64,
        seed=0,
        prompt_ids=[1, 2],
        output_ids=[3, 4],
        response=response,
        thinking=thinking,
        content=content,
        finish_reason=finish_reason,
        error="out of memory" if finish_reason == "error" else None,
    )


def answer(n, thinking=" Ann=54"):
    return f"<think>\n{thinking}\n</think>\nThe answer is \\boxed{{{n}}}."


def write_run(folder, problems, *shards):
    run = RunDir(folder)
    write_records(run.problems / "problems.parquet", Problem, problems)
    for i, traces in enumerate(shards):
        write_records(run.traces / f"part-{i:05}.parquet", Trace, traces)
    return run


PROBLEMS = [problem("a", "54"), problem("b", "7"), problem("c", None)]
SHARDS = (
    [
        trace("a", 0, answer(54)),
        trace("a", 1, answer(54)),
        trace("a", 2, answer(54, "otherwise")),
        trace("a", 3, answer(55)),
        trace("a", 4, answer(54) + " I should", "length"),
        trace("a", 5, "", "error"),
    ],
    [
        trace("b", 0, r"\boxed{7}"),
        trace("b", 1, answer("7 or 8")),
        trace("b", 2, answer(8)),
        trace("c", 0, answer(9)),
        trace("d", 0, answer(9)),
    ],
)


def test_every_trace_has_a_verdict_in_the_order_of_the_traces(tmp_path):
    run = write_run(tmp_path, PROBLEMS, *SHARDS)
    verify(make_config(keep_per_problem=1), run)
    verdicts = list(read_records(run.verdicts, Verdict))
    assert [v.trace_id for v in verdicts] == [t.id for shard in SHARDS for t in shard]
    found = [(v.outcome, v.reason, v.extracted, v.rejected_for) for v in verdicts]
    assert found == [
        ("correct", "equal", "54", None),
        ("correct", "equal", "54", "duplicate"),
        ("correct", "equal", "54", "surplus"),
        ("incorrect", "different", "55", "incorrect"),
        ("undecided", "truncated", None, "truncated"),
        ("undecided", "no response", None, "failed"),
        ("correct", "equal", "7", "malformed"),
        ("undecided", "hedged", "7 or 8", "undecided"),
        ("incorrect", "different", "8", "incorrect"),
        ("undecided", "no gold answer", None, "undecided"),
        ("undecided", "unknown problem", None, "undecided"),
    ]
    assert [v.kept for v in verdicts] == [v.rejected_for is None for v in verdicts]
    assert verdicts[0].method == "integer"


def test_counts_are_the_waterfall(tmp_path, capsys):
    run = write_run(tmp_path, PROBLEMS, *SHARDS)
    counts = verify(make_config(keep_per_problem=1), run)
    domains = counts.pop("domains")
    assert domains["math"] == {"traces": 10, "finished": 8, "well_formed": 7, "correct": 3, "unique": 2, "kept": 1}
    assert domains["unknown"] == {"traces": 1, "finished": 1, "well_formed": 1, "correct": 0, "unique": 0, "kept": 0}
    assert counts.pop("reasons")["undecided"] == {"hedged": 1, "no gold answer": 1, "unknown problem": 1}
    assert counts == {
        "traces": 11,
        "finished": 9,
        "well_formed": 8,
        "correct": 3,
        "unique": 2,
        "kept": 1,
        "rejected": {
            "failed": 1,
            "truncated": 1,
            "malformed": 1,
            "incorrect": 2,
            "undecided": 3,
            "duplicate": 1,
            "surplus": 1,
        },
        "outcomes": {"correct": 4, "incorrect": 2, "undecided": 5},
        "undecided": {"truncated": 1, "no response": 1, "hedged": 1, "no gold answer": 1, "unknown problem": 1},
        "unknown_problems": 1,
        "problems": 3,
        "problems_with_a_kept_trace": 1,
    }
    assert sum(counts["rejected"].values()) + counts["kept"] == counts["traces"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "  11 traces of 3 problems"
    assert lines[1] == "  generated           11  100.0%"
    assert lines[2] == "  finished             9   81.8%  - 1 failed, 1 truncated"
    assert lines[-3].split() == ["math", "10", "8", "7", "3", "2", "1"]
    assert lines[-1] == "  problems with a kept trace: 1"


def test_without_answers_only_the_form_counts(tmp_path, capsys):
    run = write_run(tmp_path, [problem("c", None)], [trace("c", 0, answer(9)), trace("c", 1, "no tags")])
    counts = verify(make_config(answer=False), run)
    assert (counts["kept"], counts["rejected"]) == (1, {"malformed": 1})
    assert counts["outcomes"] == {"correct": 0, "incorrect": 0, "undecided": 2}
    assert "  correct" not in capsys.readouterr().out


def test_no_gold_answer_at_all_is_refused_before_anything_is_written(tmp_path):
    run = write_run(tmp_path, [problem("c", None), problem("d", " ")], [trace("c", 0, answer(9))])
    with pytest.raises(ValueError, match=r"no problem has a gold answer; name it with problems\.answer_field"):
        verify(make_config(), run)
    assert not run.verdicts.exists()


def test_traces_of_other_problems_are_refused(tmp_path):
    run = write_run(tmp_path, PROBLEMS, [trace("x", 0, answer(9))])
    with pytest.raises(ValueError, match="no trace belongs to a problem"):
        verify(make_config(), run)


def test_no_traces_give_no_verdicts(tmp_path):
    run = write_run(tmp_path, PROBLEMS, [])
    assert verify(make_config(), run)["kept"] == 0
    assert list(read_records(run.verdicts, Verdict)) == []


def test_missing_traces_name_the_stage_to_run(tmp_path):
    run = write_run(tmp_path, PROBLEMS)
    with pytest.raises(ValueError, match="run the stage that makes them first"):
        verify(make_config(), run)


def test_a_second_run_gives_the_same_file_and_clears_what_a_killed_one_left(tmp_path):
    run = write_run(tmp_path, PROBLEMS, *SHARDS)
    first = verify(make_config(), run)
    written = (run.verdicts / "verdicts.parquet").read_bytes()
    left = run.verdicts / ".verdicts.parquet.4242.tmp"
    left.write_bytes(b"half a file")
    assert verify(make_config(), run) == first
    assert sorted(f.name for f in run.verdicts.iterdir()) == ["cache", "verdicts.parquet"]
    assert (run.verdicts / "verdicts.parquet").read_bytes() == written


def test_a_thousand_traces_take_well_under_a_second(tmp_path, cpu_seconds):
    traces = [trace("a", n, answer(54, " ".join(f"step {(n + 1) * k}" for k in range(200)))) for n in range(1000)]
    run = write_run(tmp_path, PROBLEMS, traces)
    counts = []
    taken = cpu_seconds(lambda: counts.append(verify(make_config(), run)))
    assert counts[0]["kept"] == 1000
    assert taken < 2.0
