"""Whoever asks for fp32 gets it: products of fp32 inputs ask for full precision in every program that promises fp32.

On accelerators an fp32 product is rounded unless it asks not to be, and no CPU shows it: so the programs are read.
"""

import functools
import json
import subprocess
from collections import Counter

import jax
import jax.numpy as jnp
import pytest

from jaxdistill.models.attention import KERNELS
from jaxdistill.plan import environments
from jaxdistill.plan.targets import Topology
from jaxdistill.precision import precision_of
from tests.fp32_programs import UNASKED, compiled_products, programs, traced_products

HIGHEST = jax.lax.Precision.HIGHEST
LEAST = {"forward": 13, "train step": 61, "prefill": 13, "decoding": 13, "scoring": 13, "check": 6, "check's logits": 1}
"""A program's products, at least: two layers of seven matrices, but for parts of a check, and Muon's three for each of
seven stacks of matrices; kernels are not counted."""


def test_fp32_alone_asks():
    assert precision_of("float32") == precision_of(jnp.float32, jnp.dtype("float32")) == HIGHEST
    for dtypes in (("bfloat16",), ("float16",), ("bfloat16", "float32"), ("float32", "bfloat16"), ("int8",)):
        assert precision_of(*dtypes) is None


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def traced(request):
    return request.param, programs(f"cpu:{jax.device_count()}", request.param)


def test_products_of_traced_programs(traced):
    dtype, found = traced
    assert set(found) == {UNASKED, *LEAST}
    for name in LEAST:
        products = Counter(traced_products(found[name].jaxpr.jaxpr))
        assert products.total() >= LEAST[name], name
        asked = {precision for (*sides, precision) in products if sides == ["float32"] * 2}
        others = {precision for (*sides, precision) in products if sides != ["float32"] * 2}
        if dtype == "float32":
            assert asked == {(HIGHEST, HIGHEST)}, (name, products)
        assert others <= {None}, (name, products)


def test_bf16_is_not_slowed_down(traced):
    """Where a GPU would run it, nothing in a bf16 program asks for more than bf16 units give."""
    dtype, found = traced
    for name in set(LEAST) - {"check", "check's logits"}:  # which are in fp32 whatever the model is in
        text = found[name].lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("dot_general") >= LEAST[name]
        assert ("HIGHEST" in text) == (dtype == "float32"), name


@pytest.mark.parametrize("kernel", sorted(set(KERNELS) - {"cudnn"}))
def test_products_inside_of_kernels_and_their_backward_passes(kernel):
    run = functools.partial(KERNELS[kernel], **({"interpret": True} if kernel == "splash" else {}))
    ids = jnp.ones((1, 256), jnp.int32)
    q, k = jnp.ones((1, 256, 4, 64)), jnp.ones((1, 256, 2, 64))
    jaxpr = jax.make_jaxpr(jax.grad(lambda *x: run(*x, ids).sum(), (0, 1, 2)))(q, k, k)
    found = Counter(traced_products(jaxpr.jaxpr))
    assert found.total() >= 7  # two forwards, five backwards
    assert set(found) == {("float32", "float32", (HIGHEST, HIGHEST))}


def check_compiled(found):
    """`found`: program -> dtypes of both sides, precision, count."""
    unasked = found.pop(UNASKED)
    assert all(precision in ("", "default,default") for _, precision, _ in unasked), "the text is not read right"
    assert set(found) == set(LEAST)
    for name, products in found.items():
        assert sum(count for *_, count in products) >= LEAST[name], name
        assert {(sides, precision) for sides, precision, _ in products} == {("f32 f32", "highest,highest")}, name


def test_products_of_programs_compiled_here(traced):
    dtype, found = traced
    if dtype == "float32":
        texts = {name: program.lower().compile().as_text() for name, program in found.items()}
        check_compiled({n: [(*k, c) for k, c in Counter(compiled_products(t)).items()] for n, t in texts.items()})


@pytest.mark.aot
@pytest.mark.parametrize("name", ["h100:1", "v6e:2x2"])
def test_products_of_programs_compiled_for_accelerators(name):
    platform = Topology.of(name).chip.platform
    python = environments.find(platform)
    if python is None:
        pytest.skip(
            f"no compiler for {environments.TITLES[platform]}: jaxdistill plan CONFIG --make-environment {platform}"
        )
    ran = subprocess.run(
        [str(python), "-m", "tests.fp32_programs", name], env=environments.variables(), capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    check_compiled(json.loads(ran.stdout.splitlines()[-1]))
