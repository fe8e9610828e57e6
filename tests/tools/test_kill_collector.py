"""tools/kill_collector.py in short, with a server that has no model; and it notices when something is wrong."""

import sys
from pathlib import Path

import pytest

from jaxdistill.records import RunDir, Trace, read_records, write_records
from tests.helpers import load_tool

ROOT = Path(__file__).parents[2]
FAKE = f"{{python}} {ROOT / 'tests' / 'traces' / 'fake_server.py'} {{port}} 0.2"


@pytest.fixture(scope="module")
def tool():
    return load_tool("kill_collector")


@pytest.mark.slow
def test_kills_of_collector_and_server_leave_no_trace(tool, tmp_path, monkeypatch, capsys):
    options = ["--samples", "800", "--kills", "6", "--server", FAKE, "--folder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["kill_collector.py", *options])
    assert tool.main() == 0
    out = capsys.readouterr().out
    assert "3 kills of the collector, 3 kills of the server" in out
    assert "800 of 800 responses are those of the undisturbed run" in out

    # a repeated line, a trace less and another prompt do not go unnoticed
    disturbed, undisturbed = RunDir(tmp_path / "disturbed"), RunDir(tmp_path / "undisturbed")
    journal = disturbed.traces / "journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join([*lines, lines[-1]]))
    traces = list(read_records(disturbed.traces, Trace))
    traces[5].prompt_ids.append(1)
    write_records(disturbed.traces / "traces.parquet", Trace, traces[:-1])
    found = tool.faults_of(disturbed, undisturbed, 800)
    assert [fault.split()[0] for fault in found] == ["799", "the", "demo-3:1/plain/1"]
