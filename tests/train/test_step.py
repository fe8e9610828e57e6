"""The step: gradients do not depend on how the batch was cut, packed, or spread over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.config import OptimizerConfig
from jaxdistill.data.examples import Example
from jaxdistill.data.packing import best_fit, fill_row
from jaxdistill.models import ModelConfig, abstract_model, init_model, param_shardings, params_of
from jaxdistill.parallel.mesh import make_mesh
from jaxdistill.train.gradients import gradients
from jaxdistill.train.optimizer import make_optimizer, make_schedule
from jaxdistill.train.step import init_state, make_step, put_batch, state_shardings

CONFIG = ModelConfig.from_hf(
    {
        "model_type": "qwen3",
        "vocab_size": 98,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    }
)
WEIGHTS = jnp.array([0.0, 0.5, 1.0])
RATES = {"adamw": 1e-2, "muon": 1e-2, "adafactor": 1e-1}


def examples(count=24, seed=0):
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        n = int(rng.integers(4, 17))
        regions = np.sort(rng.integers(0, 3, n))
        made.append(Example(str(i), rng.integers(0, 97, n).tolist(), regions.tolist()))
    return made


def batch_of(examples, row_tokens=32, rows=8):
    packed = best_fit([len(e.tokens) for e in examples], row_tokens)
    filled = [fill_row([examples[i] for i in row], row_tokens) for row in packed]
    filled += [fill_row([], row_tokens)] * (-len(filled) % rows)
    return {k: jnp.asarray(np.stack([row[k] for row in filled])) for k in filled[0]}


def close(a, b, rtol=2e-5):
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(a))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=rtol * scale), a, b)


@pytest.fixture(scope="module")
def whole():
    model = init_model(CONFIG, 0)
    batch = batch_of(examples())
    return model, batch, *gradients(model, params_of(model), batch, WEIGHTS, 1)


@pytest.mark.parametrize("micro_batches", [2, 4, 8])
def test_gradient_does_not_depend_on_how_the_batch_was_cut(whole, micro_batches):
    model, batch, gradient, metrics = whole
    cut, cut_metrics = gradients(model, params_of(model), batch, WEIGHTS, micro_batches)
    close(gradient, cut)
    np.testing.assert_allclose(metrics["loss"], cut_metrics["loss"], rtol=1e-5)
    np.testing.assert_allclose(metrics["count"], cut_metrics["count"])


def test_gradient_does_not_depend_on_packing(whole):
    model, _, gradient, _ = whole
    unpacked = [fill_row([e], 32) for e in examples()]
    batch = {k: jnp.asarray(np.stack([row[k] for row in unpacked])) for k in unpacked[0]}
    close(gradient, gradients(model, params_of(model), batch, WEIGHTS, 1)[0])


@pytest.mark.parametrize(
    ("shape", "micro_batches"),
    [
        ({"fsdp": 8}, 1),
        ({"data": 2, "fsdp": 2, "tensor": 2}, 2),
        ({"data": 4, "context": 2}, 1),
        ({"fsdp": 2, "tensor": 2, "context": 2}, 4),
    ],
)
def test_eight_devices_equal_one(whole, shape, micro_batches):
    _, batch, gradient, metrics = whole
    mesh = make_mesh(shape)
    model = init_model(CONFIG, 0, mesh=mesh)
    arrays = {k: np.asarray(v) for k, v in batch.items()}
    spread = put_batch(lambda rows: {k: v[rows] for k, v in arrays.items()}, arrays["tokens"].shape, mesh)
    step = jax.jit(lambda p, b: gradients(abstract_model(CONFIG, mesh=mesh), p, b, WEIGHTS, micro_batches))
    found, found_metrics = step(params_of(model), spread)
    close(gradient, jax.device_get(found))
    np.testing.assert_allclose(metrics["loss"], found_metrics["loss"], rtol=1e-5)


def test_other_segments_change_nothing(whole):
    """Changing one segment's tokens leaves the gradient of a loss on another segment as it was."""
    model, batch, _, _ = whole
    alone = dict(batch, regions=jnp.where(batch["segment_ids"] == 1, batch["regions"], 0))
    changed = dict(alone, tokens=jnp.where(batch["segment_ids"] == 2, (batch["tokens"] + 1) % 97, batch["tokens"]))
    a, _ = gradients(model, params_of(model), alone, WEIGHTS, 1)
    b, _ = gradients(model, params_of(model), changed, WEIGHTS, 1)
    assert not jnp.array_equal(changed["tokens"], alone["tokens"])
    assert any(jnp.any(x != 0) for x in jax.tree.leaves(a))
    close(a, b, rtol=1e-6)


def test_a_batch_without_trained_tokens_is_zero_not_nan(whole):
    model, batch, _, _ = whole
    gradient, metrics = gradients(
        model, params_of(model), dict(batch, regions=jnp.zeros_like(batch["regions"])), WEIGHTS, 1
    )
    assert all((np.asarray(g) == 0).all() for g in jax.tree.leaves(gradient))
    assert metrics["loss"] == 0


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_moments_are_sharded_as_their_parameters(name):
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    optimizer = make_optimizer(OptimizerConfig(name=name, learning_rate=1e-3), 10)
    shardings = state_shardings(CONFIG, optimizer, mesh)
    model = init_model(CONFIG, 0, mesh=mesh)
    state = init_state(params_of(model), optimizer, shardings)
    sharded = [x for x in jax.tree.leaves(state["optimizer"]) if x.shape == (2, 32, 48)]
    assert len(sharded) >= 2
    assert all(x.addressable_shards[0].data.shape == (2, 8, 24) for x in sharded)


def test_adafactor_holds_rows_and_columns_in_place_of_matrices():
    config = ModelConfig.from_hf(CONFIG.to_hf() | {"hidden_size": 128, "intermediate_size": 256})
    params = jax.eval_shape(lambda: params_of(init_model(config, 0)))
    optimizer = make_optimizer(OptimizerConfig(name="adafactor", learning_rate=1e-2), 10)
    moments = jax.tree.leaves(jax.eval_shape(optimizer.init, params))
    assert sum(m.size for m in moments) < 0.2 * sum(p.size for p in jax.tree.leaves(params))
    shardings = state_shardings(config, optimizer, make_mesh({"fsdp": 8}))
    assert len(jax.tree.leaves(shardings["optimizer"])) == len(moments)


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor"])
def test_training_learns_a_fixed_batch(name):
    mesh = make_mesh({"fsdp": 8})
    optimizer = make_optimizer(OptimizerConfig(name=name, learning_rate=RATES[name], schedule="constant"), 40)
    shardings = state_shardings(CONFIG, optimizer, mesh)
    state = init_state(params_of(init_model(CONFIG, 0, mesh=mesh)), optimizer, shardings)
    step = make_step(
        abstract_model(CONFIG, mesh=mesh), optimizer, shardings, region_weights=(1.0, 1.0), micro_batches=2
    )
    arrays = {k: np.asarray(v) for k, v in batch_of(examples(), rows=16).items()}
    batch = put_batch(lambda rows: {k: v[rows] for k, v in arrays.items()}, arrays["tokens"].shape, mesh)
    losses = []
    for _ in range(40):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[0] > 4
    assert losses[-1] < 1


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor"])
def test_only_matrices_are_decayed(name):
    optimizer = make_optimizer(
        OptimizerConfig(name=name, learning_rate=1.0, weight_decay=0.1, schedule="constant", warmup_share=0), 10
    )
    params = jax.tree.map(jnp.ones_like, params_of(init_model(CONFIG, 0)))
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    np.testing.assert_allclose(updates["layers"]["q"], -0.1, rtol=1e-5)
    for vector in (updates["embed"], updates["norm"], updates["layers"]["mlp_norm"], updates["layers"]["q_norm"]):
        assert (np.asarray(vector) == 0).all()


def test_schedules_reach_peak_and_end():
    for name, middle in (("constant", 1.0), ("wsd", 1.0), ("linear", 0.5), ("cosine", 0.5)):
        schedule = make_schedule(
            OptimizerConfig(learning_rate=1.0, schedule=name, warmup_share=0.1, decay_share=0.3), 200
        )
        assert float(schedule(0)) == pytest.approx(1 / 20)
        assert float(schedule(20)) == pytest.approx(1.0, abs=0.02)
        assert float(schedule(110)) == pytest.approx(middle, abs=0.02)
        assert float(schedule(200)) == pytest.approx(1.0 if name == "constant" else 0.0, abs=0.02)


def test_meshes_that_do_not_fit_say_so():
    with pytest.raises(ValueError, match="does not fit 8 devices"):
        make_mesh({"data": 3})
    with pytest.raises(ValueError, match="does not divide 4 query heads and 2 key heads"):
        param_shardings(CONFIG, make_mesh({"tensor": 4, "data": 2}))
