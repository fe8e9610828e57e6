"""Attention to a cache in two parts, against dense attention over the whole sequence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.models.attention import attention
from jaxdistill.models.attention.cached import KV, attend_cached

B, H, K, D = 3, 6, 2, 12
LENGTHS = (5, 33, 20)
AT = 7


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    T = 64
    return (jnp.asarray(rng.normal(size=(B, T, heads, D)).astype(np.float32)) for heads in (H, K, K))


def cached(slots, window, garbage=0.0):
    """The attention of each row's token at LENGTHS[b] + AT."""
    q, k, v = inputs()
    cache, recent = KV.empty(B, K, slots, D, jnp.float32), KV.empty(B, K, 16, D, jnp.float32)
    cache, recent = (KV(kv.keys + garbage, kv.values + garbage) for kv in (cache, recent))
    rows = []
    for b, n in enumerate(LENGTHS):
        one = KV(*(x[b : b + 1] for x in cache)).written(
            KV.of(k[b : b + 1, :n], v[b : b + 1, :n], jnp.float32), jnp.int32(0)
        )
        rows.append(one)
    cache = KV(*(jnp.concatenate(x) for x in zip(*rows, strict=True)))
    length = jnp.array(LENGTHS)
    for at in range(AT + 1):
        k_B1, v_B1 = (jnp.stack([x[b, n + at] for b, n in enumerate(LENGTHS)])[:, None] for x in (k, v))
        recent = recent.written(KV.of(k_B1, v_B1, jnp.float32), jnp.int32(at))
    q_B = jnp.stack([q[b, n + AT] for b, n in enumerate(LENGTHS)])
    f = jax.jit(lambda *a: attend_cached(*a, scale=D**-0.5, window=window, dtype=jnp.float32, platform="cpu"))
    return np.asarray(f(q_B, cache, recent, length, jnp.int32(AT))), (cache, recent)


@pytest.mark.parametrize("window", [None, 1, 4, 8, 9, 20])
def test_it_is_the_attention_of_the_whole_sequence(window):
    q, k, v = inputs()
    whole = attention(q, k, v, None, scale=D**-0.5, window=window, dtype=jnp.float32)
    expected = np.stack([np.asarray(whole[b, n + AT]) for b, n in enumerate(LENGTHS)])
    np.testing.assert_allclose(cached(64, window)[0], expected, atol=1e-5)


@pytest.mark.parametrize("slots", [128, 256, 1024])
def test_a_longer_cache_changes_no_bit(slots):
    np.testing.assert_array_equal(cached(slots, None)[0], cached(64, None)[0])


def test_other_slots_do_not_matter():
    np.testing.assert_array_equal(cached(64, None, garbage=100.0)[0], cached(64, None)[0])


def test_written_and_resized():
    _, (cache, recent) = cached(64, None)
    merged = cache.resized(128).written(recent, jnp.array(LENGTHS))
    _, k, v = inputs()
    for b, n in enumerate(LENGTHS):
        end = n + AT + 1
        np.testing.assert_array_equal(merged.keys[b, :, :, :end], k[b, :end].transpose(1, 2, 0))
        np.testing.assert_array_equal(merged.values[b, :, :end], v[b, :end].transpose(1, 0, 2))
    assert merged.slots == 128 and merged.resized(64).keys.shape == cache.keys.shape
