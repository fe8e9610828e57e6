"""Online distillation between two projections: every divergence against a float64 reference, and its properties."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.losses import DIVERGENCES, PARAMETERS, chunked_distillation
from jaxdistill.losses.divergences import Divergence

from . import reference

N, E, V = 9, 8, 37
PADDED = 41, 45  # student and teacher: unequal padded widths of one tokenizer


def case(seed=0, columns=PADDED, scale=1.0):
    """Student's hidden states and projection, teacher's hidden states and projection."""
    rng = np.random.default_rng(seed)
    shapes = (N, E), (columns[0], E), (N, E), (columns[1], E)
    return [rng.normal(0, scale, s).astype(np.float32) for s in shapes], rng


def differentiated(divergence="forward_kl", parameter=None, temperature=1.0, vocabulary=V, **options):
    # the same call is compiled once for all tests
    return compiled(
        divergence=divergence, parameter=parameter, temperature=temperature, vocabulary=vocabulary, **options
    )


@functools.cache
def compiled(chunk=4, **options):
    """jit: (hiddens and projections, weights, more) -> ((sum, (count, metrics)), gradients by the four)."""

    def loss(arrays, weights, more):
        total, count, metrics = chunked_distillation(*arrays, weights, chunk=chunk, **more, **options)
        return total, (count, metrics)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def logits(arrays):
    """Student's and teacher's, of the real columns, in float64."""
    return [a.astype(np.float64) @ b[:V].astype(np.float64).T for a, b in (arrays[:2], arrays[2:])]


def value_of(name, parameter, temperature, teacher_logits, student_logits):
    """The reference as a function of the student's logits, with AKL's share held at where they are."""
    log_q = reference.log_softmax(teacher_logits / temperature)
    share = reference.adaptive_share(log_q, reference.log_softmax(student_logits / temperature), parameter)

    def value(z):
        log_p = reference.log_softmax(z / temperature)
        return temperature**2 * reference.divergence(name, parameter, log_q, log_p, share)

    return value


@pytest.mark.parametrize(
    ("name", "parameter", "temperature"),
    [*((n, None, 1.0) for n in DIVERGENCES), *((n, None, 2.0) for n in DIVERGENCES), ("jsd", 0.1, 1.0),
     ("adaptive_kl", 0.9, 1.0), ("skew_kl", 0.5, 1.0), ("skew_reverse_kl", 0.5, 3.0)],
)  # fmt: skip
def test_values_and_gradients_match_float64_whatever_is_masked(name, parameter, temperature):
    arrays, rng = case()
    run = differentiated(name, parameter, temperature)
    z, t = logits(arrays)
    value = value_of(name, PARAMETERS.get(name, 0.5) if parameter is None else parameter, temperature, t, z)
    for mask in reference.MASKS.values():
        weights = mask(N, rng).astype(np.float32)
        (total, (count, metrics)), found = run(arrays, weights, {})
        want, by_hidden, by_projection = reference.gradients(value, arrays[0], arrays[1][:V], weights)
        np.testing.assert_allclose(total, want, rtol=5e-6, atol=1e-6)
        np.testing.assert_allclose(found[0], by_hidden, atol=5e-5)
        np.testing.assert_allclose(found[1][:V], by_projection, atol=5e-5)
        assert (np.asarray(found[1])[V:] == 0).all()
        assert not np.any(found[2]) and not np.any(found[3]), "the teacher has no gradient"
        assert count == metrics["kd_count"] == weights.sum()
        assert metrics["kd"] == total


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_model_against_itself_is_exactly_zero(name):
    arrays, rng = case(3, scale=2.0)
    # what the padded columns hold does not matter
    same = [*arrays[:2], arrays[0], np.concatenate([arrays[1][:V], rng.normal(0, 9, (8, E)).astype(np.float32)])]
    for temperature in (1.0, 2.0):
        (total, _), found = differentiated(name, None, temperature)(same, np.ones(N, np.float32), {})
        assert total == 0
        assert not any(np.any(g) for g in found)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_distant_models_stay_finite(name):
    arrays, _ = case(4, scale=12.0)  # logits of some hundreds: most probabilities underflow
    (total, _), found = differentiated(name)(arrays, np.ones(N, np.float32), {})
    z, t = logits(arrays)
    want = value_of(name, PARAMETERS.get(name, 0.5), 1.0, t, z)(z).sum()
    np.testing.assert_allclose(total, want, rtol=2e-5)
    assert all(np.isfinite(g).all() for g in found)


def test_masked_rows_change_nothing_even_as_nan():
    arrays, _ = case(1)
    weights = (np.arange(N) % 2 == 0).astype(np.float32)
    hostile = [np.where(weights[:, None] == 0, np.nan, a) if a.shape[0] == N else a for a in arrays]
    run = differentiated("jsd")
    jax.tree.map(np.testing.assert_array_equal, run(arrays, weights, {}), run(hostile, weights, {}))


def test_a_cross_entropy_is_mixed_in_from_the_same_logits():
    arrays, rng = case(2)
    targets = rng.integers(0, V, N).astype(np.int32)
    # some tokens have both losses, some one of them, some neither
    weights, ce_weights = rng.choice([0.0, 0.5], N).astype(np.float32), rng.choice([0.0, 2.0], N).astype(np.float32)
    weights[0], ce_weights[0] = 0, 2
    arrays[2][0] = np.nan  # a teacher that has nothing to say where it is not asked
    more = {"targets": targets, "ce_weights": ce_weights}
    (total, (count, metrics)), found = differentiated("reverse_kl", None, 2.0)(arrays, weights, more)
    clean = [arrays[0], arrays[1], np.nan_to_num(arrays[2]), arrays[3]]
    z, t = logits(clean)
    student = clean[0], clean[1][:V]
    kd = reference.gradients(value_of("reverse_kl", 0.5, 2.0, t, z), *student, weights)
    ce = reference.gradients(lambda z: reference.cross_entropy(z, targets), *student, ce_weights)
    np.testing.assert_allclose(total, kd[0] + ce[0], rtol=5e-6)
    np.testing.assert_allclose(found[0], kd[1] + ce[1], atol=5e-5)
    np.testing.assert_allclose(found[1][:V], kd[2] + ce[2], atol=5e-5)
    np.testing.assert_allclose(metrics["kd"], kd[0], rtol=5e-6)
    np.testing.assert_allclose(metrics["nll"], ce[0], rtol=5e-6)
    np.testing.assert_allclose(metrics["teacher_nll"], (reference.cross_entropy(t, targets) * weights).sum(), rtol=5e-6)
    assert count == metrics["kd_count"] + metrics["ce_count"] == weights.sum() + ce_weights.sum()


def test_targets_alone_give_metrics_and_no_loss():
    arrays, rng = case(5)
    targets, weights = rng.integers(0, V, N).astype(np.int32), np.ones(N, np.float32)
    run = differentiated()
    (plain, _), gradient = run(arrays, weights, {})
    (total, (count, metrics)), same = run(arrays, weights, {"targets": targets})
    assert (total, count) == (plain, N)
    jax.tree.map(np.testing.assert_array_equal, gradient, same)
    nll = reference.cross_entropy(logits(arrays)[0], targets)
    np.testing.assert_allclose(metrics["nll"], nll.sum(), rtol=5e-6)


def test_softcaps_of_both_models():
    arrays, _ = case(6, scale=1.5)
    weights = np.ones(N, np.float32)
    (total, _), found = differentiated(softcap=4.0, teacher_softcap=2.0)(arrays, weights, {})
    z, t = logits(arrays)
    inner = value_of("forward_kl", 0.5, 1.0, reference.cap(t, 2.0), z)
    want = reference.gradients(lambda z: inner(reference.cap(z, 4.0)), arrays[0], arrays[1][:V], weights)
    np.testing.assert_allclose(total, want[0], rtol=5e-6)
    np.testing.assert_allclose(found[0], want[1], atol=5e-5)


def test_jsd_is_continuous_towards_both_kls():
    log_q, log_p = (jnp.asarray(reference.log_softmax(z), jnp.float32) for z in logits(case(7, scale=0.7)[0]))

    @jax.jit
    def values():
        named = [("jsd", 1e-3), ("forward_kl", None), ("jsd", 1 - 1e-3), ("reverse_kl", None)]
        return [jnp.sum(Divergence.of(*which)(log_q, log_p, lambda x: jnp.sum(x, -1))[0]) for which in named]

    near_forward, forward, near_reverse, reverse = values()
    np.testing.assert_allclose(near_forward / 1e-3, forward, rtol=0.01)
    np.testing.assert_allclose(near_reverse / 1e-3, reverse, rtol=0.01)


def test_the_head_of_adaptive_kl_is_found_without_sorting():
    rng = np.random.default_rng(0)
    q = np.float32([[0.5, 0.1, 0.3, 0.1, 0.0], [0.2, 0.2, 0.2, 0.2, 0.2], [1.0, 0.0, 0.0, 0.0, 0.0]])
    q = np.concatenate([q, rng.dirichlet(np.ones(5), 20).astype(np.float32)])
    from jaxdistill.losses.divergences import _head

    for mu in (0.3, 0.55, 0.95):
        found = np.asarray(_head(jnp.asarray(q), lambda x: jnp.sum(x, -1), mu))
        above = np.where(q[:, None, :] > q[:, :, None], q[:, None, :], 0).sum(-1)
        np.testing.assert_array_equal(found, above < mu)


def test_bf16_inputs():
    arrays, _ = case(8)
    arrays = [jnp.asarray(a, jnp.bfloat16) for a in arrays]
    (total, _), found = differentiated()(arrays, np.ones(N, np.float32), {})
    exact = [np.asarray(a, np.float64) for a in arrays]
    z, t = logits(exact)
    want = reference.gradients(value_of("forward_kl", 0.5, 1.0, t, z), exact[0], exact[1][:V], np.ones(N))
    np.testing.assert_allclose(total, want[0], rtol=5e-6)
    np.testing.assert_allclose(found[0].astype(np.float32), want[1], atol=0.03)
    assert found[1].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"divergence": "kl"}, "forward_kl"),
        ({"divergence": "jsd", "parameter": 0.0}, "forward_kl and reverse_kl"),
        ({"divergence": "jsd", "parameter": 1.0}, "strictly between"),
        ({"divergence": "forward_kl", "parameter": 0.5}, "takes no parameter"),
        ({"temperature": 0.0}, "temperature"),
        ({"ce_weights": jnp.ones(N)}, "targets"),
    ],
)
def test_bad_arguments_are_named(options, match):
    arrays, _ = case()
    with pytest.raises(ValueError, match=match):
        chunked_distillation(*map(jnp.asarray, arrays), jnp.ones(N), vocabulary=V, **options)


def test_unequal_widths_want_the_real_size():
    arrays, _ = case()
    with pytest.raises(ValueError, match=r"41 and 45 columns; give vocabulary="):
        chunked_distillation(*map(jnp.asarray, arrays), jnp.ones(N))


def test_every_parameter_has_a_divergence():
    assert set(PARAMETERS) < set(DIVERGENCES)
    assert Divergence.of("jsd").parameter == 0.5
