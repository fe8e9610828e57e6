"""tools/memory.py runs, measures, and fails when a ratio is too large."""

import sys

import jax
import pytest

from jaxdistill.models import load_hf, params_of
from tests.helpers import load_tool


@pytest.fixture(scope="module")
def memory():
    return load_tool("memory")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_a_small_model_is_measured(memory, tmp_path, monkeypatch, capsys):
    memory.make_checkpoint(tmp_path / "in", memory.SMALL, 1 << 18)
    assert len(list((tmp_path / "in").glob("*.safetensors"))) > 1
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params_of(load_hf(tmp_path / "in"))))
    name = "export fp32 to bf16"
    monkeypatch.setattr(memory, "CASES", {name: memory.CASES[name]})
    for limit, code in ((1e9, 0), (1e-9, 1)):
        assert memory.report(tmp_path / "in", limit) == code
        row = next(line for line in capsys.readouterr().out.splitlines() if name in line)
        device, idle, peak, ratio, verdict, _ = row.removeprefix(f"  {name}").replace(",", "").split()
        assert float(device) == round(4 * parameters / 1e6, 1)
        assert 50 < float(idle) < float(peak) < 2000  # MB
        assert float(ratio) > 1  # what is idle outweighs a small model
        assert verdict == ("yes" if code == 0 else "NO")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_the_check_of_a_small_model_is_measured(memory, tmp_path, monkeypatch, capsys):
    memory.make_checkpoint(tmp_path, memory.SMALL, 1 << 18)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params_of(load_hf(tmp_path))))
    names = "check, bf16 parameters", "both sides whole"
    monkeypatch.setattr(memory, "CHECKS", {name: memory.CHECKS[name] for name in names})
    assert memory.report_checks(tmp_path, 1e9) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"all {4 * parameters / 1e6:,.1f} MB" in lines[1]
    for name, copies in zip(names, (2, 0), strict=True):
        row = next(line for line in lines if line.startswith(f"  {name}"))
        device, idle, peak, beside, _, _ = row.removeprefix(f"  {name}").replace(",", "").split()
        assert float(device) == round(copies * parameters / 1e6, 1)
        assert 100 < float(idle) < float(peak) < 4000  # MB
        assert float(beside) == pytest.approx(float(peak) - float(idle) - float(device), abs=2)
