"""Many answers in killable processes: order, equality with `check_math`, and what happens when one dies."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jaxdistill.verify import MathPool, check_math, check_math_many
from jaxdistill.verify.pool import CHUNK, GAVE_UP

ROOT = Path(__file__).parents[2]


def test_the_order_and_the_checks_are_those_of_check_math():
    pairs = [(rf"\boxed{{\sqrt{{{n * n}}}}}", str(n + n % 2)) for n in range(3 * CHUNK + 1)]
    assert check_math_many(pairs, workers=2) == [check_math(*pair) for pair in pairs]


def test_nothing_to_check():
    assert check_math_many([]) == []


def test_odd_characters_come_back_as_they_went():
    pairs = [("\\boxed{\x00\ud7ff\n\u2028é}", "5"), ("\\boxed{\ud800}", "5")]
    assert check_math_many(pairs) == [check_math(*pair) for pair in pairs]


NOTHING = [{"workers": 0}, {"workers": 1, "cpu_seconds": 0}, {"workers": 1, "memory_mib": 0}]


@pytest.mark.parametrize("settings", NOTHING)
def test_limits_that_leave_nothing_are_refused(settings):
    with pytest.raises(ValueError, match="set at least 1 of each"):
        MathPool(**settings)


def test_a_process_without_memory_is_replaced_and_only_its_pair_is_undecided():
    right, large = (r"\boxed{1}", "1"), ("a" * 50_000_000 + r"\boxed{1}", "1")
    with MathPool(1, memory_mib=160) as pool:
        assert pool.check([right, large, right]) == [check_math(*right), GAVE_UP, check_math(*right)]


def test_the_kernel_ends_a_computation_that_takes_too_long():
    code = (
        "import json, sys; from jaxdistill.verify import pool\n"
        "pool.check_math = lambda response, gold, **_: 9 ** 9 ** 9 and None\n"
        "pool.serve(1, 512)"
    )
    command = [sys.executable, "-c", code]
    ran = subprocess.run(command, input=b'["check", [["a", "b"]]]\n', cwd=ROOT, capture_output=True, timeout=300)
    assert (ran.returncode, ran.stdout) == (-signal.SIGXCPU, b"")
