"""What is drawn from logits, against the distribution written out in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.generate import sampling

V = 700  # no multiple of a block
DRAWS = 4000


def logits(scale=2.0):
    return np.random.default_rng(0).normal(0, scale, V).astype(np.float32)


def expected(logits, temperature, top_k, top_p):
    p = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    order = np.argsort(-p)
    if top_k is not None:
        p[order[top_k:]] = 0
    p /= p.sum()
    if top_p is not None:
        before = np.cumsum(p[order]) - p[order]
        p[order[before >= top_p]] = 0
    return p / p.sum()


def draw(logits, temperature=1.0, top_k=None, top_p=None, draws=DRAWS):
    @jax.jit
    def f(x, keys):
        return sampling.sample(
            x,
            keys,
            temperature=jnp.float32(temperature),
            top_k=None if top_k is None else jnp.int32(top_k),
            top_p=None if top_p is None else jnp.float32(top_p),
        )

    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(7), i))(jnp.arange(draws))
    return np.asarray(f(jnp.broadcast_to(jnp.asarray(logits)[None], (draws, len(logits))), keys))


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, None, None), (2.0, None, None), (1.5, 20, None), (1.0, None, 0.8), (3.0, None, 0.3), (2.0, 30, 0.6),
     (1.0, 5000, 0.9)],
)  # fmt: skip
def test_draws_follow_the_distribution(temperature, top_k, top_p):
    p = expected(logits(), temperature, top_k, top_p)
    counts = np.bincount(draw(logits(), temperature, top_k, top_p), minlength=V)
    assert not counts[p == 0].any()
    often = DRAWS * p > 5
    chi2 = ((counts - DRAWS * p)[often] ** 2 / (DRAWS * p)[often]).sum()
    assert chi2 < often.sum() + 5 * np.sqrt(2 * often.sum())


def test_a_nucleus_that_is_seldom_hit_is_cut_out():
    """Ten tokens of 10% of the probability: of 200 rows, 43% miss them in all rounds."""
    x = np.zeros(V, np.float32)
    x[100:110] = np.log(0.1 / 10 / (0.9 / (V - 10)))
    found = draw(x, top_p=0.09, draws=200)
    assert set(found.tolist()) == set(range(100, 110))


def test_the_edges():
    assert set(draw(logits(), top_k=1, draws=50).tolist()) == {int(logits().argmax())}
    assert set(draw(logits(), top_p=1e-6, draws=50).tolist()) == {int(logits().argmax())}
    assert set(draw(logits(), temperature=1e-4, draws=50).tolist()) == {int(logits().argmax())}
    # cuts keep all of equals, so a flat distribution is not cut
    assert len(set(draw(np.zeros(V, np.float32), top_k=3, draws=2000).tolist())) > 600
    x = np.full(V, -np.inf, np.float32)
    x[[3, 650]] = 1.0
    assert set(draw(x, draws=100).tolist()) == {3, 650}


def test_greedy_takes_the_first_of_equals():
    x = np.array([[0, 3, 1, 3], [-np.inf, -np.inf, -5, -np.inf], [np.nan, 1, 2, 3]], np.float32)
    assert np.asarray(sampling.greedy(jnp.asarray(x)))[:2].tolist() == [1, 2]
    assert 0 <= int(sampling.greedy(jnp.asarray(x))[2]) < 4


def test_a_row_draws_the_same_in_any_batch():
    x = np.random.default_rng(1).normal(0, 2, (64, V)).astype(np.float32)
    keys = jax.vmap(jax.random.key)(jnp.arange(64))
    f = jax.jit(lambda x, k: sampling.sample(x, k, temperature=jnp.float32(1.0), top_p=jnp.float32(0.7)))
    whole = np.asarray(f(jnp.asarray(x), keys))
    assert np.asarray(f(jnp.asarray(x[::-1].copy()), keys[::-1])).tolist() == whole[::-1].tolist()
    assert np.asarray(f(jnp.asarray(x[8:24]), keys[8:24])).tolist() == whole[8:24].tolist()
