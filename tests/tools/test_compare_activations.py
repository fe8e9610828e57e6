"""tools/compare_activations.py: a few steps with activations in bf16 lose what they lose with fp32 ones."""

from tests.helpers import load_tool


def test_a_few_steps_in_bf16_go_as_in_fp32(capsys):
    tool = load_tool("compare_activations")
    assert tool.main(["--steps", "6", "--layer-parts", "1"]) == 0
    heads, line = capsys.readouterr().out.splitlines()
    assert heads.split() == ["steps", "fp32", "bf16", "fp32,", "other", "seed"]
    wide, narrow, other = (float(x) for x in line.split()[-3:])
    assert abs(narrow - wide) < 0.01 * wide
    assert other != wide and 2 < wide < 8
