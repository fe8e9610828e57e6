"""tools/bench_losses.py: its rows do the same work, and a missed target is seen."""

import argparse

import jax
import numpy as np
import pytest

from tests.helpers import load_tool


@pytest.fixture(scope="module")
def bench():
    return load_tool("bench_losses")


SMALL = argparse.Namespace(tokens=32, hidden=8, vocabulary=50, chunk=8, repeat=1, only=None, peers=None)


@pytest.mark.parametrize(
    ("loss", "rows"), [("ce", ("whole logits", "ours", "recomputed")), ("kd", ("whole logits", "ours"))]
)
def test_rows_are_the_same_loss_and_gradient(bench, loss, rows):
    given = bench.arrays(SMALL, loss, "ours")
    student = given.pop("hidden"), given.pop("projection")
    functions = {"ce": bench.jax_cross_entropies, "kd": bench.jax_distillations}[loss]("float32", SMALL.chunk)
    found = [jax.jit(jax.value_and_grad(functions[row]))(student, given) for row in rows]
    for other in found[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found[0], other)


def test_a_missed_target_is_seen(bench, monkeypatch, capsys):
    whole = {"seconds": 10.0, "cpu": 10.0, "peak": 8e9, "xla": 8e9, "loss": 2.0}
    rows = {
        "whole logits": whole,
        "ours": whole | {"seconds": 9.0, "peak": 9e8},
        "ours, half": whole | {"seconds": 5.0, "loss": 1.0},
        "recomputed": whole | {"seconds": 12.0},
    }
    monkeypatch.setattr(bench, "run_child", lambda arguments, loss, dtype, row: rows[row])
    assert bench.table(SMALL, "ce", "float32") == 0
    rows["ours"] |= {"seconds": 11.0, "peak": 2e9, "loss": 3.0}
    assert bench.table(SMALL, "ce", "float32") == 3
    rows["ours, half"] = {"error": "MemoryError"}
    assert bench.table(SMALL, "ce", "float32") == 4
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("above 1/8", "slower", "another loss", "MemoryError"))
