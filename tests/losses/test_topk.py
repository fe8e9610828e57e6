"""Distillation from stored log-probabilities: against float64, against the online loss, and what a tail is for."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.losses import chunked_distillation, sampled_distillation, sampled_reverse_kl, topk_distillation

from . import reference

N, E, V, PADDED, K = 9, 8, 37, 41, 5


def case(seed=0, columns=PADDED, scale=1.0):
    """Student hidden states and projection, and a teacher's float64 log-probabilities [N, V]."""
    rng = np.random.default_rng(seed)
    hidden, projection = (rng.normal(0, scale, s).astype(np.float32) for s in ((N, E), (columns, E)))
    return hidden, projection, reference.log_softmax(rng.normal(0, 2 * scale, (N, V))), rng


def top(log_q, k):
    ids = np.argsort(-log_q, -1)[:, :k].astype(np.int32)
    return ids, np.take_along_axis(log_q, ids, -1).astype(np.float32)


@functools.cache
def differentiated(function, chunk=4, **options):
    def loss(student, arguments, more):
        total, count, metrics = function(*student, *arguments, chunk=chunk, **more, **options)
        return total, (count, metrics)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


stored = functools.partial(differentiated, topk_distillation, vocabulary=V)
sampled = functools.partial(differentiated, sampled_distillation, vocabulary=V)
estimated = functools.partial(differentiated, sampled_reverse_kl, vocabulary=V)


def test_values_and_gradients_match_float64_whatever_is_masked():
    hidden, projection, log_q, rng = case()
    ids, logprobs = top(log_q, K)
    for mask in reference.MASKS.values():
        weights = mask(N, rng).astype(np.float32)
        (total, (count, _)), found = stored()((hidden, projection), (ids, logprobs, None, weights), {})
        want, by_hidden, by_projection = reference.gradients(
            lambda z: reference.bucketed_kl(log_q, reference.log_softmax(z), ids), hidden, projection[:V], weights
        )
        np.testing.assert_allclose(total, want, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found[0], by_hidden, atol=5e-5)
        np.testing.assert_allclose(found[1][:V], by_projection, atol=5e-5)
        assert (np.asarray(found[1])[V:] == 0).all()
        assert count == weights.sum()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_all_tokens_stored_are_the_online_loss(temperature):
    hidden, projection, _, rng = case(1)
    teacher = [rng.normal(0, 1, s).astype(np.float32) for s in ((N, E), (V, E))]
    weights = rng.choice([0.0, 1.0], N).astype(np.float32)
    ids, logprobs = top(reference.log_softmax(teacher[0].astype(np.float64) @ teacher[1].T), V)
    more = {}
    if temperature != 1:
        more["log_normalizer"] = np.log(np.exp(logprobs.astype(np.float64) / temperature).sum(-1)).astype(np.float32)
    offline = stored(temperature=temperature)((hidden, projection), (ids, logprobs, None, weights), more)

    def online(student):
        return chunked_distillation(
            *student, *map(jnp.asarray, (*teacher, weights)), temperature=temperature, vocabulary=V
        )[0]

    value, gradient = jax.jit(jax.value_and_grad(online))((jnp.asarray(hidden), jnp.asarray(projection)))
    np.testing.assert_allclose(offline[0][0], value, rtol=1e-5)
    for a, b in zip(offline[1], gradient, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_with_its_tail_it_grows_to_the_full_divergence():
    hidden, projection, log_q, _ = case(2)
    full = reference.kl(log_q, reference.log_softmax(hidden.astype(np.float64) @ projection[:V].T)).sum()
    values = []
    for k in (1, 4, 16, 30, V - 1, V):
        slots = max(k, V - 1)  # empty ones behind the k tokens, to compile once
        ids, logprobs = top(log_q, slots)
        arguments = np.where(np.arange(slots)[None] < k, ids, -1), logprobs, None, np.ones(N, np.float32)
        (total, _), _ = stored()((hidden, projection), arguments, {})
        values.append(float(total))
    assert all(a <= b * (1 + 1e-6) for a, b in itertools.pairwise(values))
    assert values[0] < 0.7 * full
    np.testing.assert_allclose(values[-1], full, rtol=1e-5)


def test_agreement_on_the_stored_tokens_hides_nothing():
    # teacher: half its mass on two tokens; student: nearly all of it, in the same proportion. Renormalised, they agree
    teacher = np.full(V, 0.5 / (V - 2))
    teacher[:2] = 0.25
    student = np.full(V, 0.01 / (V - 2))
    student[:2] = 0.495
    ids, logprobs = np.arange(2)[None], np.log(teacher[None, :2]).astype(np.float32)
    projection = np.log(student)[:, None].astype(np.float32)
    (total, _), _ = stored()(
        (np.ones((1, 1), np.float32), projection), (ids, logprobs, None, np.ones(1, np.float32)), {}
    )
    full = (teacher * np.log(teacher / student)).sum()
    assert full > 1.5
    np.testing.assert_allclose(total, full, rtol=1e-5)  # flat tails: the bucket sees all of it


def test_a_tiny_tail_is_exact_where_it_is_stored():
    # 1 - sum(exp(logprobs)) has nothing left of a mass of 1e-9 in fp32, and the student's tail is summed where it is
    log_q = np.log(np.array([[1 - 1e-9, *[1e-9 / (V - 1)] * (V - 1)]]))
    z = np.full((1, V), -18.0)
    z[0, 0] = 0
    student = np.ones((1, 1), np.float32), z.T.astype(np.float32)
    tail, one = np.array([1e-9], np.float32), np.ones(1, np.float32)
    ids = np.zeros((1, 1), np.int32)
    (total, _), found = stored()(student, (ids, log_q[:, :1].astype(np.float32), tail, one), {})
    p = np.exp(reference.log_softmax(z))
    rest = p[0, 1:].sum()
    np.testing.assert_allclose(found[1][1:, 0], p[0, 1:] - 1e-9 * p[0, 1:] / rest, rtol=1e-4)
    assert np.isfinite(total)


def test_empty_slots_and_masked_nans_change_nothing():
    hidden, projection, log_q, _ = case(3)
    ids, logprobs = top(log_q, K)
    weights = (np.arange(N) % 2 == 0).astype(np.float32)
    clean = stored()((hidden, projection), (ids, logprobs, None, weights), {})
    masked = weights[:, None] == 0
    longer = np.concatenate([np.where(masked, 7, ids), np.full((N, 2), -1, np.int32)], -1)
    hostile = np.concatenate([np.where(masked, np.nan, logprobs), np.zeros((N, 2), np.float32)], -1)
    dirty = stored()((np.where(masked, np.nan, hidden), projection), (longer, hostile, None, weights), {})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), clean, dirty)


def test_logprobs_that_rounding_put_above_one_leave_no_tail():
    hidden, projection, _, _ = case(4)
    ids = np.tile(np.arange(2, dtype=np.int32), (N, 1))
    logprobs = np.full((N, 2), np.log(0.5) + 1e-3, np.float32)
    (total, _), found = stored()((hidden, projection), (ids, logprobs, None, np.ones(N, np.float32)), {})
    assert np.isfinite(total)
    assert all(np.isfinite(g).all() for g in found)


def test_a_cross_entropy_is_mixed_in():
    hidden, projection, log_q, rng = case(5)
    ids, logprobs = top(log_q, K)
    targets = rng.integers(0, V, N).astype(np.int32)
    weights, ce_weights = rng.choice([0.0, 0.5], N).astype(np.float32), rng.choice([0.0, 2.0], N).astype(np.float32)
    more = {"targets": targets, "ce_weights": ce_weights}
    (total, (count, metrics)), found = stored()((hidden, projection), (ids, logprobs, None, weights), more)
    kd = reference.gradients(
        lambda z: reference.bucketed_kl(log_q, reference.log_softmax(z), ids), hidden, projection[:V], weights
    )
    ce = reference.gradients(lambda z: reference.cross_entropy(z, targets), hidden, projection[:V], ce_weights)
    np.testing.assert_allclose(total, kd[0] + ce[0], rtol=1e-5)
    np.testing.assert_allclose(found[0], kd[1] + ce[1], atol=5e-5)
    np.testing.assert_allclose([metrics["kd"], metrics["nll"]], [kd[0], ce[0]], rtol=1e-5)
    assert count == weights.sum() + ce_weights.sum()


def test_samples_are_unbiased():
    """Over every possible draw, weighted with its probability, value and gradient are those of the full KL."""
    rng = np.random.default_rng(6)
    log_q = reference.log_softmax(rng.normal(0, 2, (1, V)))
    hidden, projection = rng.normal(0, 1, (1, E)).astype(np.float32), rng.normal(0, 1, (V, E)).astype(np.float32)
    proposal = np.exp(reference.log_softmax(log_q * 0.5))  # a flatter one, so that importance weights matter
    ids, logprobs = np.arange(V, dtype=np.int32)[:, None], log_q.T.astype(np.float32)
    importance = np.exp(log_q - np.log(proposal)).T.astype(np.float32)
    want, by_hidden, by_projection = reference.gradients(
        lambda z: reference.kl(log_q, reference.log_softmax(z)), hidden, projection, np.ones(1)
    )
    draws = np.repeat(hidden, V, 0)
    for drawn, weights in ((importance, proposal[0]), (np.ones((V, 1)), np.exp(log_q[0]))):
        arguments = ids, drawn.astype(np.float32), logprobs, weights.astype(np.float32)
        (total, _), found = sampled()((draws, projection), arguments, {})
        np.testing.assert_allclose(total, want, rtol=1e-5)
        np.testing.assert_allclose(found[0].sum(0, keepdims=True), by_hidden, atol=2e-5)
        np.testing.assert_allclose(found[1], by_projection, atol=2e-5)
    # without logprobs it differs by the teacher's entropy, and the gradient is the same
    (total, _), same = sampled()(
        (draws, projection), (ids, np.ones((V, 1), np.float32), None, weights.astype(np.float32)), {}
    )
    np.testing.assert_allclose(total, want - (np.exp(log_q) * log_q).sum(), rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, same, found)


def test_a_token_drawn_twice_counts_twice():
    hidden, projection, log_q, _ = case(7)
    one = np.ones(N, np.float32)

    def run(ids, shares):
        ids, shares = (np.tile(np.array(a)[None], (N, 1)) for a in (ids, shares))
        logprobs = np.take_along_axis(log_q, ids, -1).astype(np.float32)
        return sampled()((hidden, projection), (ids, shares.astype(np.float32), logprobs, one), {})

    once, twice = run([3, 5, -1], [2 / 3, 1 / 3, 9.0]), run([3, 3, 5], [1 / 3] * 3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), once, twice)


# ------------------------------------------------------------------------------------ what the student has drawn


def estimate(log_p, log_q, ids, drawn):
    """(value, what has the gradient where its constants are taken from `log_p`), [N] each, in float64."""
    inside = (ids == drawn[:, None]).any(-1)
    at = np.arange(len(ids))[:, None], np.maximum(ids, 0)
    apart = log_p - log_q
    terms = np.where(ids >= 0, apart[at], 0.0)
    rest = np.where(inside, 0.0, apart[at[0][:, 0], drawn])

    def surrogate(z):
        new = reference.log_softmax(z)
        return (np.exp(new[at]) * terms).sum(-1) + rest * new[at[0][:, 0], drawn]

    return (np.exp(log_p[at]) * terms).sum(-1) + rest, surrogate


def test_the_estimate_from_the_students_draws_matches_float64_whatever_is_masked():
    hidden, projection, log_q, rng = case(8)
    ids, logprobs = top(log_q, K)
    ids[:, -1] = -1  # an empty slot
    drawn = np.where(np.arange(N) % 3 == 0, ids[:, 1], rng.integers(0, V, N)).astype(np.int32)
    own = np.take_along_axis(log_q, drawn[:, None], -1)[:, 0].astype(np.float32)
    log_p = reference.log_softmax(hidden.astype(np.float64) @ projection[:V].astype(np.float64).T)
    value, surrogate = estimate(log_p, log_q, ids, drawn)
    for mask in reference.MASKS.values():
        weights = mask(N, rng).astype(np.float32)
        masked = weights == 0
        hostile = np.where(masked[:, None], np.nan, logprobs), np.where(masked, np.nan, own)
        (total, (count, metrics)), found = estimated()(
            (hidden, projection), (ids, *hostile, weights), {"targets": np.where(masked, -7, drawn)}
        )
        _, by_hidden, by_projection = reference.gradients(surrogate, hidden, projection[:V], weights)
        np.testing.assert_allclose(total, (weights * value).sum(), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found[0], by_hidden, atol=5e-5)
        np.testing.assert_allclose(found[1][:V], by_projection, atol=5e-5)
        assert count == weights.sum() and metrics["kd"] == total
        nll = -np.take_along_axis(log_p, drawn[:, None], -1)[:, 0]
        np.testing.assert_allclose(metrics["nll"], (weights * nll).sum(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("k", [0, 3, V])
def test_the_students_draws_are_unbiased(k):
    """Over every possible draw, weighted with its probability: the whole reverse KL and its gradient, for any k."""
    hidden, projection, log_q, _ = case(9)
    hidden, log_q = hidden[:1], log_q[:1]
    p = np.exp(reference.log_softmax(hidden.astype(np.float64) @ projection[:V].astype(np.float64).T))[0]
    ids, logprobs = (np.repeat(x, V, 0) for x in top(log_q, V))
    ids = np.where(np.arange(V)[None] < k, ids, -1)  # empty slots behind the k tokens, to compile once
    own, every = log_q[0].astype(np.float32), np.arange(V, dtype=np.int32)
    arguments = ids, logprobs, own, p.astype(np.float32)
    (total, _), found = estimated()((np.repeat(hidden, V, 0), projection), arguments, {"targets": every})
    want, by_hidden, by_projection = reference.gradients(
        lambda z: reference.kl(reference.log_softmax(z), log_q), hidden, projection[:V], np.ones(1)
    )
    np.testing.assert_allclose(total, want, rtol=1e-5)
    np.testing.assert_allclose(found[0].sum(0, keepdims=True), by_hidden, atol=2e-5)
    np.testing.assert_allclose(found[1][:V], by_projection, atol=2e-5)
    if k == 0:  # the policy gradient of the sampled token, and nothing else
        _, one = estimated()(
            (np.repeat(hidden, V, 0), projection),
            (ids, logprobs, own, (every == 5).astype(np.float32)),
            {"targets": every},
        )
        advantage = log_q[0, 5] - np.log(p[5])
        score = ((every == 5) - p)[:, None] * hidden.astype(np.float64)  # grad log p(5)
        np.testing.assert_allclose(one[1][:V], -advantage * score, atol=2e-5)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"temperature": 2.0}, "log_normalizer is absent"),
        ({"log_normalizer": jnp.zeros(N)}, "log_normalizer is given"),
        ({"temperature": -1.0}, "above 0"),
        ({"ce_weights": jnp.ones(N)}, "targets"),
    ],
)
def test_bad_arguments_are_named(options, match):
    hidden, projection, log_q, _ = case()
    ids, logprobs = top(log_q, K)
    with pytest.raises(ValueError, match=match):
        topk_distillation(*map(jnp.asarray, (hidden, projection, ids, logprobs)), None, jnp.ones(N), **options)
