"""tools/check_plan.py: the plan for CPU devices against what really happens on them."""

import os
import re

import pytest

from tests.helpers import load_tool


@pytest.mark.slow
@pytest.mark.skipif("JAXDISTILL_LONG" not in os.environ, reason="minutes alone on the machine: set JAXDISTILL_LONG=1")
def test_memory_and_flops_are_as_planned(capsys):
    tool = load_tool("check_plan")
    assert tool.main(["--repeat", "1"]) == 0
    assert len(re.findall(r" 1\.0000$", capsys.readouterr().out, re.MULTILINE)) == len(tool.CASES)


def test_flops_are_those_that_the_profiler_counts(monkeypatch):
    tool = load_tool("check_plan")
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
    # rows so long that attention goes block by block, in loops whose length only the data says
    case = ("fsdp=4,tensor=2", 1152, small, {"batch_rows": 4, "remat": "full"})
    monkeypatch.setitem(tool.CASES, "tiny", case)
    found, runs = tool.compare("tiny", repeat=1)
    assert 8 * found.flops == pytest.approx(runs[0].flops, rel=0.01)
    assert found.flops == pytest.approx(found.analytic_flops, rel=0.01)
    assert not found.unknown_loops
    assert runs[0].loss > 0
