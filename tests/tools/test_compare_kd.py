"""tools/compare_kd.py trains students on the same rows, does nothing twice, and prints what it measured.

It is the way of stored distributions from end to end: captured in JAX, packed, and learned from.
"""

import json

import pytest

from tests.helpers import TINY, load_tool, tiny_config


@pytest.fixture(scope="module")
def tool():
    return load_tool("compare_kd")


def test_a_student_learns_from_stored_distributions_and_is_measured(tool, tmp_path, monkeypatch, capsys):
    config = tiny_config(
        tmp_path,
        traces={"engine": "import", "teacher": "demo", "logprobs": 6, "scorer": "jax"},
        data={"row_tokens": 160, "topk": 4},
        student=TINY["student"] | {"tokenizer": "demo"},
        train=TINY["train"] | {"steps": 4, "distill": {"source": "stored", "weight": 2.0, "final_weight": 0.5}},
    )
    call = [str(config), "--seeds", "1", "--points", "1", "--problems", "4"]
    monkeypatch.setattr(tool, "STUDENTS", ("kd",))
    assert tool.main(call) == 0
    printed = capsys.readouterr().out
    assert "4 likeliest tokens of the teacher beside 100.00% of the response tokens, 15 bytes each" in printed
    found = json.loads((tmp_path / "run" / "compare_kd.json").read_text())
    assert list(found["kd"][0]) == ["4"]
    assert printed.rstrip().splitlines()[-2].split() == ["step", "kd"]
    run = tmp_path / "run" / "compare" / "kd-0"
    last = json.loads((run / "checkpoints" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["kd"] > 0 and last["loss"] == pytest.approx(last["ce"] + 0.75 * last["kd"], rel=0.2)
    # what is done is not done again; another weight is another training
    assert tool.main(call) == 0
    assert "train:" not in capsys.readouterr().out
    (run / tool.DONE).unlink()
    with pytest.raises(ValueError, match=r"train\.distill\.weight: 2\.0 -> 3\.0"):
        tool.main([*call, "--set", "train.distill.weight=3"])


def test_the_table_has_every_seed_and_their_mean(tool):
    found = {"plain": [{100: 0.25, 200: 0.5}, {100: 0.75, 200: 1.0}], "kd": [{100: 0.5, 200: 1.0}] * 2}
    lines = tool.table(found, 8).splitlines()
    assert lines[1].split() == ["step", "plain", "kd"]
    assert lines[2].split() == ["100", "50.0", "(25.0,", "75.0)", "50.0", "(50.0,", "50.0)"]


def test_without_a_teacher_there_is_nothing_to_compare(tool, tmp_path):
    with pytest.raises(ValueError, match="nothing to compare"):
        tool.main([str(tiny_config(tmp_path))])
