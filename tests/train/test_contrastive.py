"""Contrastive training: gradients against plain autodiff, however the batch is cut and spread; resume to the bit."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import cli
from jaxdistill.config import ContrastiveConfig
from jaxdistill.data.packing import fill_row
from jaxdistill.losses import PREFERENCES
from jaxdistill.models import abstract_model, init_model, param_shardings, params_of, with_params
from jaxdistill.parallel.mesh import make_mesh
from jaxdistill.train.contrastive import Contrast, pair_gradients
from tests.helpers import TINY, prepared_run, tiny_config
from tests.train.test_step import CONFIG, close, examples

PAIRS = 12


@pytest.fixture(scope="module")
def batch():
    """Twelve pairs, one or two a row of 64, and a row of padding."""
    made = examples(2 * PAIRS, seed=4)
    for example in made:
        example.regions[-1] = 2  # every response has a token
        example.regions[0] = 0
    rows = [fill_row(made[i : i + 4], 64) for i in range(0, 16, 4)]
    rows += [fill_row(made[i : i + 2], 64) for i in range(16, 2 * PAIRS, 2)] + [fill_row([], 64)] * 8
    found = {k: jnp.asarray(np.stack([row[k] for row in rows])) for k in rows[0]}
    reference = np.random.default_rng(0).uniform(-40, -10, (len(rows), 4))
    return found | {"reference": jnp.asarray(reference, jnp.float32)}


def contrast_of(form: str) -> Contrast:
    return Contrast.of(ContrastiveConfig(form=form), segments=4)


def plain_loss(form: str, model, params, batch) -> jax.Array:
    """The mean over pairs from whole logits, each response picked out by a mask of its own."""
    logits = with_params(model, params)(batch["tokens"], batch["positions"], batch["segment_ids"])
    log_p = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1], axis=-1), batch["tokens"][:, 1:, None], axis=-1)[
        ..., 0
    ]
    ids, regions = np.asarray(batch["segment_ids"]), np.asarray(batch["regions"])
    found = [(row, segment) for row in range(len(ids)) for segment in range(1, ids[row].max() + 1)]
    masks = np.zeros((len(found), *log_p.shape), np.float32)
    for i, (row, segment) in enumerate(found):
        where = np.flatnonzero((ids[row] == segment) & (regions[row] > 0))
        first = np.flatnonzero(ids[row] == segment)[0]
        masks[i, row, where[where > first] - 1] = 1.0
    scores = jnp.einsum("nbt,bt->n", masks, log_p)
    if form == "dpo":
        scores -= jnp.stack([batch["reference"][row, segment - 1] for row, segment in found])
    else:
        scores /= masks.sum((1, 2))
    if form == "orpo":
        scores = jnp.log(jnp.exp(scores) / (1 - jnp.exp(scores)))
    ahead = PREFERENCES[form].beta * (scores[::2] - scores[1::2]) - PREFERENCES[form].gap
    assert len(ahead) == PAIRS
    return jnp.mean(jnp.maximum(0, -ahead) if form == "margin" else -jax.nn.log_sigmoid(ahead))


def gradients_of(form: str, model, batch, micro_batches: int = 1):
    step = jax.jit(lambda p, b: pair_gradients(contrast_of(form), model, p, b, micro_batches))
    return step(params_of(model), batch)


@pytest.fixture(scope="module")
def model():
    return init_model(CONFIG, 1)


@pytest.mark.parametrize("form", ["margin", "dpo", "orpo"])
def test_gradient_is_that_of_the_plain_loss(model, batch, form):
    got, metrics = gradients_of(form, model, batch)
    loss, want = jax.jit(jax.value_and_grad(lambda p: plain_loss(form, model, p, batch)))(params_of(model))
    np.testing.assert_allclose(metrics["pair_loss"], loss, rtol=2e-5)
    close(want, got, rtol=5e-5)
    assert 0 <= metrics["pair_accuracy"] <= 1


@pytest.mark.parametrize(("shape", "micro_batches"), [({"fsdp": 2, "tensor": 2, "context": 2}, 2), (None, 4)])
def test_cut_and_spread_it_is_the_same(model, batch, shape, micro_batches):
    contrast = contrast_of("simpo")
    want, metrics = gradients_of("simpo", model, batch)
    if shape is None:
        got, cut = gradients_of("simpo", model, batch, micro_batches)
    else:
        mesh = make_mesh(shape)
        spread = jax.device_put(params_of(model), param_shardings(CONFIG, mesh))
        step = jax.jit(lambda p, b: pair_gradients(contrast, abstract_model(CONFIG, mesh=mesh), p, b, micro_batches))
        got, cut = step(spread, batch)
    close(want, jax.device_get(got))
    for name in metrics:
        np.testing.assert_allclose(metrics[name], cut[name], rtol=2e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------------- a run


def lines_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "run" / "checkpoints" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_run_learns_from_its_pairs_and_goes_on_with_the_same_reference(tmp_path):
    train = TINY["train"] | {
        "steps": 8,
        "checkpoint_every": 4,
        "log_every": 1,
        "contrastive": {"form": "dpo", "beta": 0.5},
    }
    config = prepared_run(
        tmp_path, data={"row_tokens": 256, "overlong": "drop", "pairs": {"edits": True}}, train=train, evaluate=None
    )
    assert cli.main(["train", str(config)]) == 0
    lines = lines_of(tmp_path)
    # before the first step it is its own reference: log 2, as neither is preferred
    assert abs(lines[0]["pair_loss"] - np.log(2)) < 0.02
    assert lines[-1]["pair_loss"] < lines[0]["pair_loss"] - 0.01
    reference = tmp_path / "run" / "checkpoints" / "reference.npz"
    before = reference.read_bytes()
    checkpoints = tmp_path / "run" / "checkpoints"
    shutil.rmtree(checkpoints / "8")
    (checkpoints / "manifest.json").unlink()
    assert cli.main(["train", str(config)]) == 0
    assert reference.read_bytes() == before
    names = ("step", "loss", "pair_loss", "lm_loss", "chosen_logprob")
    assert [{n: x[n] for n in names} for x in lines_of(tmp_path)] == [{n: x[n] for n in names} for x in lines]


def test_pairs_are_asked_for_before_anything_is_computed(tmp_path, capsys):
    train = TINY["train"] | {"contrastive": {}}
    assert cli.main(["train", str(tiny_config(tmp_path, train=train))]) == 1
    assert "data.pairs" in capsys.readouterr().err
