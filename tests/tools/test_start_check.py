"""tools/start_check.py runs, measures, and plans what the files hold."""

import sys

import pytest

from jaxdistill.models.tensor_files import open_tensors
from tests.helpers import load_tool


@pytest.fixture(scope="module")
def tool():
    sys.path.insert(0, str(load_tool("memory").ROOT / "tools"))  # where it finds its neighbour, as a script does
    yield load_tool("start_check")
    sys.path.pop(0)


def test_what_is_planned_is_what_the_files_hold(tool, tmp_path, capsys):
    load_tool("memory").make_checkpoint(tmp_path, tool.SMALL, 1 << 18)
    count = {name: tensor.shape for name, tensor in open_tensors(tmp_path).items()}
    total = sum(rows * (columns[0] if columns else 1) for rows, *columns in count.values())
    layer = sum(rows * (columns[0] if columns else 1) for name, (rows, *columns) in count.items() if ".0." in name)
    found = tool.planned(tool.SMALL)
    assert (found["weights"], found["layer"]) == (2 * total, 4 * layer)
    assert found["logits"] == 4 * 2 * 64 * 512
    assert found["read"] == 2 * 2 * (2 * layer + 512 * 112)
    assert found["held"] < found["weights"] + 3 * found["logits"]
    assert tool.plan(["Qwen3-0.6B"]) == 0 and tool.plan(["nothing"]) == 1
    said = capsys.readouterr()
    assert said.out.splitlines()[-1].split()[:2] == ["Qwen3-0.6B", "1.2"] and "nothing is not known" in said.err


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_a_small_model_is_measured(tool, tmp_path, capsys):
    tool.report(tmp_path, tool.SMALL)
    rows = {row.split()[0]: row.replace(",", "").split()[1:] for row in capsys.readouterr().out.splitlines()[-2:]}
    assert rows.keys() == {"files", "model"}
    for name, (model, idle, beside, seconds, again) in rows.items():
        assert (float(model) > 0) == (name == "model")
        assert 100 < float(idle) < 4000 and 0 < float(beside) < 2000  # MB
        assert float(again) < float(seconds)
