"""Contrastive losses against numbers worked out by hand, float64 references, and slopes by finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.losses import PREFERENCES, Pairs

# log p of two responses: 4 tokens at p = 1/2 each, 2 tokens at p = 1/4 each
HALF, QUARTER = np.log(0.5), np.log(0.25)
HAND = {
    # means: log 1/2 against log 1/4, which is log 2 apart
    "margin": 1 - np.log(2),
    # the sums are equal (1/16 both); the references' are not: 0.1 * (0 - (-1 + 3))
    "dpo": np.log1p(np.exp(0.1 * 2)),
    # odds of 1/2 are 1, of 1/4 are 1/3: sigmoid(log 3) = 3/4
    "orpo": -np.log(0.75),
    # 2 * log 2 - 1
    "simpo": np.log1p(np.exp(1 - 2 * np.log(2))),
}


def pairs_of(*columns) -> Pairs:
    return Pairs(*(jnp.asarray(c, jnp.float32) for c in columns))


def reference(name: str, c, r, nc, nr, rc, rr, beta: float, gap: float, normalize: bool) -> np.ndarray:
    """The formulas in float64, from p itself where the paper has p."""
    if normalize:
        c, r, rc, rr = c / nc, r / nr, rc / nc, rr / nr
    match name:
        case "margin":
            return np.maximum(0, gap - beta * (c - r))
        case "dpo":
            inside = beta * ((c - rc) - (r - rr)) - gap
        case "simpo":
            inside = beta * (c - r) - gap
        case "orpo":
            odds = np.exp(c) / (1 - np.exp(c)), np.exp(r) / (1 - np.exp(r))
            inside = beta * np.log(odds[0] / odds[1]) - gap
    return -np.log(1 / (1 + np.exp(-inside)))


@pytest.mark.parametrize("name", PREFERENCES)
def test_by_hand(name):
    form = PREFERENCES[name]
    pairs = pairs_of([4 * HALF], [2 * QUARTER], [4.0], [2.0], [-1.0], [-3.0])
    # log 2 a token apart; the hinge is at work where that is less than the gap
    gap = 1.0 if name == "margin" else form.gap
    got = form.loss(pairs, beta=form.beta, gap=gap, normalize=form.normalize)
    np.testing.assert_allclose(got, [HAND[name]], rtol=1e-6)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("name", PREFERENCES)
def test_values_and_gradients_match_float64(name, normalize):
    rng = np.random.default_rng(1)
    numbers = rng.integers(2, 9, (2, 40)).astype(float)
    c, r, rc, rr = -rng.uniform(0.2, 2.0, (4, 40)) * np.concatenate([numbers, numbers])
    beta, gap = 0.7, 0.3

    def value(c, r):
        return reference(name, c, r, *numbers, rc, rr, beta, gap, normalize)

    def ours(c, r):
        return PREFERENCES[name].loss(pairs_of(c, r, *numbers, rc, rr), beta=beta, gap=gap, normalize=normalize)

    want = value(c, r)
    np.testing.assert_allclose(ours(c, r), want, rtol=2e-5, atol=1e-6)
    step = 1e-6
    slopes = (
        (value(c + step, r) - value(c - step, r)) / (2 * step),
        (value(c, r + step) - value(c, r - step)) / (2 * step),
    )
    got = jax.grad(lambda a, b: jnp.sum(ours(a, b)), (0, 1))(jnp.float32(c), jnp.float32(r))
    smooth = (want > 1e-4) if name == "margin" else np.full(len(want), True)  # the hinge has a corner
    assert smooth.sum() > 20
    for mine, slope in zip(got, slopes, strict=True):
        np.testing.assert_allclose(np.asarray(mine)[smooth], slope[smooth], rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("name", PREFERENCES)
def test_the_chosen_one_rises_and_length_alone_decides_nothing_where_it_is_normalized(name):
    form = PREFERENCES[name]
    options = {"beta": form.beta, "gap": form.gap, "normalize": form.normalize}
    short = pairs_of([3 * HALF], [3 * HALF], [3.0], [3.0], [0.0], [0.0])
    long = pairs_of([9 * HALF], [3 * HALF], [9.0], [3.0], [0.0], [0.0])
    same = np.allclose(form.loss(short, **options), form.loss(long, **options))
    assert same == form.normalize
    by_chosen, by_rejected = jax.grad(
        lambda c, r: form.loss(pairs_of(c, r, [3.0], [3.0], [0.0], [0.0]), **options)[0], (0, 1)
    )(jnp.array([3 * HALF]), jnp.array([3 * HALF]))
    assert by_chosen[0] < 0 < by_rejected[0]


def test_certainty_is_finite():
    form = PREFERENCES["orpo"]
    pairs = pairs_of([0.0, -500.0], [-500.0, 0.0], [4.0, 4.0], [4.0, 4.0], [0.0, 0.0], [0.0, 0.0])
    assert np.isfinite(form.loss(pairs, beta=1.0, gap=0.0, normalize=True)).all()
