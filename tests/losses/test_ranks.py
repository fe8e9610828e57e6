"""The approximate loss between two tokenizers: against float64, and what it does not see."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.losses import sorted_distillation

from . import reference

N, E, V, PADDED, K = 9, 8, 37, 41, 5


@functools.cache
def differentiated():
    def loss(student, *arguments):
        total, count, metrics = sorted_distillation(*student, *arguments, vocabulary=V, chunk=4)
        return total, (count, metrics)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def by_rank(log_q: np.ndarray, log_p: np.ndarray, k: int) -> np.ndarray:
    """Float64: differences of the k highest probabilities by rank, and of the rests; teacher [N, U], student [N, V]."""
    q, p = (-np.sort(-np.exp(x), -1) for x in (log_q, log_p))
    return np.abs(q[:, :k] - p[:, :k]).sum(-1) + np.abs(q[:, k:].sum(-1) - p[:, k:].sum(-1))


def case(seed=0):
    """Student hidden states and projection, a teacher's float64 log-probabilities over 50 tokens of its own."""
    rng = np.random.default_rng(seed)
    hidden, projection = (rng.normal(0, 1, s).astype(np.float32) for s in ((N, E), (PADDED, E)))
    return hidden, projection, reference.log_softmax(rng.normal(0, 2, (N, 50))), rng


def stored(log_q, k):
    highest = -np.sort(-log_q, -1)[:, :k]
    return highest.astype(np.float32), (1 - np.exp(highest).sum(-1)).astype(np.float32)


def test_values_and_gradients_match_float64_whatever_is_masked():
    hidden, projection, log_q, rng = case()
    for mask in reference.MASKS.values():
        weights = mask(N, rng).astype(np.float32)
        # what is masked may hold anything
        logprobs, tail = (np.where(weights.reshape(-1, *[1] * (x.ndim - 1)) > 0, x, np.nan) for x in stored(log_q, K))
        (total, (count, _)), found = differentiated()((hidden, projection), logprobs, tail, weights)
        want, by_hidden, by_projection = reference.gradients(
            lambda z: by_rank(log_q, reference.log_softmax(z), K), hidden, projection[:V], weights
        )
        np.testing.assert_allclose(total, want, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found[0], by_hidden, atol=5e-5)
        np.testing.assert_allclose(found[1][:V], by_projection, atol=5e-5)
        assert (np.asarray(found[1])[V:] == 0).all()
        assert count == weights.sum()


def test_it_grows_with_k_and_sees_ranks_alone():
    hidden, projection, log_q, rng = case(1)
    one, values = np.ones(N, np.float32), []
    for k in (1, 3, 10, V):
        found = sorted_distillation(*map(jnp.asarray, (hidden, projection, *stored(log_q, k), one)), vocabulary=V)
        values.append(float(found[0]))
    assert all(a <= b * (1 + 1e-6) for a, b in itertools.pairwise(values))
    log_p = reference.log_softmax(hidden.astype(np.float64) @ projection[:V].T)
    np.testing.assert_allclose(values[-1], by_rank(log_q, log_p, V).sum(), rtol=1e-5)
    # a teacher that is as sure of other tokens says nothing new
    mixed = np.take_along_axis(log_p, rng.permuted(np.tile(np.arange(V), (N, 1)), axis=1), 1)
    (total, _), found = differentiated()((hidden, projection), *stored(mixed, K), one)
    assert total < 1e-5


def test_more_probabilities_than_the_student_has_tokens_are_refused():
    hidden, projection, log_q, _ = case()
    with pytest.raises(ValueError, match="38 of the teacher's probabilities, and the student has 37 tokens"):
        sorted_distillation(*map(jnp.asarray, (hidden, projection, *stored(log_q, 38), np.ones(N))), vocabulary=V)
