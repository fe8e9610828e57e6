"""Bad steps: an update that must not be applied leaves everything as it was, to the bit, and is said."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import cli
from jaxdistill.config import OptimizerConfig
from jaxdistill.models import abstract_model, init_model, params_of
from jaxdistill.parallel.mesh import make_mesh
from jaxdistill.train.optimizer import make_optimizer, make_schedule
from jaxdistill.train.step import LOSS_MEMORY, init_state, make_step, put_batch, state_shapes, state_shardings
from tests.helpers import TINY, prepared_run
from tests.train.test_step import CONFIG, batch_of, examples

OPTIMIZER = OptimizerConfig(learning_rate=1e-2, schedule="linear", warmup_share=0.0)


@pytest.fixture(scope="module")
def made():
    mesh = make_mesh({"fsdp": 8})
    optimizer = make_optimizer(OPTIMIZER, 100)
    shardings = state_shardings(CONFIG, optimizer, mesh)
    step = make_step(
        abstract_model(CONFIG, mesh=mesh),
        optimizer,
        shardings,
        region_weights=(1.0, 1.0),
        micro_batches=1,
        schedule=make_schedule(OPTIMIZER, 100),
        spike=2.0,
    )
    arrays = {k: np.asarray(v) for k, v in batch_of(examples(), rows=16).items()}
    batch = put_batch(lambda rows: {k: v[rows] for k, v in arrays.items()}, arrays["tokens"].shape, mesh)
    # three steps from the start, on the host: a step donates what it is given
    state = init_state(params_of(init_model(CONFIG, 0, mesh=mesh)), optimizer, shardings)
    for _ in range(3):
        state, metrics = step(state, batch)
    return step, batch, jax.device_get(state), jax.device_get(metrics), shardings, optimizer


def taken(made, **changes):
    """One step from the state with changes: (state before, state after, metrics)."""
    step, batch, state, _, shardings, _ = made
    state = state | changes
    after, metrics = step(jax.device_put(state, shardings), batch)
    return state, jax.device_get(after), jax.device_get(metrics)


def same(a, b):
    return all(np.array_equal(x, y, equal_nan=True) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


def guard(**changes):
    return {"mean_loss": np.float32(4), "skipped": np.int32(0), "skipped_in_row": np.int32(0)} | changes


def test_a_good_step_moves_and_says_its_rate_and_sizes(made):
    before, after, metrics = taken(made)
    assert not same(before["params"], after["params"])
    assert metrics["bad"] == 0
    assert metrics["learning_rate"] == pytest.approx(float(make_schedule(OPTIMIZER, 100)(3)))
    batch = jax.device_get(made[1])
    real = batch["segment_ids"] > 0
    assert metrics["tokens"] == real.sum()
    assert metrics["pairs"] == CONFIG.num_layers * (batch["positions"] + 1)[real].sum()


def test_the_mean_loss_is_the_mean_at_first(made):
    _, _, state, metrics, *_ = made
    assert state["guard"]["mean_loss"] == pytest.approx(metrics["mean_loss"])
    assert 3 < metrics["mean_loss"] < 5


def test_a_loss_that_is_not_finite_leaves_everything_as_it_was_to_the_bit(made):
    poisoned = jax.tree.map(np.copy, made[2]["params"])
    poisoned["norm"][0] = np.nan
    before, after, metrics = taken(made, params=poisoned)
    assert np.isnan(metrics["loss"]) and metrics["bad"] == 1
    assert same(before["params"], after["params"]) and same(before["optimizer"], after["optimizer"])
    assert after["step"] == before["step"] + 1
    assert (after["guard"]["skipped"], after["guard"]["skipped_in_row"]) == (1, 1)
    assert np.isfinite(after["guard"]["mean_loss"])


def test_a_spike_is_skipped_once_there_were_steps_to_compare_with(made):
    low = {"guard": guard(mean_loss=np.float32(0.5))}
    _, _, early = taken(made, **low)
    assert early["bad"] == 0
    before, after, late = taken(made, step=np.int32(LOSS_MEMORY), **low)
    assert late["bad"] == 1 and np.isfinite(late["loss"])
    assert same(before["params"], after["params"]) and same(before["optimizer"], after["optimizer"])
    assert after["guard"]["mean_loss"] == np.float32(0.5)


def test_a_good_step_ends_the_row_of_bad_ones_and_the_schedule_waits_for_them(made):
    _, after, metrics = taken(made, step=np.int32(8), guard=guard(skipped=np.int32(5), skipped_in_row=np.int32(5)))
    assert (after["guard"]["skipped"], after["guard"]["skipped_in_row"]) == (5, 0)
    assert metrics["learning_rate"] == pytest.approx(float(make_schedule(OPTIMIZER, 100)(3)))


def test_the_shapes_to_restore_into_are_those_of_the_state(made):
    shapes = state_shapes(made[2]["params"], made[5])
    jax.tree.map(lambda a, b: np.testing.assert_equal((a.shape, a.dtype), (b.shape, b.dtype)), shapes, made[2])
    assert jax.tree.structure(shapes) == jax.tree.structure(jax.tree.map(jnp.asarray, made[2]))


DIVERGES = {"name": "adamw", "learning_rate": 1e12, "schedule": "constant", "warmup_share": 0.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run whose second step gives no finite gradient, for the first was a jump to nowhere."""
    root = tmp_path_factory.mktemp("diverges")
    prepared_run(root, train=TINY["train"] | {"optimizer": DIVERGES, "steps": 8, "tensorboard": False})
    return root


def test_a_bad_step_stops_the_run_and_its_batch_is_written_down(folder, capsys):
    assert cli.main(["train", str(folder / "config.yaml")]) == 1
    error = capsys.readouterr().err
    assert "step 2: loss" in error and "gradient norm nan (not finite)" in error and "train.on_bad_step: skip" in error
    lines = (folder / "run" / "checkpoints" / "bad_steps.jsonl").read_text().splitlines()
    line = json.loads(lines[-1])
    assert (line["step"], line["reason"], line["action"], line["gradient_norm"]) == (2, "not finite", "stop", "nan")
    assert len(line["rows"]) == 8 and all(0 <= row < 40 for row in line["rows"])


def test_skipping_goes_on_up_to_a_limit(folder, capsys):
    more = ["--set", "train.on_bad_step=skip", "--set", "train.max_skipped=3"]
    assert cli.main(["train", str(folder / "config.yaml"), *more]) == 1
    output = capsys.readouterr()
    assert "bad step 3 in a row (train.max_skipped)" in output.err
    assert output.out.count(": skipped; its rows are in") == 2
    lines = (folder / "run" / "checkpoints" / "bad_steps.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 3, 4]
