"""The chunked cross-entropy against a float64 reference, and its properties."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.losses import chunked_cross_entropy, cross_entropy, products
from jaxdistill.losses.sweep import Plan, sweep

from . import reference

N, E, V, PADDED = 11, 8, 37, 41
OPTIONS = {
    "plain": {},
    "z_loss": {"z_loss": 0.1},
    "smoothing": {"label_smoothing": 0.1},
    "softcap": {"softcap": 3.0},
    "everything": {"z_loss": 0.1, "label_smoothing": 0.2, "softcap": 5.0, "vocabulary": V},
}


def case(seed=0, columns=V):
    rng = np.random.default_rng(seed)
    hidden, projection = rng.normal(0, 1, (N, E)), rng.normal(0, 1, (columns, E))
    return hidden.astype(np.float32), projection.astype(np.float32), rng.integers(0, V, N).astype(np.int32), rng


@functools.cache
def differentiated(chunk=4, **options):
    """jit: (hidden, projection, targets, weights) -> ((sum, (count, metrics)), gradients)."""

    def loss(hidden, projection, targets, weights):
        total, count, metrics = chunked_cross_entropy(hidden, projection, targets, weights, chunk=chunk, **options)
        return total, (count, metrics)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


@pytest.mark.parametrize("option", OPTIONS)
def test_values_and_gradients_match_float64_whatever_is_masked(option):
    options = OPTIONS[option]
    hidden, projection, targets, rng = case(columns=PADDED if "vocabulary" in options else V)

    def value(z):
        capped = reference.cap(z, options.get("softcap"))
        return reference.cross_entropy(capped, targets, options.get("z_loss", 0.0), options.get("label_smoothing", 0.0))

    for mask in reference.MASKS.values():
        weights = mask(N, rng).astype(np.float32)
        (total, (count, metrics)), found = differentiated(**options)(hidden, projection, targets, weights)
        want, by_hidden, by_projection = reference.gradients(value, hidden, projection[:V], weights)
        np.testing.assert_allclose(total, want, rtol=2e-6, atol=1e-6)
        np.testing.assert_allclose(found[0], by_hidden, atol=2e-5)
        np.testing.assert_allclose(found[1][:V], by_projection, atol=2e-5)
        assert (np.asarray(found[1])[V:] == 0).all()
        assert count == weights.sum()
        logits = reference.cap(hidden @ projection[:V].T, options.get("softcap"))
        np.testing.assert_allclose(
            metrics["nll"], (reference.cross_entropy(logits, targets) * weights).sum(), rtol=1e-5
        )
        assert metrics["hits"] == ((logits.argmax(-1) == targets) * weights).sum()


def test_is_the_whole_logits_loss_of_packed_rows():
    rng = np.random.default_rng(3)
    hidden, projection = jnp.asarray(rng.normal(0, 1, (2, 9, E))), jnp.asarray(rng.normal(0, 1, (V, E)))
    targets, weights = jnp.asarray(rng.integers(0, V, (2, 9))), jnp.asarray(rng.choice([0.0, 1.0], (2, 9)))
    # half of the targets are the likeliest token
    targets = jnp.where(jnp.arange(9)[None] % 2 == 0, jnp.argmax(hidden @ projection.T, -1), targets)

    def whole(hidden, projection):
        total, count, hits = cross_entropy(hidden @ projection.T, targets, weights)
        return total, (count, hits)

    (total, (count, hits)), want = jax.jit(jax.value_and_grad(whole, argnums=(0, 1), has_aux=True))(hidden, projection)
    (ours, (our_count, metrics)), found = differentiated()(hidden, projection, targets, weights)
    np.testing.assert_allclose(ours, total, rtol=1e-6)
    assert (our_count, metrics["hits"]) == (count, hits)
    assert hits >= 3
    for a, b in zip(found, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_of_equal_logits_the_first_is_the_hit_as_in_argmax():
    hidden, projection = np.ones((2, E), np.float32), np.ones((V, E), np.float32)
    (_, (_, metrics)), _ = differentiated()(hidden, projection, np.array([0, 5]), np.ones(2, np.float32))
    assert metrics["hits"] == 1


def test_masked_rows_change_nothing_even_as_nan():
    hidden, projection, targets, _ = case(1)
    weights = (np.arange(N) % 3 == 0).astype(np.float32)
    hostile = np.where(weights[:, None] == 0, np.nan, hidden)
    clean = differentiated()(hidden, projection, targets, weights)
    dirty = differentiated()(hostile, projection, np.where(weights == 0, -100, targets), weights)
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)
    assert (np.asarray(dirty[1][0])[weights == 0] == 0).all()


@pytest.mark.parametrize("chunk", [1, 3, None])
def test_many_chunks_are_as_one(chunk):
    hidden, projection, targets, rng = case(2)
    weights = rng.choice([0.0, 1.0], N).astype(np.float32)
    one = differentiated(chunk=N)(hidden, projection, targets, weights)
    many = differentiated(chunk=chunk)(hidden, projection, targets, weights)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6), one, many)


def test_sums_add_over_parts_of_a_batch():
    hidden, projection, targets, rng = case(4)
    weights = rng.choice([0.0, 1.0, 3.0], N).astype(np.float32)
    whole = differentiated()(hidden, projection, targets, weights)
    first = differentiated()(hidden, projection, targets, np.where(np.arange(N) < 4, weights, 0))
    second = differentiated()(hidden, projection, targets, np.where(np.arange(N) < 4, 0, weights))
    added = jax.tree.map(jnp.add, first, second)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6), added, whole)


def test_bf16_inputs_are_summed_in_fp32():
    hidden, projection, targets, _ = case(5)
    weights = np.ones(N, np.float32)
    hidden, projection = (jnp.asarray(x, jnp.bfloat16) for x in (hidden, projection))
    (total, _), found = differentiated()(hidden, projection, targets, weights)
    assert [g.dtype for g in found] == [jnp.bfloat16] * 2
    h, w = (np.asarray(x, np.float64) for x in (hidden, projection))
    want, by_hidden, by_projection = reference.gradients(lambda z: reference.cross_entropy(z, targets), h, w, weights)
    # logits of bf16 inputs are exact products: the value is as good as in fp32; the gradients are rounded to bf16
    np.testing.assert_allclose(total, want, rtol=2e-6)
    np.testing.assert_allclose(found[0].astype(np.float32), by_hidden, atol=0.02)
    np.testing.assert_allclose(found[1].astype(np.float32), by_projection, atol=0.02)
    # fp32 inputs that are rounded to bf16 in the products give the same value, and gradients in fp32
    (rounded, _), fine = differentiated(dtype=jnp.bfloat16)(
        h.astype(np.float32), w.astype(np.float32), targets, weights
    )
    assert rounded == total
    assert [g.dtype for g in fine] == [jnp.float32] * 2


def test_counting_does_not_saturate_as_bf16_sums_do():
    tokens = 70_000
    hidden, projection = jnp.zeros((tokens, 2), jnp.bfloat16), jnp.zeros((3, 2), jnp.bfloat16)
    total, count, _ = jax.jit(lambda *a: chunked_cross_entropy(*a, chunk=4096))(
        hidden, projection, jnp.zeros(tokens, jnp.int32), jnp.ones(tokens, jnp.bfloat16)
    )
    assert count == tokens
    np.testing.assert_allclose(total, tokens * np.log(3), rtol=1e-5)


def test_a_trained_target_that_is_no_token_is_seen():
    hidden, projection, targets, _ = case()
    weights = np.ones(N, np.float32)
    for bad in (-100, V):
        (total, _), _ = differentiated()(hidden, projection, np.where(np.arange(N) == 3, bad, targets), weights)
        assert np.isnan(total)


@dataclass(frozen=True)
class Visits:
    """Counts the slots that reach the projection."""

    def __call__(self, logits, teacher, inputs, vocabulary):
        return {"sum": jnp.ones(logits.shape[0])}, jnp.zeros_like(logits)


@pytest.mark.parametrize(("used", "slots"), [(0, 0), (1, 8), (8, 8), (9, 16), (64, 64)])
def test_masked_tokens_never_reach_the_projection(used, slots):
    rng = np.random.default_rng(used)
    plan = Plan(Visits(), V, 8, jnp.float32)
    inputs = {"used": jnp.asarray(rng.permutation(64) < used)}
    found = sweep(plan, (jnp.ones((64, E)), jnp.ones((V, E))), None, inputs)
    assert found["sum"] == slots


def test_whole_logits_never_exist():
    tokens, columns = 4096, 8192
    shapes = [
        ((tokens, 16), jnp.float32),
        ((columns, 16), jnp.float32),
        ((tokens,), jnp.int32),
        ((tokens,), jnp.float32),
    ]
    lowered = differentiated(chunk=128).lower(*(jax.ShapeDtypeStruct(*s) for s in shapes))
    compiled = lowered.compile()
    assert compiled.memory_analysis().temp_size_in_bytes < tokens * columns * 4 / 8
    assert f"{tokens},{columns}]" not in compiled.as_text()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"z_loss": -1.0}, "z_loss"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"softcap": 0.0}, "softcap"),
        ({"vocabulary": V + 1}, "columns"),
        ({"chunk": 0}, "chunk"),
    ],
)
def test_bad_arguments_are_named(options, match):
    hidden, projection, targets, _ = case()
    with pytest.raises(ValueError, match=match):
        chunked_cross_entropy(
            jnp.asarray(hidden), jnp.asarray(projection), jnp.asarray(targets), jnp.ones(N), **options
        )


@pytest.mark.parametrize(("block", "dtype"), [(1, "float32"), (16, "float32"), (37, "float32"), (16, "bfloat16")])
def test_blocks_that_do_not_divide_the_vocabulary(block, dtype, monkeypatch):
    hidden, projection, targets, _ = case(6)
    weights = np.ones(N, np.float32)
    want = differentiated(dtype=dtype)(hidden, projection, targets, weights)
    monkeypatch.setattr(products, "BLOCK", block)
    found = differentiated.__wrapped__(dtype=dtype)(hidden, projection, targets, weights)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), found, want)


@pytest.mark.parametrize("block", [16, 37, 64])
def test_one_cpu_forms_the_projections_gradient_of_rounded_slopes(one_cpu, block, monkeypatch):
    hidden, projection, targets, _ = case(7)
    weights = np.ones(N, np.float32)
    monkeypatch.setattr(products, "BLOCK", block)
    found = differentiated.__wrapped__(dtype="bfloat16")(hidden, projection, targets, weights)[1]
    rounded = (np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) for x in (hidden, projection))
    _, by_hidden, by_projection = reference.gradients(lambda z: reference.cross_entropy(z, targets), *rounded, weights)
    # a token's slopes are at most 2 together, and rounded by 2**-9 of themselves, times numbers of about 2
    np.testing.assert_allclose(found[0], by_hidden, atol=2**-7)
    np.testing.assert_allclose(found[1], by_projection, atol=2**-7)
    assert np.abs(found[1] - by_projection).max() > 1e-5


def test_a_frozen_projection_costs_no_gradient_of_it():
    rng = np.random.default_rng(8)
    h, w = (jnp.asarray(rng.normal(0, 1, s).astype(np.float32)) for s in ((16, 64), (4096, 64)))
    targets, weights = jnp.asarray(rng.integers(0, 4096, 16)), jnp.ones(16)

    def loss(hidden, projection):
        return chunked_cross_entropy(hidden, projection, targets, weights)[0]

    both = jax.jit(jax.grad(loss, (0, 1))).lower(h, w).compile()
    alone = jax.jit(jax.grad(loss)).lower(h, w).compile()
    np.testing.assert_array_equal(both(h, w)[0], alone(h, w))
    # as adapters see it: through a function of what is trained, within a scan
    through = jax.jit(jax.grad(lambda a: jax.lax.scan(lambda c, x: (c + loss(a * x, w), None), 0.0, h[None])[0]))
    np.testing.assert_allclose(through(jnp.ones(64)[None].repeat(16, 0)), alone(h, w) * h, rtol=1e-4, atol=1e-5)
    used = [c.memory_analysis() for c in (alone, both)]
    less, more = (u.temp_size_in_bytes + u.output_size_in_bytes for u in used)
    assert more - less > 0.9 * w.nbytes
