"""Costs of compiled programs: loops count as often as they run, products by shapes, collectives by bytes."""

import jax
import jax.numpy as jnp
import pytest

from jaxdistill.plan.costs import analyze
from jaxdistill.plan.hlo import parse, replica_group
from jaxdistill.plan.products import convolution_flops
from tests.plan.programs import CHOICE, LOOP

ONE = 2 * 8 * 4 * 4


@pytest.mark.parametrize(("start", "end", "times"), [(0, 10, 5), (0, 11, 6), (3, 10, 4), (10, 10, 0)])
def test_a_loop_counts_as_often_as_it_runs(start, end, times):
    found = analyze(LOOP.replace("END", str(end)).replace("START", str(start)), 8)
    assert found.flops == times * ONE
    assert not found.unknown_loops
    (key,) = found.collective_bytes
    assert (key.kind, key.group, key.asynchronous) == ("all-reduce", (0, 1, 2, 3), False)
    assert found.collective_calls[key] == times
    assert found.collective_bytes[key] == times * 2 * (8 * 4 * 4) * 3 / 4


def test_a_loop_of_unknown_length_is_asked_for_or_said():
    text = LOOP.replace("constant(END)", "get-tuple-element(%q), index=0").replace("START", "0")
    text = text.replace("body=%body", 'body=%body, metadata={op_name="jit(f)/chunks/while"}')
    assert analyze(text, 8).unknown_loops == {"jit(f)/chunks/while": 1}
    assert analyze(text, 8, lambda scope: 7.0 if scope.endswith("chunks/while") else None).flops == 7 * ONE


@pytest.mark.parametrize(
    "branches", ["true_computation=%yes, false_computation=%no", "branch_computations={%no, %yes}"]
)
def test_of_a_choice_the_true_branch_counts(branches):
    assert analyze(CHOICE.replace("BRANCHES", branches), 1).flops == 2 * 8**3


@pytest.mark.parametrize("unroll", [1, 2])
def test_what_xla_compiles_is_counted(unroll):
    def f(x, w):
        def outer(x, _):
            return jax.lax.fori_loop(0, 5, lambda i, x: jnp.tanh(x @ w), x), None

        return jax.lax.scan(outer, x, None, length=6, unroll=unroll)[0]

    x, w = jnp.ones((16, 32)), jnp.ones((32, 32))
    text = jax.jit(f).lower(x, w).compile().as_text()
    assert analyze(text, 1).flops == 30 * 2 * 16 * 32 * 32


@pytest.mark.parametrize(
    ("written", "group"),
    [
        ("replica_groups={{0,2},{1,3}}", [0, 2]),
        ("replica_groups=[2,2]<=[4]", [0, 1]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [0, 2]),
        ("replica_groups=[4,2]<=[2,2,2]T(2,0,1)", [0, 2]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [0, 2]),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}", [0, 1]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", [0, 1, 2, 3]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}, dimensions={0}", [0, 1]),
        ("replica_groups=mesh['a'=2,'b'=1,'c'=2], device_ids=([2,2]T(1,0)) {'c'}", [0, 2]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=(0,3,1,2) {'b'}", [0, 3]),
        ("source_target_pairs={{0,1},{1,3},{3,0},{2,2}}", [0, 1, 3]),
        ("channel_id=1", [0, 1, 2, 3]),
    ],
)
def test_groups_are_read_in_every_spelling(written, group):
    assert replica_group(written, 8 if "[4,2]" in written else 4) == group


@pytest.mark.parametrize(
    ("attributes", "lhs", "rhs", "out", "flops"),
    [
        # a product [6, 4] x [4, 5]
        ("dim_labels=bf_io->bf", "6,4", "4,5", "6,5", 2 * 6 * 5 * 4),
        # two products summed over a window of 2: [6, (2) x 4] x [(2) x 4, 5]
        ("window={size=2}, dim_labels=b0f_0io->bf0", "6,2,4", "2,4,5", "6,5,1", 2 * 6 * 5 * 4 * 2),
        # two separate products in the disguise of a padded window
        ("window={size=2 pad=1_1 rhs_reversal=1}, dim_labels=bf0_i0o->b0f", "6,4,1", "4,2,5", "6,2,5", 2 * 6 * 5 * 8),
    ],
)  # fmt: skip
def test_convolutions_that_are_products(attributes, lhs, rhs, out, flops):
    text = f"""ENTRY %main (a: f32[1]) -> f32[1] {{
  %a = bf16[{lhs}]{{1,0}} parameter(0)
  %b = bf16[{rhs}]{{1,0}} parameter(1)
  ROOT %c = f32[{out}]{{1,0}} convolution(%a, %b), {attributes}
}}
"""
    ops = parse(text)[0]["main"]
    assert convolution_flops(ops["c"], ops) == flops
