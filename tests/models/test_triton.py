"""The flash attention in Triton, its steps in interpret mode: what `test_attention` does not ask of every kernel."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.models import attention as package
from jaxdistill.models.attention import ATTENDED, STATISTICS, keep_attention, pallas, triton
from jaxdistill.models.attention import attention as attend
from jaxdistill.models.attention.tiles import PAD_ROW, make_tiles
from jaxdistill.models.attention.triton import attend_triton, sizes_of
from jaxdistill.parallel.mesh import make_mesh
from tests.models.test_attention import SMALL, hopper, ids_of, inputs, reference, weights_of

pytestmark = pytest.mark.usefixtures("small_tiles")
__all__ = ["hopper"]


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(triton, "sizes_of", lambda *_: SMALL)


@functools.partial(jax.jit, static_argnames=("window", "dtype"))
def compiled(q, k, v, ids, weights, *, window=None, dtype="float32"):
    """(output, dq, dk, dv) of a sum of the output times `weights` [B, T, H, D]."""

    def loss(q, k, v):
        arguments = ((q * q.shape[-1] ** -0.5).astype(dtype), k.astype(dtype), v.astype(dtype), ids)
        out = attend_triton(*arguments, window=window, interpret=True)
        return jnp.sum(out * weights), out

    (_, out), gradients = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    return out, *gradients


def case(rows, T, H, K, D, window=None):
    """((q, k, v, ids, weights), what the definition gives)."""
    q, k, v = inputs(len(rows), T, H, K, D)
    ids = jnp.asarray(ids_of(*rows, T=T))
    weights = weights_of(ids, H * D)
    out, *gradients = reference(q, k, v, ids, weights, scale=D**-0.5, window=window)
    real = np.asarray(ids > 0)[..., None, None]
    return (q, k, v, ids, weights.reshape(q.shape)), (out.reshape(q.shape) * real, *gradients)


# heads that are no power of 2, many segments of one to a few tokens, windows across and within them
@pytest.mark.parametrize(
    ("rows", "T", "H", "K", "D", "window"),
    [
        ([[1] * 20 + [2, 3] * 8, [33, 20]], 61, 3, 1, 20, None),
        ([[40, 2, 18], []], 64, 2, 2, 40, 7),
        ([[100]], 100, 2, 1, 16, 40),
    ],
)
def test_it_is_the_definition_and_padding_is_exactly_zero(rows, T, H, K, D, window):
    arguments, want = case(rows, T, H, K, D, window)
    got = compiled(*arguments, window=window)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    padding = np.asarray(arguments[3] == 0)
    for a in got:
        assert not np.asarray(a)[padding].any()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_are_rounded_once(dtype):
    arguments, want = case([[10, 1, 20], [37]], 37, 4, 2, 24)
    got = compiled(*arguments, dtype=dtype)
    assert got[0].dtype == dtype
    # of the inputs, the weights and the result: 3 roundings of 2**-9 (2**-12), of numbers around 1
    step = {"bfloat16": 2**-9, "float16": 2**-12}[dtype]
    for a, b in zip(got, want, strict=True):
        assert np.abs(np.asarray(a, np.float64) - b).max() < 6 * step * max(1, np.abs(b).max())


def test_padding_behind_the_segments_never_matters_even_as_nan():
    (q, k, v, ids, weights), want = case([[20, 13], [60]], 70, 4, 2, 16)
    padding = (ids == 0)[..., None, None]
    got = compiled(*(jnp.where(padding, jnp.nan, x) for x in (q, k, v)), ids, jnp.where(padding, jnp.nan, weights))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_the_same_inputs_give_the_same_bits():
    arguments, _ = case([[10, 1, 20], [37]], 37, 4, 2, 24)
    for a, b in zip(compiled(*arguments), compiled(*arguments), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_segment_has_the_same_bits_wherever_it_lies():
    """Blocks of keys begin at other tokens of it, but the sums of one block are the whole segment's."""
    q, k, v = inputs(1, 16, 2, 1, 16)
    fill = [(0, 0), (32, 16), (0, 0), (0, 0)]
    ids = jnp.asarray(ids_of([32, 16], T=64))
    compute = jax.jit(functools.partial(attend_triton, interpret=True))
    alone = compute(q, k, v, jnp.ones((1, 16), jnp.int32))
    among = compute(*(jnp.pad(x, fill, constant_values=3.0) for x in (q, k, v)), ids)
    np.testing.assert_array_equal(alone, among[:, 32:48])


def visible_pairs(row_ids, column_ids, start, window):
    rows, columns = start + np.arange(len(row_ids))[:, None], np.arange(len(column_ids))[None]
    near = (rows >= columns) & (columns > rows - (window or 10**9))
    return near & (row_ids[:, None] == column_ids[None]) & (column_ids[None] != 0)


TORN = [7, 2, 2, 0, 9, 2, 7, 7, 7, 1, 1, 1, 1, 0, 0, 5]


@pytest.mark.parametrize("window", [None, 9, 30])
@pytest.mark.parametrize("start", [0, 32])
@pytest.mark.parametrize("rows", [[[64, 60]], [[5, 3, 40, 1, 70]], [[1] * 100], [[128]], [[]], "torn"])
def test_no_pair_is_left_out_and_no_mask_where_one_is_needed(rows, start, window):
    ids = np.repeat(np.array([TORN], np.int32), 8, axis=1) if rows == "torn" else ids_of(*rows, T=128)
    row_ids = np.where(ids == 0, PAD_ROW, ids)[:, start:]
    Q, C = 8, 16
    tiles = make_tiles(jnp.asarray(row_ids), jnp.asarray(ids), start, window, Q, C)
    pairs = visible_pairs(row_ids[0], ids[0], start, window)
    blocks = pairs.reshape(len(row_ids[0]) // Q, Q, 128 // C, C).swapaxes(1, 2)
    for seen, bounds in ((blocks, tiles.of_queries[0]), (blocks.swapaxes(0, 1), tiles.of_keys[0])):
        for line, (first, clear_first, clear_end, end, offset, _) in zip(seen, bounds.tolist(), strict=True):
            visited = {j for j in range(len(line)) if line[j].any()}
            clear = set(range(clear_first, clear_end))
            assert visited <= set(range(first, end)) and clear <= set(range(first, end)) and offset == start
            assert all(line[j].all() for j in clear)
            if rows != "torn":
                # ids that rise: nothing is visited for nothing, and every block that can be is clear
                assert visited == set(range(first, end))
                assert clear == {j for j in visited if line[j].all()}


def work(lengths, T=8192, Q=128, C=64):
    """Pairs of tokens in the blocks that the forward pass visits."""
    ids = jnp.asarray(ids_of(lengths, T=T))
    bounds = make_tiles(jnp.where(ids == 0, PAD_ROW, ids), ids, 0, None, Q, C).of_queries
    return int((bounds[..., 3] - bounds[..., 0]).sum()) * Q * C


def test_work_falls_with_the_pairs():
    """Segments of uneven lengths: 8192 tokens in 6, 31, 40 and 100 of them."""
    rng = np.random.default_rng(0)
    whole = work([8192])
    assert whole < 1.02 * 8192 * 8193 / 2
    before = whole
    for count in (6, 31, 40, 100):
        lengths = np.diff([0, *np.sort(rng.choice(np.arange(1, 8192), count - 1, replace=False)), 8192])
        pairs = sum(n * (n + 1) / 2 for n in lengths)
        # a segment's first block of queries and of keys reach into its neighbours
        assert pairs <= work(lengths) <= pairs + 8192 * (128 + 64)
        assert work(lengths) < before
        before = work(lengths)


FORWARD = {"triton": "attention_forward", "blocks": "key_blocks", "splash": "splash_mha_fwd"}
NAMES = jax.checkpoint_policies.save_only_these_names(ATTENDED, STATISTICS)


def gradient(kernel, policy, ids, mesh=None):
    """Of two layers of attention and nothing else, in one scan."""

    def loss(x, k, v):
        def layer(x, _):
            out = attend(
                jnp.sin(x), k, v, ids, scale=0.2, dtype=x.dtype, kernel=kernel, mesh=mesh, out_dtype=x.dtype,
                max_segments=5,
            )  # fmt: skip
            return x + out.reshape(x.shape), None

        x, _ = jax.lax.scan(jax.checkpoint(layer, policy=policy), x, length=2)
        return jnp.sum(jnp.sin(x.astype(jnp.float32)))

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))


@pytest.mark.parametrize("mesh", [None, {"data": 2, "tensor": 2, "context": 2}])
@pytest.mark.parametrize("kernel", FORWARD)
def test_a_policy_keeps_what_the_backward_pass_needs(kernel, mesh):
    q, k, v = inputs(2, 64, 4, 4, 16)
    ids = jnp.asarray(ids_of([10, 1, 20], [37], T=64))
    mesh = mesh and make_mesh(mesh)

    def forward_again(policy):
        text = gradient(kernel, policy, ids, mesh).lower(q, k, v).compile().as_text()
        assert FORWARD[kernel] in text
        return re.search(f'rematted_computation/[^"]*{FORWARD[kernel]}', text) is not None

    assert forward_again(None)
    assert not forward_again(NAMES)
    assert not forward_again(keep_attention)


def lowered_for_cuda(monkeypatch, kernel, policy, ids):
    monkeypatch.setattr(package, "platform_of", lambda mesh: "gpu")
    q, k = (jax.ShapeDtypeStruct((2, 64, heads, 64), jnp.bfloat16) for heads in (4, 2))
    return gradient(kernel, policy, ids).trace(q, k, k).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.usefixtures("hopper")
def test_cudnn_runs_forward_once_under_the_policy(monkeypatch):
    ids = jnp.asarray(ids_of([30, 20], [64], T=64))
    for segments in (ids, None):
        texts = [lowered_for_cuda(monkeypatch, "cudnn", policy, segments) for policy in (None, keep_attention)]
        assert [len(re.findall(r"fmhaSoftmax\(", text)) for text in texts] == [2, 1]
        assert [len(re.findall(r"fmhaSoftmaxBackward\(", text)) for text in texts] == [1, 1]


def test_it_lowers_for_cuda(monkeypatch):
    ids = jnp.asarray(ids_of([30, 20], [64], T=64))
    # JAX 0.11 and later want to know which GPU
    device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("any",), abstract_device=device)):
        text = lowered_for_cuda(monkeypatch, "triton", NAMES, ids)
    assert "__gpu$xla.gpu.triton" in text
    for name in ("attention_forward", "attention_keys", "attention_queries"):
        assert f'name = "{name}"' in text


@pytest.mark.parametrize("roomy", [True, False])
def test_every_size_of_head_has_tiles(roomy):
    for head_dim in range(1, pallas.HEAD_DIM + 1):
        # products of matrices take 16 of each, and arrays are powers of 2
        assert all(n >= 16 and n & (n - 1) == 0 for tile in sizes_of(head_dim, roomy) for n in (tile.Q, tile.C))
