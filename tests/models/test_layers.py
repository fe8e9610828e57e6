"""Functions of all layers against float64, as one device computes them and as several do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.models import layers
from jaxdistill.models.layers import ACTIVATIONS, apply_rope, gated, matmul, rope_tables
from jaxdistill.models.quantize import dense, quantize


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_matmul_and_its_gradients_are_those_of_rounded_inputs(monkeypatch, devices, dtype):
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    rng = np.random.default_rng(0)
    x, w, g = (rng.normal(size=shape).astype(np.float32) for shape in ((3, 7, 5), (5, 11), (3, 7, 11)))
    out, backward = jax.vjp(jax.jit(lambda x, w: matmul(x, w, dtype)), x, w)
    dx, dw = backward(jnp.asarray(g))
    x, w, g = (np.asarray(jnp.asarray(a).astype(dtype), np.float64) for a in (x, w, g))
    np.testing.assert_allclose(out, x @ w, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx, g @ w.T, rtol=1e-5, atol=1e-5)
    # several devices on a CPU keep this one's inputs in fp32
    rounding = 2**-7 if dtype == "bfloat16" and devices > 1 else 1e-5
    np.testing.assert_allclose(dw, np.einsum("bte,btf->ef", x, g), rtol=1e-5, atol=rounding * np.sqrt(21))


@pytest.mark.parametrize("heads", [(1, 4), (3, 1), (3, 4)])
def test_products_over_heads_are_those_of_whole_rows(heads):
    rng = np.random.default_rng(0)
    x, w, g = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 5, 6), (6, 8), (2, 5, 8)))
    by_heads = {"heads": heads, "dtype": jnp.float32}
    out = layers._product_in_heads(x, w, 0, out_dtype=jnp.float32, **by_heads)
    np.testing.assert_allclose(out, x @ w, rtol=1e-5, atol=1e-5)
    dx = layers._product_in_heads(g, w, 1, out_dtype=jnp.float32, **by_heads)
    np.testing.assert_allclose(dx, g @ w.T, rtol=1e-5, atol=1e-5)
    dw = layers._over_tokens(jnp.asarray(x), jnp.asarray(g), **by_heads)
    np.testing.assert_allclose(dw, np.einsum("bte,btf->ef", x, g), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("qtype", ["int8", "nf4"])
def test_a_quantized_matrix_is_a_constant_that_is_used_as_it_is(qtype):
    rng = np.random.default_rng(0)
    x, w = jnp.asarray(rng.normal(size=(3, 128)), jnp.float32), jnp.asarray(rng.normal(size=(1, 128, 4)), jnp.float32)
    matrix = jax.tree.map(lambda part: part[0], quantize(w, qtype))
    out, backward = jax.vjp(lambda x: matmul(x, matrix, jnp.float32), x)
    np.testing.assert_allclose(out, x @ dense(matrix), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(backward(out)[0], out @ dense(matrix).T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("shape", [(3, 5), (1, 7), (2, 1)])
def test_rotary_positions_are_turned_by_their_angles(monkeypatch, devices, shape):
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    rng = np.random.default_rng(0)
    positions = rng.integers(0, 300, size=shape).astype(np.int32)
    frequencies = np.float32(100.0) ** (-np.arange(3, dtype=np.float32) / 3)
    x = rng.normal(size=(*shape, 2, 6)).astype(np.float32)
    turned = jax.jit(lambda x, p: apply_rope(x, rope_tables(p, frequencies, 1.5)))(x, positions)
    angles = positions[..., None, None].astype(np.float64) * frequencies.astype(np.float64)
    pairs = (x[..., :3] + 1j * x[..., 3:].astype(np.float64)) * 1.5 * np.exp(1j * angles)
    # an angle of 300 is known to 2**-16 in fp32
    np.testing.assert_allclose(turned, np.concatenate([pairs.real, pairs.imag], axis=-1), rtol=0, atol=2e-4)


def test_one_cpu_computes_the_sines_once_for_all_layers(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    frequencies = np.ones(4, np.float32)

    def turn_four_times(x, positions):
        tables = rope_tables(positions, frequencies, 1.0)
        for _ in range(4):
            x = apply_rope(jnp.tanh(x), tables)
        return x

    text = jax.jit(turn_four_times).lower(jnp.ones((2, 8, 3, 8)), jnp.ones((2, 8), jnp.int32)).compile().as_text()
    assert text.count(" cosine(") == text.count(" sine(") == 1


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_gates_gradients_are_those_of_its_definition(activation):
    rng = np.random.default_rng(0)
    gate, up, g = (rng.normal(size=(3, 7, 5)).astype(np.float32) for _ in range(3))
    gate[0], gate[1, 0] = 20 * gate[0], np.array([-100, -20, 0, 20, 100])
    out, backward = jax.vjp(jax.jit(lambda gate, up: gated(activation, gate, up)), gate, up)
    want, plain = jax.vjp(lambda gate, up: ACTIVATIONS[activation](gate) * up, gate, up)
    np.testing.assert_allclose(out, want, rtol=1e-6, atol=1e-6)
    for found, expected in zip(backward(jnp.asarray(g)), plain(jnp.asarray(g)), strict=True):
        # a sigmoid near 0 or 1 is known to 2**-24, and is multiplied by a gate of up to 100
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-5)
