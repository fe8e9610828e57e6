"""The fused token step: its kernels, interpreted on a CPU, against formulas, and the whole against the general step."""

import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.generate import fused, rows
from jaxdistill.generate.appended import append_and_attend
from jaxdistill.generate.products import Tiles, product
from jaxdistill.models import ModelConfig, load_hf
from jaxdistill.models.attention import attention
from jaxdistill.models.attention.cached import KV
from jaxdistill.models.layers import ACTIVATIONS, apply_rope, rms_norm
from jaxdistill.parallel import mesh as meshes
from jaxdistill.plan import environments
from tests.generate.test_decode import prompts, run
from tests.models import tiny

B, K, G, D, SLOTS = 3, 2, 3, 16, 128
LENGTHS = (5, 64, 33)
"""Tokens before the new one: within a block, a whole one, more than one window."""


def normal(*shape, seed=0, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32)).astype(dtype)


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 48, 80), (16, 128, 64), (21, 896, 32), (130, 128, 256)])
def test_a_product_is_its_formula(rows, inputs, outputs):
    x, w, scale = normal(rows, inputs), normal(inputs, outputs, seed=1), normal(inputs, seed=2)
    bias, residual = normal(outputs, seed=3), normal(rows, outputs, seed=4)
    up = normal(inputs, outputs, seed=5)
    with jax.default_matmul_precision("highest"):
        found = product(x, [w], scale_I=scale, eps=1e-5, bias_O=bias, residual_BO=residual, interpret=True)
        np.testing.assert_allclose(found, rms_norm(x, scale, 1e-5) @ w + bias[None] + residual, rtol=1e-4, atol=1e-3)
        for activation, f in ACTIVATIONS.items():
            found = product(x, [w, up], activation=activation, interpret=True)
            np.testing.assert_allclose(found, f(x @ w) * (x @ up), rtol=1e-4, atol=1e-2)
        np.testing.assert_allclose(product(x, [w], interpret=True), x @ w, rtol=1e-4, atol=1e-3)


def test_a_product_in_bf16_rounds_once():
    """As near to the exact result as bf16 can be, from inputs that are bf16 themselves."""
    x, w = normal(20, 256, dtype=jnp.bfloat16), normal(256, 64, seed=1, dtype=jnp.bfloat16)
    residual = normal(20, 64, seed=2, dtype=jnp.bfloat16)
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64) + np.asarray(residual, np.float64)
    found = np.asarray(product(x, [w], residual_BO=residual, interpret=True), np.float64)
    assert np.all(np.abs(found - exact) <= 2.0**-8 * np.abs(exact) + 1e-4)


def test_a_row_of_a_product_does_not_depend_on_the_others():
    x, w, scale = normal(64, 128), normal(128, 64, seed=1), normal(128, seed=2)
    whole = product(x, [w], scale_I=scale, interpret=True)
    other = product(jnp.concatenate([normal(63, 128, seed=9), x[:1]]), [w], scale_I=scale, interpret=True)
    np.testing.assert_array_equal(other[-1], whole[0])


@pytest.mark.parametrize("rows", [1, 5, 64, 100, 512])
@pytest.mark.parametrize(("inputs", "outputs"), [(1024, 4096), (2048, 1024), (896, 1152), (4864, 896), (576, 192)])
def test_tiles_cover_a_matrix_and_fit_into_the_memory(rows, inputs, outputs):
    for matrices, roomy in ((1, True), (2, True), (1, False), (2, False)):
        t = Tiles.of(rows, inputs, outputs, matrices, roomy=roomy)
        assert inputs % t.inputs == 0 and outputs % t.outputs == 0
        assert all(n & (n - 1) == 0 and n >= 16 for n in (t.rows, t.inputs, t.outputs))
        ahead = (t.stages - 1) * t.inputs * (t.rows + matrices * t.outputs)
        assert 2 * (ahead + t.rows * t.inputs) <= (227 if roomy else 99) * 1024


def test_no_tiles_for_a_matrix_that_nothing_divides():
    assert Tiles.of(4, 100, 64) is None
    with pytest.raises(ValueError, match="no tile divides a matrix of 100 x 64"):
        product(normal(4, 100), [normal(100, 64)], interpret=True)


def sequence(group=G):
    T = max(LENGTHS) + 1
    return (normal(B, T, heads, D, seed=heads) for heads in (K * group, K, K + 10))


def appended(slots=SLOTS, window=None, group=G, garbage=0.0, rows=range(B)):
    """The attention of each row's token at LENGTHS[b] to what is before it; and the cache after it."""
    q, k, v = sequence(group)
    v = v[:, :, :K]
    cache = KV.empty(B, K, slots, D, jnp.float32)
    cache = KV(cache.keys + garbage, cache.values + garbage)
    parts = []
    for b in rows:
        n = LENGTHS[b]
        part = KV(*(x[b : b + 1] for x in cache))
        parts.append(part.written(KV.of(k[b : b + 1, :n], v[b : b + 1, :n], jnp.float32), jnp.int32(0)))
    cache = KV(*(jnp.concatenate(x) for x in zip(*parts, strict=True)))
    new = [jnp.stack([x[b, LENGTHS[b]] for b in rows]) for x in (q, k, v)]
    R = len(list(rows))
    qkv = jnp.concatenate([new[0].reshape(R, K, group, D), new[1][:, :, None], new[2][:, :, None]], axis=2)
    position = jnp.array([LENGTHS[b] for b in rows], jnp.int32)
    return append_and_attend(
        qkv, cache, position, scale=D**-0.5, window=window, norms=None, rope=None, interpret=True
    )  # fmt: skip


@pytest.mark.parametrize(("window", "group"), [(None, 3), (None, 1), (None, 20), (1, 3), (33, 3), (60, 3)])
def test_it_is_the_attention_of_the_whole_sequence(window, group):
    q, k, v = sequence(group)
    whole = attention(q, k, v[:, :, :K], None, scale=D**-0.5, window=window, dtype=jnp.float32)
    expected = np.stack([np.asarray(whole[b, n]) for b, n in enumerate(LENGTHS)])
    np.testing.assert_allclose(appended(window=window, group=group)[0], expected, atol=1e-5)


def test_other_rows_slots_and_a_longer_cache_change_no_bit():
    out, _ = appended()
    np.testing.assert_array_equal(appended(slots=512)[0], out)
    np.testing.assert_array_equal(appended(garbage=100.0)[0], out)
    np.testing.assert_array_equal(appended(rows=(2, 0))[0], out[jnp.array([2, 0])])


def test_the_token_is_written_to_its_slot_alone():
    _, k, v = sequence()
    _, cache = appended(garbage=7.0)
    for b, n in enumerate(LENGTHS):
        np.testing.assert_array_equal(cache.keys[b, :, :, : n + 1], k[b, : n + 1].transpose(1, 2, 0))
        np.testing.assert_array_equal(cache.values[b, :, : n + 1], v[b, : n + 1, :K].transpose(1, 0, 2))
        assert np.all(np.asarray(cache.keys[b, :, :, n + 1 :]) == 7) and np.all(cache.values[b, :, n + 1 :] == 7)


def test_beyond_the_cache_nothing_is_written():
    cache = KV(normal(1, K, D, 64), normal(1, K, 64, D, seed=1))
    qkv = normal(1, K, G + 2, D, seed=2)
    out, after = append_and_attend(
        qkv, cache, jnp.array([64], jnp.int32), scale=1.0, window=None, norms=None, rope=None, interpret=True
    )  # fmt: skip
    assert np.isfinite(out).all()
    np.testing.assert_array_equal(after.keys, cache.keys)
    np.testing.assert_array_equal(after.values, cache.values)


def test_norms_and_rotation_are_those_of_the_layers():
    qkv = normal(B, K, G + 2, D, seed=3)
    scales, eps = (normal(D, seed=4), normal(D, seed=5)), 1e-6
    angles = normal(B, D // 2, seed=6)
    tables = jnp.cos(angles), jnp.sin(angles)
    cache = KV(normal(B, K, D, 64, seed=7), normal(B, K, 64, D, seed=8))
    position = jnp.array(LENGTHS, jnp.int32)
    options = {"scale": 0.3, "window": None, "interpret": True}
    found, after = append_and_attend(qkv, cache, position, norms=(*scales, eps), rope=tables, **options)
    q, k = rms_norm(qkv[:, :, :G], scales[0], eps), rms_norm(qkv[:, :, G : G + 1], scales[1], eps)
    rotate = (tables[0][:, None, None], tables[1][:, None, None])
    by_hand = jnp.concatenate([apply_rope(q, rotate), apply_rope(k, rotate), qkv[:, :, G + 1 :]], axis=2)
    expected, plain = append_and_attend(by_hand, cache, position, norms=None, rope=None, **options)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(after.keys, plain.keys, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen2", "gemma3_text"])
def test_packed_parameters_come_apart_again(family, tmp_path):
    tiny.make(family, tmp_path)
    model = load_hf(tmp_path)
    layer = {name: x[1] for name, x in model.layer_params().items()}
    again = fused.unpacked(model.config, fused.packed(model.config, layer))
    assert set(again) == set(layer)
    for name, x in layer.items():
        np.testing.assert_allclose(again[name], x, atol=1e-6)


@pytest.fixture
def forced(monkeypatch):
    """Decoding that takes the fused step, whose kernels are interpreted here."""
    monkeypatch.setattr(rows, "_fused", lambda model: True)


@pytest.mark.parametrize("family", ["qwen2", "smollm3", "gemma3_text"])
def test_it_gives_the_tokens_of_the_general_step(family, tmp_path, monkeypatch):
    """Biases, layers without positions, windows and norms after; rows of unequal length that are refilled."""
    tiny.make(family, tmp_path, max_position_embeddings=128)
    model = load_hf(tmp_path)
    some = prompts((3, 40, 17))
    options = {"temperature": 0.0, "max_tokens": [5, 30, 9], "batch": 2}
    expected = run(model, some, [0] * 3, **options)
    monkeypatch.setattr(rows, "_fused", lambda model: True)
    assert run(model, some, [0] * 3, **options) == expected


def test_a_sample_depends_on_its_prompt_and_seed_alone(tmp_path, forced):
    tiny.make("qwen3", tmp_path, num_hidden_layers=1, max_position_embeddings=256)
    model = load_hf(tmp_path)
    some, options = prompts((3, 30, 17)), {"top_p": 0.9, "max_tokens": 9}
    together = run(model, some, [0, 1, 2], **options)
    assert [run(model, [p], [s], **options)[0] for s, p in enumerate(some)] == together
    long = prompts((3, 30, 17, 150))
    assert run(model, long[3:] + long[:3], [7, 0, 1, 2], **options)[1:] == together


def test_rows_over_devices_give_the_same_tokens(tmp_path, forced):
    tiny.make("qwen3", tmp_path, num_hidden_layers=1, max_position_embeddings=128)
    mesh = meshes.make_mesh({"data": 2, "fsdp": 4})
    options = {"temperature": 0.0, "batch": 8, "max_tokens": 6}
    some = prompts((3, 30, 17))
    assert run(load_hf(tmp_path, mesh), some, [0] * 3, **options) == run(load_hf(tmp_path), some, [0] * 3, **options)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"head_dim": 24}, "head_dim 24"),
        ({"hidden_size": 100}, "no tile divides a matrix of"),
        ({"dtype": "float32"}, "it takes models in bf16"),
        ({"adapters": True}, "it knows no adapters"),
        ({}, None),
    ],
)
def test_it_says_why_not(change, why):
    shape = {
        "model_type": "qwen3", "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    }  # fmt: skip
    config = ModelConfig.from_hf(shape | {k: v for k, v in change.items() if k in shape})
    found = fused.why_not(config, change.get("dtype", "bfloat16"), None, adapters=change.get("adapters", False))
    assert found is None if why is None else why in found


def test_split_heads_are_not_for_it():
    shape = {"model_type": "llama", "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128}
    shape |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    mesh = meshes.make_mesh({"data": 4, "tensor": 2})
    found = fused.why_not(ModelConfig.from_hf(shape), "bfloat16", mesh, adapters=False)
    assert found is not None and "heads or tokens are split" in found


@pytest.mark.aot
@pytest.mark.parametrize(
    ("model", "more"),
    [("Qwen3-0.6B", []),
     ("DeepSeek-R1-Distill-Qwen-1.5B", ["--rows", "5", "--kind", "sample"]),
     ("Qwen3-8B", ["--rows", "256"])],
)  # fmt: skip
def test_a_layer_is_five_kernels_on_an_h100(model, more):
    """Compiled ahead: no copy of a cache, no kernel more than a layer's five, and a dozen or two around the layers."""
    if environments.find("gpu") is None:
        pytest.skip("no compiler for NVIDIA GPUs: jaxdistill plan CONFIG --make-environment gpu")
    tool = Path(__file__).parents[2] / "tools/compile_decode.py"
    command = [sys.executable, str(tool), "--model", model, "--layers", "2", *more]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    kernels = {kind: int(n) for kind, n in re.findall(r"^ +(\w[\w ]*?) +(\d+) kernels", ran.stdout, re.M)}
    assert kernels["attention"] == 2 and kernels["products"] == 4 * 2 + 1
    assert kernels["a token step"] - 5 * 2 <= (40 if "sample" in more else 12)
    assert kernels.get("copies", 0) <= 2
