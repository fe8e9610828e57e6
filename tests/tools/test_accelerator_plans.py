"""tools/accelerator_plans.py: what it prints of results that are there, and what it says of those that are not."""

import json

import pytest

from tests.helpers import load_tool

FOUND = {
    "peak_bytes": 2e9, "workspace_bytes": 0.0, "outside_bytes": 3e9, "forward_kernels": 1.0, "cycles": 0.0,
    "moved": {"products": 4e9, "elementwise": 3e9}, "kernels": {"attention_forward": 28.0}, "unknown_loops": {},
    "offloaded_bytes": 0.0, "largest": [],
}  # fmt: skip


def test_results_are_printed_with_ratios(tmp_path, capsys):
    after, before = tmp_path / "after.json", tmp_path / "before.json"
    after.write_text(json.dumps({"h100:1 a": FOUND}))
    before.write_text(json.dumps({"h100:1 a": FOUND | {"peak_bytes": 4e9}}))
    assert load_tool("accelerator_plans").main([str(after), "--print", "--baseline", str(before)]) == 0
    text = capsys.readouterr().out
    assert "| h100:1 a | 2.00 (0.50x) | 1.86 | - | 3.0 (1.00x) | 1.0 (1.00x) | - |" in text
    assert "h100:1 a: products 4.0, elementwise 3.0 GB moved" in text


@pytest.mark.parametrize("call", [("none.json", "--print"), ("there.json", "--print", "--baseline", "none.json")])
def test_a_file_that_is_missing_is_said(tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"^none\.json: no such file; make it with: python tools/acc"):
        load_tool("accelerator_plans").main(list(call))
