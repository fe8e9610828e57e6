"""tools/compare_kd.py trains both students on the same rows, goes on where it was, and prints what it measured.

It is the way of stored distributions from end to end: captured in JAX, packed, and learned from.
"""

import importlib.util
import json
from pathlib import Path

import pytest

from jaxdistill.parallel import processes
from tests.helpers import TINY, tiny_config

TOOL = Path(__file__).parents[2] / "tools" / "compare_kd.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("compare_kd", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_comparison_is_stopped_gone_on_with_and_printed(tool, tmp_path, monkeypatch, capsys):
    config = tiny_config(
        tmp_path,
        traces={"engine": "import", "teacher": "demo", "logprobs": 6, "scorer": "jax"},
        data={"row_tokens": 160, "topk": 4},
        student=TINY["student"] | {"tokenizer": "demo"},
        train=TINY["train"] | {"steps": 8, "distill": {"source": "stored", "weight": 2.0, "final_weight": 0.5}},
    )
    call = [str(config), "--seeds", "1", "--points", "1", "--problems", "4"]
    monkeypatch.setattr(tool, "STUDENTS", ("kd", "plain"))
    stops = [3]
    monkeypatch.setattr(
        processes.StopSignal, "requested", lambda self, step: bool(stops) and step == stops[0] and bool(stops.pop())
    )
    assert tool.main(call) == processes.STOPPED
    assert tool.main(call) == 0
    printed = capsys.readouterr().out
    assert "4 likeliest tokens of the teacher beside 100.00% of the response tokens, 15 bytes each" in printed
    assert "going on from the checkpoint at step 3 of 8" in printed
    found = json.loads((tmp_path / "run" / "compare_kd.json").read_text())
    assert [list(runs[0]) for runs in found.values()] == [["8"], ["8"]]
    assert printed.rstrip().splitlines()[-2].split() == ["step", "kd", "plain"]
    first = tmp_path / "run" / "compare" / "kd-0"
    lines = (first / "checkpoints" / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    assert last["kd"] > 0 and last["loss"] == pytest.approx(last["ce"] + 0.5 * last["kd"], rel=0.2)
    plain = json.loads((tmp_path / "run/compare/plain-0/checkpoints/metrics.jsonl").read_text().splitlines()[-1])
    assert "kd" not in plain
    # another teacher's distributions, or another weight, are another training
    (first / tool.DONE).unlink()
    with pytest.raises(ValueError, match=r"train\.distill\.weight: 2\.0 -> 3\.0"):
        tool.main([*call, "--set", "train.distill.weight=3"])


def test_without_a_teacher_there_is_nothing_to_compare(tool, tmp_path):
    with pytest.raises(ValueError, match="nothing to compare"):
        tool.main([str(tiny_config(tmp_path))])
