"""Every attention kernel against a float64 NumPy reference, each other, and themselves on a mesh."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.models import attention as package
from jaxdistill.models.attention import attention as attend
from jaxdistill.models.attention import blocks, choose, cudnn, pallas, platform_of, triton, warn
from jaxdistill.models.attention.blocks import attend_blocks, make_plan
from jaxdistill.models.attention.cudnn import segment_spans
from jaxdistill.models.attention.dense import attend_dense
from jaxdistill.models.attention.triton import attend_triton
from jaxdistill.parallel.mesh import make_mesh

RUN_ANYWHERE = ["dense", "blocks", "splash", "triton"]
# blocks of more queries than keys, and of fewer
SMALL = triton.Sizes(triton.Tile(32, 16, 4, 2), triton.Tile(16, 32, 4, 2), triton.Tile(32, 16, 4, 2))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 16)
    monkeypatch.setattr(triton, "sizes_of", lambda *_: SMALL)


def reference(q, k, v, segment_ids, weights, *, scale, window=None):
    """The definition, one query at a time, in float64: output [B, T, H * D] and gradients of sum(output * weights)."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    ids = np.asarray(segment_ids)
    B, T, H, D = q.shape
    weights = np.asarray(weights, np.float64).reshape(q.shape)
    out, dq, dk, dv = np.zeros_like(q), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for b in range(B):
        for t in range(T):
            seen = [s for s in range(t + 1) if ids[b, s] == ids[b, t] and (window is None or s > t - window)]
            for h in range(H):
                keys, values = k[b, seen, h // (H // k.shape[2])], v[b, seen, h // (H // k.shape[2])]
                p = np.exp(keys @ q[b, t, h] * scale)
                p /= p.sum()
                g = weights[b, t, h]
                out[b, t, h] = p @ values
                ds = p * (values @ g - p @ values @ g) * scale
                dq[b, t, h] = ds @ keys
                dk[b, seen, h // (H // k.shape[2])] += ds[:, None] * q[b, t, h]
                dv[b, seen, h // (H // k.shape[2])] += p[:, None] * g
    return out.reshape(B, T, H * D), dq, dk, dv


def inputs(B, T, H, K, D, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=(B, T, n, D)), jnp.float32) for n in (H, K, K))


def ids_of(*rows, T):
    """[3, 2] -> 1 1 1 2 2 0 0 ...: the segments' lengths, then padding."""
    out = np.zeros((len(rows), T), np.int32)
    for b, lengths in enumerate(rows):
        numbers = np.repeat(np.arange(1, len(lengths) + 1), lengths)
        out[b, : len(numbers)] = numbers
    return out


def weights_of(segment_ids, width, seed=1):
    """Random, and 0 on padding, whose results mean nothing."""
    rng = np.random.default_rng(seed)
    real = np.asarray(segment_ids > 0)[..., None]
    return jnp.asarray(rng.normal(size=(*segment_ids.shape, width)) * real, jnp.float32)


# tests compile far longer than they run
@functools.partial(
    jax.jit,
    static_argnames=("kernel", "window", "dtype", "mesh", "max_segments"),
    compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True},
)
def compiled(q, k, v, segment_ids, weights, *, kernel, window, dtype, mesh, max_segments=None):
    def loss(q, k, v):
        out = attend(
            q, k, v, segment_ids, scale=q.shape[-1] ** -0.5, window=window, dtype=dtype, mesh=mesh, kernel=kernel,
            max_segments=max_segments,
        )  # fmt: skip
        return jnp.sum(out * weights), out

    (_, out), gradients = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    return out, *gradients


def run(q, k, v, segment_ids, weights, *, kernel, window=None, dtype="float32", mesh=None, max_segments=None):
    """(output, dq, dk, dv) of a weighted sum of the output."""
    return compiled(
        q, k, v, segment_ids, weights,
        kernel=kernel, window=window, dtype=dtype, mesh=mesh, max_segments=max_segments,
    )  # fmt: skip


def assert_close(got, want, segment_ids, atol):
    """Outputs are compared where tokens are real; gradients everywhere, for padding gets none."""
    assert all(np.isfinite(x).all() for x in got)
    real = (np.asarray(segment_ids) > 0)[..., None]
    np.testing.assert_allclose(got[0] * real, want[0] * real, atol=atol, err_msg="out")
    for name, a, b in zip(("dq", "dk", "dv"), got[1:], want[1:], strict=True):
        np.testing.assert_allclose(a, b, atol=atol, err_msg=name)


SHAPES = {
    "one token": (1, 2, 1, 16, [[1]], None),
    "packed": (37, 6, 2, 24, [[10, 1, 20], [37]], None),
    "window": (37, 6, 2, 16, [[10, 1, 20]], 5),
    # more than one of splash's blocks, and queries in quarters for dense
    "quarters": (132, 4, 4, 16, [[70, 50]], None),
    "quarters, window": (132, 2, 1, 16, [[90, 42]], 33),
}


@functools.cache
def case(name):
    T, H, K, D, rows, window = SHAPES[name]
    q, k, v = inputs(len(rows), T, H, K, D)
    ids = jnp.asarray(ids_of(*rows, T=T))
    weights = weights_of(ids, H * D)
    want = reference(q, k, v, ids, weights, scale=D**-0.5, window=window)
    return (q, k, v, ids, weights), window, want


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kernel", RUN_ANYWHERE)
def test_values_and_gradients_are_those_of_the_definition(kernel, name):
    arguments, window, want = case(name)
    got = run(*arguments, kernel=kernel, window=window)
    assert got[0].dtype == jnp.float32
    assert_close(got, want, arguments[3], atol=1e-5)


@pytest.mark.parametrize("kernel", RUN_ANYWHERE)
def test_bf16_is_within_bf16_error(kernel):
    arguments, _, want = case("packed")
    got = run(*arguments, kernel=kernel, dtype="bfloat16")
    assert got[0].dtype == got[1].dtype == jnp.float32
    assert_close(got, want, arguments[3], atol=0.06)
    for a, b in zip(got[1:], want[1:], strict=True):
        assert np.abs(a - b).mean() < 0.01 * np.abs(b).max()


@pytest.mark.parametrize("name", SHAPES)
def test_one_cpu_is_told_layouts_and_stays_within_bf16_error(one_cpu, name):
    arguments, window, want = case(name)
    fresh = functools.partial(compiled.__wrapped__, kernel="dense", window=window, dtype="bfloat16", mesh=None)
    lowered = jax.jit(fresh).lower(*arguments)
    assert "LayoutConstraint" in lowered.as_text()
    assert_close(lowered.compile()(*arguments), want, arguments[3], atol=0.06)


@pytest.mark.parametrize("start", [0, 5, 20])
def test_queries_from_the_middle_have_the_gradients_of_the_definition(start):
    (q, k, v, ids, weights), window, _ = case("window")
    T, D = q.shape[1], q.shape[3]
    part, scale = slice(start, start + 17), D**-0.5
    others = jnp.asarray((np.arange(T) >= start) & (np.arange(T) < start + 17))[None, :, None]
    want = reference(q, k, v, ids, weights * others, scale=scale, window=window)
    want = (want[0][:, part], want[1][:, part], *want[2:])
    for dtype, atol in (("float32", 1e-5), ("bfloat16", 0.06)):

        def loss(q, k, v, dtype=dtype):
            q, k, v = ((q * scale).astype(dtype), k.astype(dtype), v.astype(dtype))
            out = attend_dense(q, k, v, ids, window=window, start=jnp.int32(start)).reshape(1, 17, -1)
            return jnp.sum(out * weights[:, part]), out

        (_, out), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q[:, part], k, v)
        assert_close((out, *gradients), want, ids[:, part], atol)


@pytest.mark.parametrize("kernel", RUN_ANYWHERE)
def test_segments_do_not_touch_each_other(kernel):
    (q, k, v, ids, weights), window, _ = case("packed")
    third = (ids == 3)[..., None, None]
    before = run(q, k, v, ids, weights, kernel=kernel, window=window)
    changed = (jnp.where(third, 100.0 * x + 3, x) for x in (q, k, v))
    after = run(*changed, ids, jnp.where(third[..., 0], 5 * weights, weights), kernel=kernel, window=window)
    for a, b in zip(before, after, strict=True):
        others = np.asarray(ids != 3)
        np.testing.assert_array_equal(np.asarray(a)[others], np.asarray(b)[others])
        assert np.abs(np.asarray(a)[~others] - np.asarray(b)[~others]).max() > 1e-3


@pytest.mark.parametrize("kernel", RUN_ANYWHERE)
def test_rows_of_padding_alone_are_finite(kernel):
    (q, k, v, ids, weights), _, _ = case("packed")
    ids = jnp.asarray(ids_of([], [5], T=ids.shape[1]))
    got = run(q, k, v, ids, jnp.ones_like(weights), kernel=kernel)
    assert all(np.isfinite(x).all() for x in got)


def test_no_segments_are_one_segment_a_row():
    (q, k, v, ids, weights), _, _ = case("packed")
    one = jnp.ones_like(ids)
    got = run(q, k, v, None, weights, kernel="blocks")
    assert_close(got, run(q, k, v, one, weights, kernel="dense"), one, atol=1e-5)


@pytest.mark.parametrize("kernel", ["blocks", "triton"])
def test_segments_may_be_numbered_and_torn_in_any_way(kernel):
    q, k, v = inputs(1, 64, 2, 1, 16)
    ids = np.repeat(np.array([[7, 2, 0, 9, 2, 7, 1, 1]], np.int32), 8, axis=1)
    weights = weights_of(ids, 32)
    got = run(q, k, v, ids, weights, kernel=kernel)
    assert_close(got, reference(q, k, v, ids, weights, scale=0.25), ids, atol=1e-5)


@pytest.mark.parametrize("compute", [attend_dense, attend_blocks, functools.partial(attend_triton, interpret=True)])
@pytest.mark.parametrize("window", [None, 9])
def test_a_slice_of_the_queries_gives_a_slice_of_the_result(compute, window):
    (q, k, v, ids, _), _, _ = case("packed")
    whole = jax.jit(functools.partial(attend_dense, window=window))(q, k, v, ids)
    sliced = jax.jit(functools.partial(compute, window=window))(q[:, 10:31], k, v, ids, start=10)
    real = (ids[:, 10:31] > 0)[..., None, None]
    np.testing.assert_allclose(sliced[:, :21] * real, whole[:, 10:31] * real, atol=1e-5)


def test_blocks_that_cannot_matter_are_skipped():
    # 64 tokens in blocks of 8
    def visited(ids, window=None):
        plan = jax.jit(make_plan, static_argnums=(1, 2, 3, 4, 5))(jnp.asarray(ids), 64, 0, window, 8, 8)
        return (plan.end - plan.first).tolist()

    assert visited(ids_of([64], T=64)) == [[1, 2, 3, 4, 5, 6, 7, 8]]
    assert visited(ids_of([16, 8, 24], T=64)) == [[1, 2, 1, 1, 2, 3, 1, 2]]
    assert visited(ids_of([20, 44], [64], T=64))[0] == [1, 2, 3, 2, 3, 4, 5, 6]
    assert visited(ids_of([64], T=64), window=9) == [[1, 2, 2, 2, 2, 2, 2, 2]]
    assert visited(ids_of([64], T=64), window=10) == [[1, 2, 3, 3, 3, 3, 3, 3]]


def test_blocks_never_hold_all_scores(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 512)
    T, H, D = 8192, 4, 16
    x = jax.ShapeDtypeStruct((1, T, H, D), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, T), jnp.int32)
    weights = jax.ShapeDtypeStruct((1, T, H * D), jnp.float32)
    lowered = compiled.lower(x, x, x, ids, weights, kernel="blocks", window=None, dtype="float32", mesh=None)
    memory = lowered.compile().memory_analysis()
    # scores of one head alone would be 256 MiB
    assert memory.temp_size_in_bytes < 48 * 2**20


# 37 tokens do not go over two devices: "context" is left out
@pytest.mark.parametrize(("kernel", "mesh"), [("blocks", {"fsdp": 2, "tensor": 2, "context": 2}), ("splash", None)])
def test_works_in_a_scan_under_remat(kernel, mesh):
    (q, k, v, ids, weights), _, _ = case("packed")

    def loss(q, kernel, remat, mesh):
        def layer(x, scale):
            out = attend(x, k, v, ids, scale=0.2, dtype=jnp.float32, kernel=kernel, mesh=mesh)
            return x + scale * out.reshape(x.shape), None

        x, _ = jax.lax.scan(jax.checkpoint(layer) if remat else layer, q, jnp.array([0.5, 2.0]))
        return jnp.sum(x.reshape(weights.shape) * weights)

    got = jax.jit(jax.grad(functools.partial(loss, kernel=kernel, remat=True, mesh=mesh and make_mesh(mesh))))(q)
    want = jax.jit(jax.grad(functools.partial(loss, kernel="dense", remat=False, mesh=None)))(q)
    np.testing.assert_allclose(got, want, atol=1e-4)


MESHES = {
    # every device gets all tokens of some heads
    "context, tensor": ({"context": 4, "tensor": 2}, 8, 2, None),
    "every axis": ({"data": 2, "tensor": 2, "context": 2}, 8, 2, None),
    # more devices than key heads
    "tensor": ({"context": 2, "tensor": 4}, 8, 2, None),
    # six heads on four devices do not go: keys are gathered
    "gathered": ({"context": 4, "fsdp": 2}, 6, 3, 7),
    # nor are they divided
    "undivided": ({"tensor": 4, "context": 2}, 6, 3, 7),
}
MESH_CASES = [("blocks", name) for name in MESHES]
MESH_CASES += [(kernel, name) for kernel in ("splash", "dense", "triton") for name in ("every axis", "gathered")]


@pytest.mark.parametrize(("kernel", "name"), MESH_CASES)
def test_a_mesh_gives_what_one_device_gives(name, kernel):
    shape, H, K, window = MESHES[name]
    q, k, v = inputs(8, 40, H, K, 8)
    ids = ids_of(*([[10, 1, 20], [40], [5, 30, 5], []] * 2), T=40)
    weights = weights_of(ids, H * 8)
    want = run(q, k, v, ids, weights, kernel="dense", window=window)
    got = run(q, k, v, ids, weights, kernel=kernel, window=window, mesh=make_mesh(shape))
    assert_close(got, want, ids, atol=2e-5)


def test_a_mesh_without_segments_and_with_too_few_rows():
    q, k, v = inputs(2, 40, 4, 2, 16)
    one = jnp.ones((2, 40), jnp.int32)
    weights = weights_of(one, 64)
    got = run(q, k, v, None, weights, kernel="blocks", mesh=make_mesh({"data": 4, "context": 2}))
    assert_close(got, run(q, k, v, one, weights, kernel="dense"), one, atol=2e-5)


def test_spans_are_what_cudnn_reads():
    ids = jnp.asarray([[1, 1, 1, 2, 2, 0, 0], [4, 5, 5, 5, 5, 5, 9], [0, 0, 3, 3, 0, 0, 0], [0] * 7], jnp.int32)
    starts, lengths, fits = jax.jit(segment_spans, static_argnums=1)(ids, 3)
    assert starts.tolist() == [[0, 3, -1, -1], [0, 1, 6, -1], [2, -1, -1, -1], [-1] * 4]
    assert lengths.tolist() == [[3, 2, -1], [1, 5, 1], [2, -1, -1], [-1] * 3]
    assert fits
    assert starts.dtype == lengths.dtype == jnp.int32


@pytest.mark.parametrize(
    ("row", "fits"),
    [
        ([1, 2, 3, 3], True),
        ([1, 2, 3, 4], False),  # one too many
        ([1, 1, 2, 1], False),  # a segment in two pieces
        ([1, 0, 1, 0], False),
        ([1, 0, 2, 0], True),
        ([2, 2, 1, 1], False),  # whole, but not seen to be
        ([0, 0, 0, 0], True),
    ],
)
def test_spans_say_when_they_do_not_fit(row, fits):
    # the row beside it is fine: one bad row is enough
    ids = jnp.asarray([[1, 1, 1, 1], row], jnp.int32)
    assert bool(jax.jit(segment_spans, static_argnums=1)(ids, 3)[2]) == fits


def stand_in(q, k, v, starts, lengths):
    """What cuDNN is said to do: causal attention in each span, and garbage elsewhere, backwards too."""
    assert q.shape == k.shape == v.shape
    index = jnp.arange(q.shape[1])[None, None]
    first, length = starts[:, : lengths.shape[1], None], lengths[..., None]
    inside = (first >= 0) & (index >= first) & (index < first + length)
    ids = jnp.sum(inside * (1 + jnp.arange(inside.shape[1])[None, :, None]), axis=1)

    def mix(x, ids):
        return jnp.where((ids > 0)[..., None, None], x, jnp.nan)

    garble = jax.custom_vjp(lambda x, ids: x)
    garble.defvjp(lambda x, ids: (x, ids), lambda ids, g: (mix(g, ids), None))
    return mix(attend_dense(*(garble(x, ids) for x in (q, k, v)), ids), ids).astype(q.dtype)


@pytest.mark.parametrize("mesh", [None, {"data": 2, "tensor": 2, "context": 2}])
def test_cudnn_gets_packed_rows(monkeypatch, mesh):
    monkeypatch.setattr(cudnn, "why_not", lambda *_, **__: None)
    monkeypatch.setattr(cudnn, "_packed_kernel", stand_in)
    q, k, v = inputs(2, 40, 4, 2, 16)
    ids = ids_of([10, 1, 20], [40], T=40)
    weights = weights_of(ids, 64)
    compiled.clear_cache()
    got = run(q, k, v, ids, weights, kernel="cudnn", mesh=mesh and make_mesh(mesh), max_segments=3)
    assert_close(got, run(q, k, v, ids, weights, kernel="dense"), ids, atol=2e-5)


def test_more_segments_than_cudnn_was_set_up_for_are_no_numbers(monkeypatch):
    monkeypatch.setattr(cudnn, "why_not", lambda *_, **__: None)
    monkeypatch.setattr(cudnn, "_packed_kernel", stand_in)
    q, k, v = inputs(2, 40, 4, 2, 16)
    ids = ids_of([10, 1, 20], [40], T=40)
    compiled.clear_cache()
    out = run(q, k, v, ids, weights_of(ids, 64), kernel="cudnn", max_segments=2)[0]
    assert np.isnan(out).all()


def test_cudnn_falls_back_with_one_warning():
    warn.warn_once.cache_clear()
    (q, k, v, ids, weights), window, want = case("packed")
    with pytest.warns(UserWarning, match="cuDNN attention is not used: it takes bf16 and fp16, not float32"):
        got = run(q, k, v, ids, weights, kernel="cudnn", window=window)
    assert_close(got, want, ids, atol=1e-5)
    # a second call warns no more, else the suite's filter makes it an error
    jax.eval_shape(lambda: attend(q, k, v, ids, scale=1.0, dtype=jnp.float32, kernel="cudnn"))


@pytest.fixture
def hopper(monkeypatch):
    """JAX as it is beside a Hopper GPU with cuDNN 9.10, enough of it to lower for one."""
    private = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(private, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(private, "check_compute_capability", lambda capability: capability <= "9.0")
    monkeypatch.setattr(private, "is_cuda_compute_capability_equal", lambda capability: capability == "9.0")


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("packed", [True, False])
def test_cudnn_is_what_a_gpu_is_asked_for(packed):
    compiled.clear_cache()
    q, k, v = inputs(2, 64, 4, 2, 64)
    ids = ids_of([30, 20], [64], T=64) if packed else None
    traced = compiled.trace(
        q, k, v, ids, jnp.ones((2, 64, 256)), kernel="cudnn", window=None, dtype="bfloat16", mesh=None, max_segments=5
    )
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmax" in text and "__cudnn$fmhaSoftmaxBackward" in text
    assert re.search(r"max_seg_per_batch\\22: (\d+)", text)[1] == ("5" if packed else "1")


@pytest.mark.usefixtures("hopper")
def test_cudnn_is_not_asked_for_what_it_cannot():
    q = jnp.zeros((1, 8, 2, 64), jnp.bfloat16)
    assert cudnn.why_not(q, q, packed=True, window=None, max_segments=5) is None
    assert "max_segments" in cudnn.why_not(q, q, packed=True, window=None)
    assert "sliding window" in cudnn.why_not(q, q, packed=True, window=3)
    assert cudnn.why_not(q, q, packed=False, window=3) is None
    assert "head dim" in cudnn.why_not(q[..., :60], q[..., :60], packed=False, window=None)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("platform", "T", "head_dim", "dtype", "options", "kernel"),
    [
        ("cpu", 1024, 64, "float32", {}, "dense"),
        ("cpu", 1025, 64, "bfloat16", {}, "blocks"),
        ("tpu", 7, 64, "bfloat16", {}, "splash"),
        ("gpu", 7, 128, "bfloat16", {}, "triton"),
        ("gpu", 7, 128, "bfloat16", {"packed": False}, "cudnn"),
        ("gpu", 7, 128, "bfloat16", {"packed": False, "deterministic": True}, "triton"),
        ("gpu", 7, 100, "float16", {}, "triton"),
        ("gpu", 7, 128, "float32", {}, "blocks"),
    ],
)
def test_the_choice(platform, T, head_dim, dtype, options, kernel):
    assert choose(platform, T, head_dim, dtype, **options) == kernel


@dataclasses.dataclass(frozen=True)
class Device:
    """As JAX describes one, as far as attention asks."""

    compute_capability: str


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("head_dim", "capability", "options", "kernel", "message"),
    [
        (512, "9.0", {}, "blocks", "triton: heads of 512 are wider than 256; cudnn: .*max_segments"),
        (60, "9.0", {"packed": False}, "triton", "'triton' instead of 'cudnn'.*head dim must be"),
        (64, "7.5", {}, "blocks", "compute capability 7.5 is too old.*A GPU of compute capability 8.0 or newer"),
        (64, "7.5", {"max_segments": 9}, "cudnn", "'cudnn' instead of 'triton'. triton: a GPU of .* 7.5 is too old"),
        (64, "gfx942", {"deterministic": True}, "blocks", "AMD's GPUs .*; cudnn: its backward pass is not determ"),
    ],
)
def test_what_a_gpu_lacks_is_said_once(head_dim, capability, options, kernel, message):
    warn.warn_once.cache_clear()
    with pytest.warns(UserWarning, match=message):
        assert choose("gpu", 64, head_dim, "bfloat16", device=Device(capability), **options) == kernel
    assert choose("gpu", 64, head_dim, "bfloat16", device=Device(capability), **options) == kernel


def test_triton_falls_back_with_one_warning(monkeypatch):
    warn.warn_once.cache_clear()
    monkeypatch.setattr(package, "platform_of", lambda mesh: "gpu")
    (q, k, v, ids, _), _, _ = case("packed")
    with pytest.warns(UserWarning, match="Triton is not used: it takes bf16 and fp16, not float32"):
        got = attend(q, k, v, ids, scale=0.2, dtype=jnp.float32, kernel="triton")
    want = attend(q, k, v, ids, scale=0.2, dtype=jnp.float32, kernel="blocks")
    np.testing.assert_array_equal(got, want)


def test_a_jax_without_triton_says_so(monkeypatch):
    pallas._missing.cache_clear()
    monkeypatch.setattr(pallas, "_backend", lambda: importlib.import_module("jax.experimental.pallas.gone"))
    assert "has no Triton backend for Pallas" in pallas.why_not("bfloat16", 64)
    pallas._missing.cache_clear()


@pytest.mark.parametrize("kernel", RUN_ANYWHERE)
@pytest.mark.parametrize("out_dtype", ["bfloat16", "float32"])
def test_the_result_has_the_dtype_that_is_asked_for(kernel, out_dtype):
    (q, k, v, ids, _), _, _ = case("packed")
    compute = functools.partial(attend, scale=1.0, dtype="bfloat16", kernel=kernel, out_dtype=out_dtype)
    assert jax.eval_shape(compute, q, k, v, ids).dtype == out_dtype


def test_the_platform_is_the_meshs():
    assert platform_of(None) == platform_of(make_mesh({"data": 8})) == "cpu"


def test_wrong_arguments():
    q, k, v = inputs(1, 4, 3, 2, 8)
    with pytest.raises(ValueError, match="not a multiple"):
        attend(q, k, v, None, scale=1.0, dtype=jnp.float32)
    with pytest.raises(ValueError, match="window is 0"):
        attend(q, q, q, None, scale=1.0, window=0, dtype=jnp.float32)
    with pytest.raises(ValueError, match="choose auto or one of dense, blocks, splash, triton, cudnn"):
        attend(q, q, q, None, scale=1.0, dtype=jnp.float32, kernel="flash")
    with pytest.raises(ValueError, match="choose auto or triton"):
        attend(q, q, q, None, scale=1.0, dtype=jnp.bfloat16, kernel="cudnn", deterministic=True)
