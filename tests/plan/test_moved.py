"""Bytes moved, on small programs whose bytes are worked out by hand."""

import jax
import jax.numpy as jnp
import pytest

from jaxdistill.plan.costs import analyze, outside_bytes
from jaxdistill.plan.moved import memory_spaces_apart
from jaxdistill.plan.products import forward_kernels
from tests.plan.programs import CHOICE, LOOP

MAIN = "ENTRY %main (p: f32[1]) -> f32[1] {{\n  %i = s32[] constant(3)\n{}\n}}\n"


def moved(body, computations="", platform="gpu"):
    lines = "\n".join(f"  {line.strip()}" for line in body.strip().splitlines())
    return dict(analyze(computations + MAIN.format(lines), 4, platform=platform).moved)


def test_an_elementwise_instruction_reads_its_operands_and_writes_its_result():
    body = """
    %a = f32[4,8]{1,0} parameter(0)
    %b = bf16[8]{0} parameter(1)
    ROOT %c = bf16[4,8]{1,0} something(%a, %b)
    """
    assert moved(body) == {"elementwise": 4 * 32 + 2 * 8 + 2 * 32}


def test_what_moves_bytes_is_launched_as_often_as_it_runs():
    body = """
    %a = f32[4,8]{1,0} parameter(0)
    %b = f32[32]{0} bitcast(%a)
    %d = f32[32]{0} something(%b)
    ROOT %c = f32[32]{0} another(%d)
    """
    lines = "\n".join(f"  {line.strip()}" for line in body.strip().splitlines())
    assert analyze(MAIN.format(lines), 4).launches == 2


def test_what_only_renames_is_free():
    body = """
    %a = f32[4,8]{1,0} parameter(0)
    %b = f32[32]{0} bitcast(%a)
    %t = (f32[4,8]{1,0}, f32[32]{0}) tuple(%a, %b)
    ROOT %c = f32[32]{0} get-tuple-element(%t), index=1
    """
    assert moved(body) == {}


@pytest.mark.parametrize(
    ("line", "category", "size"),
    [
        ("%r = f32[1,8]{1,0} dynamic-slice(%a, %i, %i), dynamic_slice_sizes={1,8}", "copies", 32 + 4 + 4 + 32),
        ("%r = f32[1,8]{1,0} slice(%a), slice={[1:2], [0:8]}", "copies", 32 + 32),
        ("%r = f32[4,8]{1,0} dynamic-update-slice(%a, %u, %i, %i)", "copies", 32 + 4 + 4 + 32),
        ("%r = f32[2,8]{1,0} gather(%a, %n), offset_dims={1}", "gathers", 64 + 8 + 64),
        # adds two rows: both rows and the numbers are read, and the rows of the target are read and written
        ("%r = f32[4,8]{1,0} scatter(%a, %n, %two), to_apply=%sum", "gathers", 64 + 8 + 64 + 64),
        ("%r = f32[8,4]{1,0} transpose(%a), dimensions={1,0}", "copies", 128 + 128),
        ("%r = f32[4]{0} reduce(%a, %z), dimensions={1}, to_apply=%sum", "reductions", 128 + 4 + 16),
        ("%r = f32[4,8]{1,0} all-reduce(%a), replica_groups={{0,1}}, to_apply=%sum", "collectives", 256),
        ("%r = f32[4,2]{1,0} dot(%a, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}", "products", 128 + 96),
        (
            '%r = (f32[4,2]{1,0}, u8[4096]{0}) custom-call(%a, %w), custom_call_target="__cublas$lt$matmul"',
            "products",
            128 + 64 + 32,
        ),
    ],
)
def test_single_instructions(line, category, size):
    body = f"""
    %a = f32[4,8]{{1,0}} parameter(0)
    %u = f32[1,8]{{1,0}} parameter(1)
    %n = s32[2]{{0}} parameter(2)
    %two = f32[2,8]{{1,0}} parameter(3)
    %w = f32[8,2]{{1,0}} parameter(4)
    %z = f32[] constant(0)
    ROOT {line}
    """
    assert moved(body) == {category: size}


SLICED = """\
%fused (p0: f32[28,64], p1: s32[], p2: f32[64]) -> bf16[64] {
  %p0 = f32[28,64]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %row = f32[1,64]{1,0} dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={1,64}
  %flat = f32[64]{0} bitcast(%row)
  %p2 = f32[64]{0} parameter(2)
  %twice = f32[64]{0} multiply(%flat, %p2)
  %square = f32[64]{0} multiply(%twice, %flat)
  ROOT %out = bf16[64]{0} convert(%square)
}

"""


def test_a_fusion_reads_the_slice_alone():
    body = """
    %a = f32[28,64]{1,0} parameter(0)
    %b = f32[64]{0} parameter(1)
    ROOT %r = bf16[64]{0} fusion(%a, %i, %b), kind=kLoop, calls=%fused
    """
    assert moved(body, SLICED) == {"elementwise": 256 + 4 + 256 + 128}


CONVERTED = """\
%fused (p0: f32[28,64]) -> bf16[1,64] {
  %p0 = f32[28,64]{1,0} parameter(0)
  %all = bf16[28,64]{1,0} convert(%p0)
  ROOT %row = bf16[1,64]{1,0} slice(%all), slice={[3:4], [0:64]}
}

"""


def test_what_is_converted_before_it_is_sliced_is_read_by_the_slice():
    body = """
    %a = f32[28,64]{1,0} parameter(0)
    ROOT %r = bf16[1,64]{1,0} fusion(%a), kind=kLoop, calls=%fused
    """
    assert moved(body, CONVERTED) == {"elementwise": 256 + 128}


UPDATED = """\
%fused (p0: f32[28,64], p1: bf16[64], p2: s32[]) -> (f32[28,64], f32[64]) {
  %p0 = f32[28,64]{1,0} parameter(0)
  %p1 = bf16[64]{0} parameter(1)
  %p2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  %wide = f32[64]{0} convert(%p1)
  %row = f32[1,64]{1,0} bitcast(%wide)
  SOURCE
  %new = f32[28,64]{1,0} dynamic-update-slice(%target, %row, %p2, %zero)
  ROOT %t = (f32[28,64]{1,0}, f32[64]{0}) tuple(%new, %wide)
}

"""


@pytest.mark.parametrize(
    ("source", "size"),
    [
        # the row alone is written, and nothing of the target is read
        ("%target = f32[28,64]{1,0} bitcast(%p0)", 128 + 4 + 256 + 256),
        # not in place: what is updated is made here
        ("%target = f32[28,64]{1,0} negate(%p0)", 28 * 256 + 128 + 4 + 28 * 256 + 256),
    ],
)
def test_a_fusion_that_updates_in_place_writes_the_update(source, size):
    body = """
    %a = f32[28,64]{1,0} parameter(0)
    %b = bf16[64]{0} parameter(1)
    ROOT %r = (f32[28,64]{1,0}, f32[64]{0}) fusion(%a, %b, %i), kind=kLoop, calls=%fused
    """
    assert moved(body, UPDATED.replace("SOURCE", source)) == {"elementwise": size}


NESTED = """\
%half (q0: f32[2,16,8]) -> bf16[16,8] {
  %q0 = f32[2,16,8]{2,1,0} parameter(0)
  %one = f32[1,16,8]{2,1,0} slice(%q0), slice={[0:1], [0:16], [0:8]}
  %flat = f32[16,8]{1,0} bitcast(%one)
  ROOT %low = bf16[16,8]{1,0} convert(%flat)
}

%gemm (p0: f32[2,16,8], p1: bf16[8,4]) -> f32[16,4] {
  %p0 = f32[2,16,8]{2,1,0} parameter(0)
  %p1 = bf16[8,4]{1,0} parameter(1)
  %lhs = bf16[16,8]{1,0} fusion(%p0), kind=kCustom, calls=%half
  ROOT %d = f32[16,4]{1,0} dot(%lhs, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

"""


def test_a_product_with_what_is_fused_into_it_is_a_product():
    body = """
    %a = f32[2,16,8]{2,1,0} parameter(0)
    %b = bf16[8,4]{1,0} parameter(1)
    ROOT %r = f32[16,4]{1,0} fusion(%a, %b), kind=kCustom, calls=%gemm
    """
    found = analyze(NESTED + MAIN.format(body), 1)
    assert dict(found.moved) == {"products": 512 + 64 + 256}
    assert dict(found.products) == {(2 * 16 * 4 * 8, 512 + 64 + 256): 1}
    assert outside_bytes(found.moved) == 0


def test_attention_kernels_are_apart():
    body = """
    %q = bf16[2,8,4,16]{3,2,1,0} parameter(0)
    %n = f32[2,4,8]{2,1,0} parameter(1)
    ROOT %r = (bf16[2,4,8,16]{3,1,2,0}, f32[2,4,8]{2,1,0}, u8[0]{0}) custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmax"
    """  # noqa: E501
    assert moved(body) == {"attention": 3 * 2048 + 2048 + 256}


TRITON = """
    %q = bf16[2,8192,16,128]{3,2,1,0} parameter(0)
    %k = bf16[2,8192,8,128]{3,2,1,0} parameter(1)
    %n = f32[2,16,8192]{2,1,0} parameter(2)
    ROOT %pallas_call.2 = (bf16[2,8192,16,128]{3,2,1,0}, f32[2,16,8192]{2,1,0}) custom-call(%q, %k, %k), custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="jit(f)/pallas_call"}, backend_config={debug = false, ir = "\\00name\\00", name = "NAME", num_warps = 4 : i32}
"""  # noqa: E501


@pytest.mark.parametrize(
    ("name", "products"), [("attention_forward", 2), ("attention_keys", 4), ("attention_queries", 3)]
)
def test_kernels_of_ours_are_known_by_name(name, products):
    found = analyze(MAIN.format(TRITON.strip("\n").replace("NAME", name)), 1)
    assert dict(found.kernels) == {name: 1}
    assert forward_kernels(found.kernels) == (name == "attention_forward")
    # a causal mask in blocks of 512: 17 / 32 of all pairs
    assert found.kernel_flops[name] == products * 2 * 2 * 16 * 128 * 8192 * 8192 * 17 / 32
    whole, keys, sums = 2 * 2 * 8192 * 16 * 128, 2 * 2 * 8192 * 8 * 128, 4 * 2 * 16 * 8192
    assert dict(found.moved) == {"attention": 2 * whole + 2 * keys + sums}


def test_other_kernels_are_calls():
    found = analyze(MAIN.format(TRITON.strip("\n").replace("NAME", "softcap")), 1)
    assert set(found.moved) == {"calls"}
    assert not forward_kernels(found.kernels)


def test_loops_count_as_often_as_they_run_and_of_choices_the_taken_one():
    times = 5
    found = analyze(LOOP.replace("END", "10").replace("START", "0"), 8).moved
    assert found["products"] == times * (128 + 64 + 128)
    assert found["collectives"] == times * (128 + 128)
    # the counter, and the comparison in the condition is no work of the body
    assert found["elementwise"] == times * 12
    branches = "true_computation=%yes, false_computation=%no"
    assert dict(analyze(CHOICE.replace("BRANCHES", branches), 1).moved) == {"products": 3 * 256}


def test_what_is_not_in_hbm_does_not_count():
    body = """
    %a = f32[4,8]{1,0:T(8,128)S(1)} parameter(0)
    ROOT %c = f32[4,8]{1,0:T(8,128)} negate(%a)
    """
    assert moved(body, platform="tpu") == {"elementwise": 128}
    assert moved(body, platform="gpu") == {"elementwise": 256}, "1 is device memory of a GPU"
    slices = """
    %a = f32[4,8]{1,0:T(8,128)} parameter(0)
    %s = ((f32[4,8]{1,0:T(8,128)}), f32[1,8]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%a), slice={[0:1], [0:8]}
    ROOT %d = f32[1,8]{1,0:T(8,128)S(1)} slice-done(%s)
    """
    assert moved(slices, platform="tpu") == {"copies": 32}
    host = """
    %a = f32[4,8]{1,0} parameter(0)
    %s = (f32[4,8]{1,0:S(5)}, f32[4,8]{1,0}, u32[]) copy-start(%a)
    ROOT %d = f32[4,8]{1,0:S(5)} copy-done(%s)
    """
    assert moved(host) == {"copies": 128}
    lines = MAIN.format(host.strip())
    assert analyze(lines, 1).offloaded_bytes == 128


OFFLOADED = """\
%put (p0: f32[28,64], p1: f32[1,64], p2: s32[]) -> f32[28,64] {
  %p0 = f32[28,64]{1,0:S(5)} parameter(0)
  %p1 = f32[1,64]{1,0} parameter(1)
  %p2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %new = f32[28,64]{1,0:S(5)} dynamic-update-slice(%p0, %p1, %p2, %zero)
}

%take (q0: f32[28,64], q1: s32[]) -> f32[1,64] {
  %q0 = f32[28,64]{1,0:S(5)} parameter(0)
  %q1 = s32[] parameter(1)
  %none = s32[] constant(0)
  ROOT %row = f32[1,64]{1,0} dynamic-slice(%q0, %q1, %none), dynamic_slice_sizes={1,64}
}

"""


def test_what_is_offloaded_goes_over_in_slices():
    body = """
    %a = f32[28,64]{1,0:S(5)} custom-call(), custom_call_target="AllocateBuffer"
    %b = f32[1,64]{1,0} parameter(0)
    %s = ((f32[28,64]{1,0:S(5)}, f32[1,64]{1,0}, s32[]), f32[28,64]{1,0:S(5)}, u32[]) fusion-start(%a, %b, %i), kind=kCustom, calls=%put
    %d = f32[28,64]{1,0:S(5)} fusion-done(%s)
    %t = ((f32[28,64]{1,0:S(5)}, s32[]), f32[1,64]{1,0}, u32[]) fusion-start(%d, %i), kind=kCustom, calls=%take
    ROOT %e = f32[1,64]{1,0} fusion-done(%t)
    """  # noqa: E501
    found = analyze(OFFLOADED + MAIN.format(body.strip()), 1)
    assert found.offloaded_bytes == 256 + 256
    assert dict(found.moved) == {"copies": (256 + 4) + (256 + 4)}
    assert 5 in memory_spaces_apart("gpu")


def test_what_xla_compiles_for_a_cpu_is_counted():
    """A scan that reads one matrix of a stack in each of its rounds reads the stack once in all."""

    def f(stack, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0]

    stack, x = jnp.ones((6, 256, 256)), jnp.ones((8, 256))
    text = jax.jit(f).lower(stack, x).compile().as_text()
    assert text is not None
    found = sum(analyze(text, 1, platform="cpu").moved.values())
    assert 6 * 256 * 256 * 4 < found < 4 * 6 * 256 * 256 * 4
