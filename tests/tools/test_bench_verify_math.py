"""tools/bench_verify_math.py: its reports on few examples, and hostile answers that stay bounded."""

import json
import random
import sys
from pathlib import Path

import pytest

from jaxdistill.verify import MathPool, check_math
from jaxdistill.verify.pool import GAVE_UP
from tests.helpers import load_tool

TOOL = Path(__file__).parents[2] / "tools" / "bench_verify_math.py"


@pytest.fixture(scope="module")
def bench():
    return load_tool("bench_verify_math")


def test_every_hostile_answer_is_bounded_and_none_is_correct(bench):
    answers = bench.hostile_answers()
    assert len(answers) == 1000
    pairs = [(rf"\boxed{{{answer}}}", r"\sqrt{2}") for answer in answers[::5] if len(answer) < 10_000]
    with MathPool(1) as pool:
        checks = pool.check(pairs)
    assert GAVE_UP not in checks and all(check.outcome != "correct" for check in checks)
    assert checks == [check_math(*pair) for pair in pairs]
    assert bench.rate(lambda pair: check_math(*pair), pairs)["max"] < 2000  # ms; about 10


def test_one_digit_off_is_one_digit_off(bench):
    rng = random.Random(0)
    for answer in ("18", "1,234", "-0.5", "7"):
        other = bench.one_digit_off(answer, rng)
        assert len(other) == len(answer) and sum(a != b for a, b in zip(answer, other, strict=True)) == 1


def test_the_table_and_gsm8k_are_reported(bench, tmp_path, capsys, monkeypatch):
    rows = [json.dumps({"answer": f"{n} + {n} = <<{n}+{n}={2 * n}>>{2 * n}\n#### {2 * n}"}) for n in range(1, 11)]
    (tmp_path / "gsm8k").mkdir()
    for name in ("train", "test"):
        (tmp_path / "gsm8k" / f"{name}.jsonl").write_text("\n".join(rows))
    monkeypatch.setattr(bench, "PERTURBED", 10)
    monkeypatch.setattr(sys, "argv", [str(TOOL), "--data", str(tmp_path), "--skip", "hostile"])
    assert bench.main() == 0
    printed = capsys.readouterr().out
    assert "precision 100.00%" in printed
    assert "20 of 20 solutions correct; with one digit changed: {'incorrect': 10}" in printed
    assert "responses" in printed and "latex" in printed
