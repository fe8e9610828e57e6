"""tools/bench_accelerator.py: every section runs with tiny shapes, and what fails costs its own rows alone."""

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers import load_tool

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bench():
    return load_tool("bench_accelerator")


def index(bench, call, *arguments):
    return next(i for i, job in enumerate(bench.JOBS) if job.call == call and job.arguments == arguments)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_section_runs_with_tiny_shapes(tmp_path):
    path = tmp_path / "rows.json"
    ran = subprocess.run(
        [sys.executable, "tools/bench_accelerator.py", "--tiny", "--seconds", "1400", "--json", str(path)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    rows = json.loads(path.read_text())
    failed = {row["name"]: row["failed"] for row in rows if "failed" in row}
    # without CUDA there are no kernels of Liger's; all else works on any machine
    assert failed == {name: "Liger's kernels need CUDA" for name in ("ce, Liger", "forward_kl, Liger")}, ran.stderr
    sections = {row["section"] for row in rows}
    assert sections == {"facts", "pipeline", "training", "decoding", "attention", "losses", "determinism"}
    found = {row["name"]: row for row in rows}
    assert found["Qwen3-0.6B, 4 rows, attention"]["ratio"] > 0 and found["Qwen3-0.6B, 64 x 256"]["ratio"] > 0
    assert all(row["error_of_fp32"] < 0.01 for row in rows if row["section"] == "attention")
    assert found["ce, ours"]["loss"] == pytest.approx(found["ce, whole logits"]["loss"], rel=1e-3)
    assert found["forward_kl, ours"]["loss"] == pytest.approx(found["forward_kl, whole logits"]["loss"], rel=1e-3)
    assert found["train.deterministic"]["same"] is True
    for row in rows:
        assert row["name"] in ran.stdout


def test_a_job_that_takes_too_long_or_dies_costs_its_own_row(bench, tmp_path, monkeypatch):
    """The first is stopped, the second is one that the child does not know, the third is measured all the same."""
    slow, last = index(bench, "kernels.attention"), index(bench, "serving.facts")
    unknown = dataclasses.replace(bench.JOBS[last], name="unknown")
    jobs = [dataclasses.replace(job, limit=0.0) if i == slow else job for i, job in enumerate(bench.JOBS)]
    monkeypatch.setattr(bench, "JOBS", [*jobs, unknown])
    monkeypatch.setattr(bench, "TINY_LIMIT", 100)
    wanted = [slow, len(jobs), last]
    rows = list(bench.measure(wanted, tmp_path, True, time.monotonic() + 500))
    assert [row["name"] for row in rows[:2]] == ["attention", "unknown"]
    assert rows[0]["failed"] == "stopped: it took longer than its limit"
    assert "its process died (1): IndexError" in rows[1]["failed"]
    assert len(rows) == 3 and "failed" not in rows[2] and "jax " in rows[2]["note"]


def test_what_there_is_no_time_for_is_named(bench, tmp_path):
    rows = list(bench.measure(range(len(bench.JOBS)), tmp_path, False, time.monotonic()))
    assert [row["name"] for row in rows] == [job.name for job in bench.JOBS]
    assert all("no time" in row["left_out"] for row in rows)


def test_a_missing_package_is_named(bench):
    common = sys.modules["accelerator.common"]
    missing = ModuleNotFoundError("No module named 'no_such_package.inside'", name="no_such_package.inside")
    assert common.short(missing) == "the package no_such_package is missing"
    serving = __import__("accelerator.serving", fromlist=["reason"])
    ran = subprocess.run(
        [sys.executable, "-c", "import no_such_package.inside"], capture_output=True, text=True
    )  # fmt: skip
    assert serving.reason(ran, ["export"]) == "the package no_such_package is missing"


def test_rows_are_compared_with_their_own_peers(bench):
    def row(section, name, **numbers):
        return {"section": section, "name": name} | numbers

    rows = [
        row("training", "A, 4 rows, full", tokens_per_second=30.0, planned_gib=9.0, peak_gib=10.0),
        row("training", "A, 4 rows, HF", tokens_per_second=10.0, peak_gib=5.0),
        row("training", "B, 1 rows, full", tokens_per_second=30.0),
        row("decoding", "A", tokens_per_second=8.0),
        row("decoding", "A, HF", tokens_per_second=4.0),
        row("losses", "ce, ours", ms=2.0),
        row("losses", "ce, Liger", ms=3.0),
        row("attention", "slow, no segments", ms=9.0),
        row("attention", "fast, no segments", ms=3.0),
        row("attention", "fast, 6 segments", ms=2.0),
        row("attention", "other, 6 segments", failed="it does not run here"),
    ]
    found = [r.get("ratio") for r in bench.table.with_ratios(rows)]
    assert found == [3.0, None, None, 2.0, None, 1.5, None, pytest.approx(1 / 3), 1.0, 1.5, None]
    assert bench.table.with_ratios(rows)[0]["planned_of_resident"] == pytest.approx(0.9)


def test_packed_rows_are_rows_of_segments(bench):
    rows = sys.modules["accelerator.common"].packed_rows(3, 512, 100, 6)
    for ids, positions, regions in zip(rows["segment_ids"], rows["positions"], rows["regions"], strict=True):
        assert sorted(set(ids.tolist())) == list(range(7)) and (ids[-6:] == 0).all()
        for segment in range(1, 7):
            own = ids == segment
            assert positions[own].tolist() == list(range(own.sum()))
        assert not regions[ids == 0].any() and set(regions.tolist()) == {0, 1, 2}
