"""tools/bench_verify_code.py runs and prints a rate for every kind of tests."""

import re

import pytest

from jaxdistill.verify.code import Sandbox
from tests.helpers import load_tool


def test_every_kind_has_a_rate(capsys):
    try:
        with Sandbox():
            pass
    except ValueError as error:
        pytest.skip(str(error))
    tool = load_tool("bench_verify_code")
    assert tool.main(["--seconds", "0.1", "--workers", "1"]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("isolation ")
    rates = {line.split()[0]: int(re.findall(r"([\d,]+) programs/min", line)[0].replace(",", "")) for line in lines}
    assert set(rates) == {"asserts", "calls", "stdio"} and min(rates.values()) > 60
    with pytest.raises(ValueError, match="a program is incorrect"):
        tool.measure([("```python\nprint(2)\n```", tool.KINDS["stdio"][0][1])], 1, 0.1)
