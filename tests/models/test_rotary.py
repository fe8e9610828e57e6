"""Queries and keys before attention: the TPU's one pass against float64, and against what other backends do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.models import rotary
from jaxdistill.models.layers import rope_tables

B, T, H, D, EPS, SCALE = 2, 9, 3, 10, 1e-6, 0.3


def inputs():
    rng = np.random.default_rng(0)
    x, g = (jnp.asarray(rng.normal(size=(B, T, H, D)), jnp.bfloat16) for _ in range(2))
    norm = jnp.asarray(1 + 0.3 * rng.normal(size=D), jnp.float32)
    positions = jnp.asarray(rng.integers(0, 40, (B, T)), jnp.int32)
    return x, g, norm, rope_tables(positions, np.float32(100.0) ** (-np.arange(D // 2, dtype=np.float32) / 5), 1.2)


def reference(x, norm, tables):
    """`turn` as it is written, in float64."""
    cos, sin = (np.asarray(t, np.float64) for t in tables)
    if norm is not None:
        x = x / jnp.sqrt((x * x).mean(-1, keepdims=True) + EPS) * norm.reshape(1, 1, 1, D)
    a, b = x[..., : D // 2], x[..., D // 2 :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1) * SCALE


@pytest.mark.parametrize(("form", "normed"), [("tpu", False), ("tpu", True), ("halves", True)])
def test_one_pass_is_right_to_the_last_bit_of_bf16(form, normed):
    x, g, norm, (cos, sin) = inputs()
    norm, tables = norm if normed else None, rotary.tables_on_tpu((cos, sin)) if form == "tpu" else (cos, sin)
    run = jax.jit(lambda x, norm: rotary.turn(x, tables, norm, eps=EPS, offset=False, scale=SCALE))
    got, backward = jax.vjp(run, x, norm)
    with jax.enable_x64(True):
        wide = [None if v is None else jnp.asarray(np.asarray(v, np.float64)) for v in (x, norm)]
        want, reference_backward = jax.vjp(lambda x, norm: reference(x, norm, (cos, sin)), *wide)
        wanted = [want, *reference_backward(jnp.asarray(np.asarray(g, np.float64)))]
    for name, a, b in zip(("out", "by x", "by norm"), [got, *backward(g)], wanted, strict=True):
        if b is None:
            assert not normed
            continue
        assert a.dtype == (jnp.float32 if name == "by norm" else jnp.bfloat16)
        # rounded once: half a unit in the last of eight bits, and fp32 in between
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=2**-8, atol=1e-5, err_msg=name)


def test_without_a_norm_attention_rounds_and_fp32_stays_exact():
    x, _, norm, tables = inputs()
    assert rotary.turn(x, tables, None, eps=EPS, offset=False, scale=SCALE).dtype == jnp.float32
    exact = rotary.turn(x.astype(jnp.float32), tables, norm, eps=EPS, offset=False, scale=SCALE)
    np.testing.assert_allclose(exact, reference(x.astype(jnp.float32), norm, tables), rtol=1e-5, atol=1e-5)


def test_an_offset_norm_is_stored_as_its_distance_from_one():
    x, _, norm, tables = inputs()
    more = {"eps": EPS, "scale": 1.0}
    a = rotary.turn(x.astype(jnp.float32), tables, norm, offset=False, **more)
    b = rotary.turn(x.astype(jnp.float32), tables, norm - 1.0, offset=True, **more)
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_without_norm_and_positions_nothing_happens_to_keys():
    x = inputs()[0]
    same = rotary.turn(x, None, None, eps=EPS, offset=False, scale=1.0)
    assert same is x
