"""The verify stage on small run directories."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxdistill import config as configs
from jaxdistill import pipeline
from jaxdistill.evals import facts, samples
from jaxdistill.records import (
    Problem,
    RunDir,
    Trace,
    Verdict,
    read_records,
    schema_of,
    split_response,
    write_manifest,
    write_records,
)
from jaxdistill.verify import pool
from jaxdistill.verify.stage import verify
from tests.helpers import tiny_config

ROOT = Path(__file__).parents[2]


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
    assert lines[-4].split() == ["math", "10", "8", "7", "3", "2", "1"]
    assert lines[-2] == "  problems with a kept trace: 1"
    assert lines[-1].startswith("  what was rejected, and why: jaxdistill show ")


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


# --------------------------------------------------------------------------------- only what is new is looked at


@pytest.fixture
def asked(monkeypatch):
    """Tasks and numbers of items that processes were asked for."""
    found = []
    submit = pool.Pool.submit

    def count(self, task, items):
        found.append((task, len(items)))
        return submit(self, task, items)

    monkeypatch.setattr(pool.Pool, "submit", count)
    return found


def verdict_bytes(run):
    return (run.verdicts / "verdicts.parquet").read_bytes()


def test_only_new_traces_are_judged_and_the_verdicts_are_those_of_a_run_from_nothing(tmp_path, asked, capsys):
    whole = write_run(tmp_path / "whole", PROBLEMS, *SHARDS)
    counts = verify(make_config(), whole)
    assert asked == [("check", 7), ("measure", 8)]  # the malformed one needs no measures
    asked.clear()
    run = write_run(tmp_path / "run", PROBLEMS, SHARDS[0])
    verify(make_config(), run)
    assert asked == [("check", 4), ("measure", 4)]
    asked.clear()
    write_run(tmp_path / "run", PROBLEMS, *SHARDS)
    capsys.readouterr()
    assert verify(make_config(), run) == counts
    assert asked == [("check", 3), ("measure", 4)]
    assert "8 results were known from before" in capsys.readouterr().out
    assert verdict_bytes(run) == verdict_bytes(whole)


def test_another_selection_judges_nothing_anew(tmp_path, asked):
    run = write_run(tmp_path / "run", PROBLEMS, *SHARDS)
    verify(make_config(), run)
    asked.clear()
    verify(make_config(keep_per_problem=1, pass_rate=[0.1, 1.0], filters={"max_loop": 5}), run)
    assert asked == []
    verify(make_config(filters={"max_steps": 3}), run)
    assert asked == [("measure", 8)]
    problems = [replace(PROBLEMS[0], answer="55"), *PROBLEMS[1:]]
    write_records(run.problems / "problems.parquet", Problem, problems)
    asked.clear()
    assert verify(make_config(filters={"max_steps": 3}), run)["outcomes"]["correct"] == 2
    assert asked == [("check", 4)]


KILLED = """
import os, signal, sys
from pathlib import Path
from jaxdistill.config import load
from jaxdistill.records import RunDir
from jaxdistill.verify import examine, pool, stage, store
flush, left = store.Store.flush, int(sys.argv[3])
def killing(self):
    global left
    flush(self)
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
store.Store.flush = killing
examine.BATCH_TRACES, examine.CHUNK, pool.CHUNK = 2, 1, 1
stage.verify(load(sys.argv[1]), RunDir(Path(sys.argv[2])))
"""


def test_a_run_that_was_killed_goes_on_and_ends_the_same(tmp_path):
    whole = write_run(tmp_path / "whole", PROBLEMS, *SHARDS)
    verify(make_config(), whole)
    run = write_run(tmp_path / "run", PROBLEMS, *SHARDS)
    (tmp_path / "config.yaml").write_text(json.dumps(configs.to_dict(make_config(workers=1))))
    sizes = []
    for flushes in (3, 7):
        command = [sys.executable, "-c", KILLED, str(tmp_path / "config.yaml"), str(run.root), str(flushes)]
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120)
        assert ran.returncode == -signal.SIGKILL, ran.stderr
        assert not (run.verdicts / "verdicts.parquet").exists()
        sizes.append((run.verdicts / "cache" / "checks.jsonl").stat().st_size)
    assert 40 < sizes[0] < sizes[1]
    verify(make_config(), run)
    assert verdict_bytes(run) == verdict_bytes(whole)


def test_redo_keeps_what_was_found_and_replaces_the_rest(tmp_path, asked):
    config = tiny_config(tmp_path, traces={"engine": "import"})
    for command in ("generate", "verify"):
        pipeline.run_command(command, configs.load(config))
    run = RunDir(tmp_path / "run")
    before = verdict_bytes(run)
    changed = configs.load(config, ["verify.keep_per_problem=1"])
    with pytest.raises(ValueError, match="made with another config"):
        pipeline.run_command("verify", changed)
    asked.clear()
    pipeline.redo("verify", changed)
    assert [f.name for f in run.verdicts.iterdir()] == ["cache"]
    pipeline.run_command("verify", changed)
    assert asked == [] and verdict_bytes(run) == before
    pipeline.redo("generate", changed)
    assert not run.traces.exists() and [f.name for f in run.verdicts.iterdir()] == ["cache"]


# -------------------------------------------------------------------------------------------------- bad input


def test_malformed_records_have_verdicts_with_reasons(tmp_path):
    run = write_run(tmp_path, [*PROBLEMS, replace(problem("e", "1"), domain="")], [trace("e", 0, answer(1))])
    good = asdict(trace("a", 0, answer(54)))
    rows = [
        good,
        good | {"id": "a/plain/1", "response": None},
        good | {"id": None, "sample": 1},
        good | {"id": "a/plain/2", "problem_id": None},
        good | {"id": "a/plain/3", "finish_reason": "abort"},
        good | {"id": "a/plain/4", "sample": None},
        good,
        good | {"id": "a/plain/5", "sample": 5, "response": ""},
    ]
    schema = schema_of(Trace)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), run.traces / "bad.parquet")
    counts = verify(make_config(), run)
    verdicts = list(read_records(run.verdicts, Verdict))
    assert [(v.trace_id, v.reason, v.rejected_for) for v in verdicts] == [
        ("a/plain/0", "equal", None),
        ("a/plain/1", "malformed record: no response", "unreadable"),
        ("row 3", "malformed record: no id", "unreadable"),
        ("a/plain/2", "malformed record: no problem_id", "unreadable"),
        ("a/plain/3", "malformed record: finish_reason is 'abort'", "unreadable"),
        ("a/plain/4", "malformed record: no sample", "unreadable"),
        ("a/plain/0", "malformed record: the id is there twice", "unreadable"),
        ("a/plain/5", "no answer found", "malformed"),
        ("e/plain/0", "equal", None),
    ]
    assert counts["rejected"] == {"unreadable": 6, "malformed": 1}
    assert set(counts["domains"]) == {"math", "unknown"}
    assert sum(each["traces"] for each in counts["domains"].values()) == counts["traces"] == 9
    for folder in (run.traces, run.verdicts):  # and the report can be made
        write_manifest(folder, stage="", config={}, config_hash="", inputs={}, counts=counts)
    found = facts.read_yield(run)
    assert found is not None and found.rejected == {"unreadable": 6, "malformed": 1}
    assert [example.title for example in samples.rejected_traces(run)] == ["a/plain/5"]


def test_a_file_that_is_not_whole_is_named(tmp_path):
    run = write_run(tmp_path, PROBLEMS, *SHARDS)
    (run.traces / "part-00001.parquet").write_bytes(b"half a file")
    with pytest.raises(ValueError, match=r"part-00001.parquet: not a whole Parquet file"):
        verify(make_config(), run)


# --------------------------------------------------------------------------------------------- the whole set


def test_majority_contamination_and_duplicates_of_problems_in_one_run(tmp_path, capsys):
    (tmp_path / "benchmark.jsonl").write_text('{"question": "How many legs do nine spiders have in all then?"}\n')
    texts = {"a": "How many legs do nine spiders have in all then?", "b": "What is one plus one, my friend?"}
    problems = [replace(problem(name, "54"), prompt=text) for name, text in texts.items()]
    problems += [replace(problem("c", "54"), prompt=texts["b"] + "!"), replace(problem("d", None), prompt="Why?")]
    traces = [trace(name, 0, answer(54, name)) for name in "abc"]
    traces += [trace("d", n, answer(n // 3, f"try {n}")) for n in range(4)]
    run = write_run(tmp_path, problems, traces)
    config = make_config(
        majority={},
        decontaminate={"files": {"spiders": str(tmp_path / "benchmark.jsonl")}, "ngram": 8},
        near_duplicate_problems=0.8,
    )
    counts = verify(config, run)
    verdicts = {v.trace_id: v for v in read_records(run.verdicts, Verdict)}
    assert {name: v.rejected_for for name, v in verdicts.items()} == {
        "a/plain/0": "contaminated",
        "b/plain/0": None,
        "c/plain/0": "duplicate_problem",
        "d/plain/0": None,
        "d/plain/1": None,
        "d/plain/2": None,
        "d/plain/3": "incorrect",
    }
    assert verdicts["a/plain/0"].detail.startswith("spiders row 1, 100% of the n-grams: how many legs")
    assert (verdicts["d/plain/0"].reason, verdicts["d/plain/0"].method) == ("with 3 of 4 traces", "majority")
    assert verdicts["d/plain/0"].pass_rate == 0.75
    assert counts["contaminated"]["problems"] == {"spiders": 1}
    assert "1 of 4 problems stand in spiders" in capsys.readouterr().out
    written = verdict_bytes(run)
    verify(config, run)
    assert verdict_bytes(run) == written
