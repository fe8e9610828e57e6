"""tools/memory_traces.py runs, measures, and fails when memory grows by more than its limit."""

import sys

import pytest

from tests.helpers import load_tool


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_few_and_many_samples_are_collected_and_measured(monkeypatch, capsys):
    memory = load_tool("memory_traces")
    name = "the same with top-4 logprobs"
    monkeypatch.setattr(memory, "CASES", {name: memory.CASES[name]})
    with memory.running_server() as url:
        assert memory.report(url, 200, 600, -1e9) == 1  # no growth is so small
    row = capsys.readouterr().out.splitlines()[-1]
    idle, few, many, growth, _, _, verdict, *_ = row.removeprefix(f"  {name}").replace(",", "").split()
    assert 50 < float(idle) < float(few) < 2000  # MB
    # a sample with its logprobs takes 10,000 bytes, were it held
    assert float(many) - float(few) < 20
    assert float(growth) == pytest.approx((float(many) - float(few)) * 1e6 / 400, abs=500)
    assert verdict == "NO"
