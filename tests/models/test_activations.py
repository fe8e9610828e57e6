"""Activations in bf16, as accelerators have them: what is rounded, what is kept, and how far from fp32 that leads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxdistill.losses import chunked_cross_entropy
from jaxdistill.models import (
    Lora,
    ModelConfig,
    abstract_model,
    layers,
    load_hf,
    params_of,
    rotary,
    with_lora,
    with_params,
)
from jaxdistill.models.published import PUBLISHED
from jaxdistill.parallel.mesh import make_mesh
from tests.models import tiny
from tests.models.test_parity import CASES, tokens_of

BF16 = jnp.bfloat16


def in_bf16(model, **more):
    """The same parameters in a model that computes and hands on in bf16."""
    abstract = abstract_model(model.config, dtype=BF16, activations=BF16, lora=model.lora, **more)
    return with_params(abstract, params_of(model))


def relative(got, want):
    return np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)


@pytest.mark.parametrize(("family", "tie"), CASES)
def test_logits_are_as_near_to_fp32_as_those_of_transformers_in_bf16(tmp_path, family, tie):
    reference = tiny.make(family, tmp_path, tie=tie, initializer_range=0.05)
    ids = tokens_of((2, 64))
    with torch.no_grad():
        want = reference(torch.from_numpy(ids)).logits.numpy().astype(np.float64)
        theirs = reference.to(torch.bfloat16)(torch.from_numpy(ids)).logits.float().numpy()
    ours = in_bf16(load_hf(tmp_path))(jnp.asarray(ids))
    assert ours.dtype == jnp.float32
    assert relative(ours, want) <= 1.1 * relative(theirs, want)


@pytest.mark.parametrize("shape", [(3, 5, 48), (2, 7, 3, 16), (1, 1, 1)])
@pytest.mark.parametrize("offset", [False, True])
def test_the_norm_of_bf16_inputs_has_the_gradients_of_the_fp32_one(shape, offset):
    rng = np.random.default_rng(0)
    x, g = (jnp.asarray(rng.normal(size=shape), BF16) for _ in range(2))
    scale = jnp.asarray(rng.normal(size=shape[-1]), jnp.float32)

    def weighted(x, scale, out_dtype):
        y = layers.rms_norm(x, scale, 1e-6, offset=offset, out_dtype=out_dtype)
        assert y.dtype == out_dtype
        return jnp.sum(y.astype(jnp.float32) * g.astype(jnp.float32))

    want, (dx, ds) = jax.value_and_grad(weighted, argnums=(0, 1))(x.astype(jnp.float32), scale, jnp.float32)
    got, (dx_bf16, ds_bf16) = jax.value_and_grad(weighted, argnums=(0, 1))(x, scale, BF16)
    assert dx_bf16.dtype == BF16 and ds_bf16.dtype == jnp.float32
    atol = 2**-8 * float(jnp.abs(dx).max() + 1e-6)
    np.testing.assert_allclose(got, want, rtol=2**-6, atol=2**-6 * np.sqrt(x.size))
    np.testing.assert_allclose(dx_bf16.astype(jnp.float32), dx, atol=atol)
    # the gradient by the scale is a sum of fp32 numbers: nothing of it is rounded
    np.testing.assert_allclose(ds_bf16, ds, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", layers.ACTIVATIONS)
def test_the_gate_is_computed_in_fp32_and_rounded_once(activation):
    rng = np.random.default_rng(1)
    gate, up, g = (jnp.asarray(3 * rng.normal(size=(33, 7)), BF16) for _ in range(3))
    wide = [x.astype(jnp.float32) for x in (gate, up, g)]
    want, pull = jax.vjp(lambda a, b: layers.ACTIVATIONS[activation](a) * b, *wide[:2])
    got, pull_bf16 = jax.vjp(lambda a, b: layers.gated(activation, a, b), gate, up)
    for ours, reference in zip((got, *pull_bf16(g)), (want, *pull(wide[2])), strict=True):
        assert ours.dtype == BF16
        np.testing.assert_allclose(ours.astype(jnp.float32), reference, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("share", [0.05, 0.1, 0.3])
def test_dropout_keeps_the_mean_in_bf16_too(share):
    x = jnp.asarray(np.random.default_rng(8).normal(size=1 << 18), BF16)
    kept = np.asarray(layers.dropout(x, share, jax.random.key(0)), np.float64)
    wide = np.asarray(x, np.float64)
    used = kept != 0
    # what is left is scaled by 1 / (1 - share), but for roundings that cancel
    factor = (kept * wide)[used].sum() / (wide * wide)[used].sum()
    assert abs(factor * (1 - share) - 1) < 1e-4


def test_a_product_sums_in_fp32_and_rounds_once():
    rng = np.random.default_rng(2)
    x, w = jnp.asarray(rng.normal(size=(5, 2048)), BF16), jnp.asarray(rng.normal(size=(2048, 3)), jnp.float32)
    exact = np.asarray(x, np.float64) @ np.asarray(w.astype(BF16), np.float64)
    np.testing.assert_allclose(layers.matmul(x, w, BF16, BF16).astype(jnp.float32), exact, rtol=2**-8, atol=2e-3)
    dx, dw = jax.grad(lambda x, w: jnp.sum(layers.matmul(x, w, BF16, BF16).astype(jnp.float32)), argnums=(0, 1))(x, w)
    assert dx.dtype == BF16 and dw.dtype == jnp.float32
    np.testing.assert_allclose(dw[:, 0], np.asarray(x, np.float64).sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_what_the_layers_keep_is_bf16_and_parameters_have_fp32_gradients(tmp_path, family):
    tiny.make(family, tmp_path, tie=True, num_hidden_layers=9, layer_types=None)
    model, ids = load_hf(tmp_path), jnp.asarray(tokens_of((2, 40)))
    bf16, params = in_bf16(model), params_of(model)

    def kept(model):
        """Bytes of activations, [2, 40, ...], that lie between the passes, by dtype."""
        _, pull = jax.eval_shape(lambda p: jax.vjp(lambda p: with_params(model, p).hidden(ids), p), params)
        found = {}
        for x in jax.tree.leaves(pull):
            if 2 in x.shape and 40 in x.shape and x.size >= 2 * 40 * 16 and jnp.issubdtype(x.dtype, jnp.floating):
                found[x.dtype.name] = found.get(x.dtype.name, 0) + x.size * x.dtype.itemsize
        return found

    wide, narrow = kept(with_params(abstract_model(model.config, dtype=BF16), params)), kept(bf16)
    assert narrow["bfloat16"] > 0
    assert sum(narrow.values()) < 0.65 * sum(wide.values())
    hidden, pull = jax.vjp(lambda p: with_params(bf16, p).hidden(ids), params)
    assert hidden.dtype == BF16
    assert {g.dtype.name for g in jax.tree.leaves(pull(jnp.ones_like(hidden))[0])} == {"float32"}


def test_the_loss_hands_back_bf16_gradients_for_bf16_hidden_states():
    rng = np.random.default_rng(3)
    hidden, head = rng.normal(size=(2, 9, 24)), rng.normal(size=(53, 24)).astype(np.float32)
    targets, weights = jnp.asarray(rng.integers(0, 53, (2, 9))), jnp.asarray(rng.integers(0, 2, (2, 9)), jnp.float32)

    def loss(hidden, head):
        return chunked_cross_entropy(hidden, head, targets, weights, dtype=BF16, chunk=4)[0]

    narrow = jnp.asarray(hidden, BF16)
    by_hidden, by_head = jax.grad(loss, argnums=(0, 1))(narrow, jnp.asarray(head))
    want_hidden, want_head = jax.grad(loss, argnums=(0, 1))(narrow.astype(jnp.float32), jnp.asarray(head))
    assert by_hidden.dtype == BF16 and by_head.dtype == jnp.float32
    np.testing.assert_array_equal(by_hidden, want_hidden.astype(BF16))
    np.testing.assert_array_equal(by_head, want_head)


def test_adapters_and_biases_do_not_widen_the_stream(tmp_path):
    tiny.make("qwen2", tmp_path)
    model = with_lora(load_hf(tmp_path), Lora.of(4, 8.0, 0.0, "all-linear"), 0)
    ids = jnp.asarray(tokens_of((1, 12)))
    assert in_bf16(model).hidden(ids).dtype == BF16
    assert model.hidden(ids).dtype == jnp.float32


@pytest.mark.parametrize("factor", [1.0, 0.25, 0.3])
@pytest.mark.parametrize("stretch", [1.0, 1.3])
def test_norm_and_rotation_in_one_have_the_gradients_of_the_two(factor, stretch):
    rng = np.random.default_rng(4)
    shape, D = (2, 7, 3, 16), 16
    x, g = (jnp.asarray(rng.normal(size=shape), BF16) for _ in range(2))
    scale = jnp.asarray(rng.normal(size=D), jnp.float32)
    frequencies = np.asarray(10000.0 ** (-np.arange(0, D, 2) / D), np.float32)
    tables = layers.rope_tables(jnp.broadcast_to(jnp.arange(7)[None], (2, 7)), frequencies, stretch)

    def joined(x, scale):
        return rotary.turn_in_halves(x, scale, tables, 1e-6, factor)

    def apart(x, scale):
        return layers.apply_rope(layers.rms_norm(x, scale, 1e-6), tables) * factor

    got, pull = jax.vjp(joined, x, scale)
    want, pull_fp32 = jax.vjp(apart, x.astype(jnp.float32), scale)
    assert got.dtype == BF16
    np.testing.assert_allclose(got.astype(jnp.float32), want, rtol=2**-8, atol=1e-6)
    (dx, by_scale), (want_dx, want_by_scale) = pull(g), pull_fp32(g.astype(jnp.float32))
    np.testing.assert_allclose(dx.astype(jnp.float32), want_dx, atol=2**-8 * float(jnp.abs(want_dx).max()))
    np.testing.assert_allclose(by_scale, want_by_scale, rtol=1e-5, atol=1e-5)


def test_a_gated_product_has_the_gradients_of_gate_and_product():
    rng = np.random.default_rng(5)
    gate, up = (jnp.asarray(rng.normal(size=(2, 5, 24)), BF16) for _ in range(2))
    w, g = jnp.asarray(rng.normal(size=(24, 7)), jnp.float32), jnp.asarray(rng.normal(size=(2, 5, 7)), BF16)
    for activation in layers.ACTIVATIONS:
        joined = jax.vjp(lambda *a, name=activation: layers.gated_matmul(name, *a, BF16, BF16), gate, up, w)
        apart = jax.vjp(
            lambda a, b, w, name=activation: layers.matmul(layers.gated(name, a, b), w, BF16, BF16), gate, up, w
        )
        np.testing.assert_array_equal(joined[0], apart[0])
        for ours, theirs in zip(joined[1](g), apart[1](g), strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("sizes", [None, {"data": 2, "fsdp": 2}, {"fsdp": 2, "tensor": 2, "context": 2}])
@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_layers_that_take_rows_in_parts_change_nothing(tmp_path, sizes, family):
    """Hidden states and gradients are those of whole batches, whatever part a row is in."""
    tiny.make(family, tmp_path, tie=True, num_attention_heads=4, num_key_value_heads=2, vocab_size=96)
    mesh = None if sizes is None else make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
    ids = jnp.asarray(tokens_of((8, 24), vocab=96))
    segments = jnp.asarray(np.sort(np.random.default_rng(6).integers(1, 4, (8, 24))), jnp.int32)
    model = load_hf(tmp_path, mesh)
    params, weights = params_of(model), jnp.asarray(np.random.default_rng(7).normal(size=(8, 24, 48)), jnp.float32)

    def loss(params, parts):
        abstract = abstract_model(model.config, mesh=mesh, remat="full", layer_parts=parts)
        return jnp.sum(with_params(abstract, params).hidden(ids, None, segments) * weights)

    compiled = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    want, by_whole = compiled(params, 1)
    for parts in (2,) if mesh is not None else (2, 4, 8):
        got, by_parts = compiled(params, parts)
        np.testing.assert_allclose(got, want, rtol=1e-4)
        for a, b in zip(jax.tree.leaves(by_whole), jax.tree.leaves(by_parts), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(a).max()) + 1e-6)


@pytest.mark.parametrize(("sizes", "rows"), [(None, 3), (None, 6), ({"data": 2}, 4)])
def test_rows_that_the_parts_do_not_divide_are_taken_in_fewer(tmp_path, sizes, rows):
    """A step's pairs, its rollouts, and the stored rows that these leave need not be as many as the step's rows."""
    tiny.make("qwen3", tmp_path, tie=True, num_attention_heads=4, num_key_value_heads=2, vocab_size=96)
    mesh = None if sizes is None else make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
    model, ids = load_hf(tmp_path, mesh), jnp.asarray(tokens_of((rows, 24), vocab=96))

    def loss(params, parts):
        abstract = abstract_model(model.config, mesh=mesh, remat="full", layer_parts=parts)
        return jnp.sum(with_params(abstract, params).hidden(ids) ** 2)

    compiled = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    (want, by_whole), (got, by_parts) = (compiled(params_of(model), parts) for parts in (1, 4))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(by_whole), jax.tree.leaves(by_parts), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(a).max()) + 1e-6)


def test_parts_that_a_layer_cannot_take_are_refused():
    config = ModelConfig.from_hf(PUBLISHED["Qwen3-0.6B"][0], "Qwen3-0.6B")
    abstract_model(config, remat="full", layer_parts=2)
    abstract_model(config, remat="none", lora=Lora.of(4, 8.0), layer_parts=1)
    with pytest.raises(ValueError, match=r"layer_parts is 2 beside remat 'full' and adapters; .*: leave it at 1\."):
        abstract_model(config, remat="full", lora=Lora.of(4, 8.0), layer_parts=2)
    with pytest.raises(ValueError, match="layer_parts is 2 beside remat 'dots'; "):
        abstract_model(config, remat="dots", layer_parts=2)
    with pytest.raises(ValueError, match="layer_parts is 0"):
        abstract_model(config, remat="full", layer_parts=0)


def test_every_remat_policy_keeps_what_it_says(tmp_path):
    """Matrix products in the backward pass: with `dots` those of the gradients alone, with `full` the forward's too."""
    tiny.make("qwen2", tmp_path, num_hidden_layers=2, max_position_embeddings=64)
    model, ids = in_bf16(load_hf(tmp_path)), jnp.asarray(tokens_of((1, 16)))

    def products(policy):
        model_ = in_bf16(model, remat=policy)

        def loss(params):
            return jnp.sum(with_params(model_, params).hidden(ids).astype(jnp.float32))

        return count(jax.make_jaxpr(jax.grad(loss))(params_of(model)).jaxpr)

    def count(jaxpr):
        subs = [x for eqn in jaxpr.eqns for x in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_jaxpr)]
        inner = sum(count(getattr(x, "jaxpr", x)) for x in subs if is_jaxpr(x))
        return inner + sum(eqn.primitive.name == "dot_general" for eqn in jaxpr.eqns)

    def is_jaxpr(x):
        return hasattr(x, "eqns") or hasattr(getattr(x, "jaxpr", None), "eqns")

    found = {policy: products(policy) for policy in ("none", "dots", "attention", "full")}
    # one more a layer, of attention's scores: on CPUs its weights, tokens by tokens, are never kept
    assert found["none"] + 1 == found["dots"] < found["attention"] < found["full"]
