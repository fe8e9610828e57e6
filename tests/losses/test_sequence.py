"""The masked sequence loss against a float64 reference, and its properties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.losses import cross_entropy, shift


def case(seed=0, B=3, T=7, V=13):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 4, (B, T, V)).astype(np.float32)
    return logits, rng.integers(0, V, (B, T)), rng.choice([0.0, 0.5, 1.0], (B, T)).astype(np.float32)


def reference(logits, targets, weights):
    x = logits.astype(np.float64)
    total = count = 0.0
    for b, t in np.ndindex(targets.shape):
        if weights[b, t] > 0:
            row = x[b, t]
            nll = row.max() + np.log(np.exp(row - row.max()).sum()) - row[targets[b, t]]
            total, count = total + weights[b, t] * nll, count + weights[b, t]
    return total, count


@pytest.mark.parametrize("seed", range(4))
def test_matches_float64(seed):
    logits, targets, weights = case(seed)
    total, count, _ = cross_entropy(jnp.asarray(logits), jnp.asarray(targets), jnp.asarray(weights))
    want_total, want_count = reference(logits, targets, weights)
    np.testing.assert_allclose(total, want_total, rtol=1e-5)
    np.testing.assert_allclose(count, want_count)


def test_masked_positions_never_matter_even_as_nan():
    logits, targets, weights = case()
    hostile = np.where(weights[..., None] == 0, np.nan, logits)

    def mean(x):
        total, count, _ = cross_entropy(x, jnp.asarray(targets), jnp.asarray(weights))
        return total / count

    value, gradient = jax.value_and_grad(mean)(jnp.asarray(hostile))
    np.testing.assert_allclose(value, mean(jnp.asarray(logits)), rtol=1e-6)
    assert np.isfinite(gradient).all()
    assert (np.asarray(gradient)[weights == 0] == 0).all()


def test_hits_count_where_the_target_is_the_highest():
    logits, targets, weights = case(1)
    _, _, hits = cross_entropy(jnp.asarray(logits), jnp.asarray(targets), jnp.asarray(weights))
    np.testing.assert_allclose(hits, (weights * (logits.argmax(-1) == targets)).sum())


def test_position_t_predicts_token_t_plus_1_within_its_segment():
    tokens = jnp.array([[10, 11, 12, 20, 21, 0]])
    weights = jnp.array([[0.0, 1.0, 2.0, 3.0, 4.0, 0.0]])
    segments = jnp.array([[1, 1, 1, 2, 2, 0]])
    targets, shifted = shift(tokens, weights, segments)
    # 10 predicts 11, 11 predicts 12; 12 ends its segment; 20 predicts 21; 21 ends its segment; padding
    np.testing.assert_array_equal(targets[0, :5], [11, 12, 20, 21, 0])
    np.testing.assert_array_equal(shifted, [[1.0, 2.0, 0.0, 4.0, 0.0, 0.0]])


def test_a_row_never_wraps_around():
    tokens, ones = jnp.array([[5, 6]]), jnp.ones((1, 2))
    _, shifted = shift(tokens, ones, jnp.ones((1, 2), jnp.int32))
    np.testing.assert_array_equal(shifted, [[1.0, 0.0]])
