"""Distillation inside the step: against a reference written out token by token, and against itself done otherwise."""

import functools
import json
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import hub, pipeline
from jaxdistill.config import DistillConfig, load
from jaxdistill.config.train import DistillConfig as Section
from jaxdistill.data import topk
from jaxdistill.data.packing import best_fit, fill_row
from jaxdistill.data.topk import TopK, codes_of
from jaxdistill.losses import DIVERGENCES
from jaxdistill.models import ModelConfig, abstract_model, init_model, param_shardings, params_of, with_params
from jaxdistill.parallel.mesh import RULES, make_mesh
from jaxdistill.records import RunDir
from jaxdistill.tokenization import TokenMap
from jaxdistill.train.distill import Distillation, same_vocabulary, share_schedule
from jaxdistill.train.gradients import gradients
from jaxdistill.train.setup import set_up
from jaxdistill.train.step import put_batch
from tests.helpers import TINY, prepared_run
from tests.losses import reference
from tests.train.test_step import CONFIG, WEIGHTS, close, examples

V = CONFIG.vocab_size
PADDED = ModelConfig.from_hf(CONFIG.to_hf() | {"vocab_size": V + 6, "hidden_size": 16})
"""A teacher of another width, with more padded columns for the same tokens."""
STEP = jnp.int32(0)


def always(value):
    return lambda step: jnp.float32(value) + 0 * step


def packed(rows=8):
    found = [[examples()[i] for i in row] for row in best_fit([len(e.tokens) for e in examples()], 32)]
    filled = [fill_row(row, 32) for row in found]
    filled += [fill_row([], 32)] * (-len(filled) % rows)
    return {k: np.stack([row[k] for row in filled]) for k in filled[0]}


def with_stored(batch, log_q, k):
    """A batch with distributions beside its tokens: log_q [B, T, V] at position t is about token t + 1."""
    beside = np.roll(log_q, 1, axis=1)  # beside the token that it is about
    drawn = batch["tokens"].reshape(-1)
    order = np.argsort(-beside.reshape(-1, beside.shape[-1]), 1)
    logprobs = np.take_along_axis(beside.reshape(order.shape), order, 1)
    own = beside.reshape(order.shape)[np.arange(len(drawn)), drawn]
    codec = TopK(k, V)
    rows = topk.encode(order, logprobs, drawn, own, codec)
    rows[batch["regions"].reshape(-1) == 0] = 0
    found = codec.unpack(rows)
    return batch | {name: found[name].reshape(*batch["tokens"].shape, *found[name].shape[1:]) for name in topk.FIELDS}


@pytest.fixture(scope="module")
def case():
    """(student, teacher, batch on one device, the teacher's log-probabilities of the real tokens, float64)."""
    # sure of something, other than at the start
    student, teacher = (
        with_params(model, params_of(model) | {"embed": scale * params_of(model)["embed"]})
        for model, scale in ((init_model(CONFIG, 0), 10), (init_model(PADDED, 7), 40))
    )
    batch = packed()
    arrays = [jnp.asarray(batch[name]) for name in ("tokens", "positions", "segment_ids")]
    logits = np.asarray(jax.jit(teacher)(*arrays), np.float64)[..., :V]
    return student, teacher, batch, reference.log_softmax(logits), arrays


@functools.cache
def stored_kind(k, **kind):
    return Distillation(always(0.5), stored=TopK(k, V, **kind))


@functools.cache
def online_kind(temperature=1.0):
    return Distillation(always(0.5), teacher=abstract_model(PADDED), vocabulary=V, temperature=temperature)


@functools.cache
def stepper(distillation, micro_batches=1, model=None):
    model = model or abstract_model(CONFIG)
    return jax.jit(
        lambda params, batch, teacher=None, step=STEP: gradients(
            model, params, batch, WEIGHTS, micro_batches, distillation=distillation, teacher=teacher, step=step
        )
    )


def written_out(student, arrays, batch, log_q, k):
    """The loss token by token: every trained token t of a segment is predicted, and distilled, at t - 1."""
    log_p = reference.log_softmax(np.asarray(jax.jit(student)(*arrays), np.float64))
    ce = kd = count = 0.0
    for b, t in np.ndindex(batch["tokens"].shape):
        weight = float(WEIGHTS[batch["regions"][b, t]])
        if t == 0 or not weight or batch["segment_ids"][b, t] != batch["segment_ids"][b, t - 1]:
            continue
        token, q, p = batch["tokens"][b, t], log_q[b, t - 1], log_p[b, t - 1]
        ids = np.argsort(-q)[:k]
        ids[-1] = ids[-1] if token in ids else token
        ce -= weight * p[token]
        kd += weight * reference.bucketed_kl(q[None], p[None], ids[None])[0]
        count += weight
    return ce / count, kd / count


def test_stored_distributions_are_learned_where_the_tokens_are(case):
    student, _, batch, log_q, arrays = case
    stored = with_stored(batch, log_q, 5)
    _, metrics = stepper(stored_kind(5))(params_of(student), stored)
    ce, kd = written_out(student, arrays, batch, log_q, 5)
    assert kd > 0.5
    np.testing.assert_allclose(metrics["ce"], ce, rtol=1e-5)
    np.testing.assert_allclose(metrics["kd"], kd, rtol=2e-3)
    np.testing.assert_allclose(metrics["loss"], ce + 0.5 * kd, rtol=1e-3)
    # one off would be another number
    shifted = {name: np.roll(array, 1, 1) if name in topk.FIELDS else array for name, array in stored.items()}
    _, wrong = stepper(stored_kind(5))(params_of(student), shifted)
    assert abs(float(wrong["kd"]) - kd) > 0.02
    # a token without a distribution has the cross-entropy alone
    none = {name: np.zeros_like(array) if name in topk.FIELDS else array for name, array in stored.items()}
    plain, plain_metrics = stepper(None)(params_of(student), {n: batch[n] for n in batch})
    alone, alone_metrics = stepper(stored_kind(5))(params_of(student), none)
    close(plain, alone)
    np.testing.assert_allclose(plain_metrics["loss"], alone_metrics["loss"], rtol=1e-6)
    np.testing.assert_allclose(plain_metrics["accuracy"], alone_metrics["accuracy"], rtol=1e-6)


def test_all_tokens_stored_are_the_online_teacher_at_a_temperature_too(case):
    student, teacher, batch, log_q, _ = case
    want, metrics = stepper(online_kind(2.0))(params_of(student), batch, params_of(teacher))
    stored = with_stored(batch, reference.log_softmax(log_q / 2), V)
    got, stored_metrics = stepper(stored_kind(V, temperature=2.0))(params_of(student), stored)
    for name in ("loss", "ce", "kd", "accuracy"):
        np.testing.assert_allclose(metrics[name], stored_metrics[name], rtol=1e-3)
    close(want, got, rtol=1e-3)
    # the alarm for a wrongly loaded teacher: its own cross-entropy on the same tokens
    trained = np.roll(batch["regions"], -1, 1) * (batch["segment_ids"] == np.roll(batch["segment_ids"], -1, 1))
    trained[:, -1] = 0
    weights = np.asarray(WEIGHTS)[trained]
    nll = -np.take_along_axis(log_q, np.roll(batch["tokens"], -1, 1)[..., None], -1)[..., 0]
    np.testing.assert_allclose(metrics["teacher_nll"], (weights * nll).sum() / weights.sum(), rtol=1e-4)


def test_the_student_as_its_own_teacher_has_nothing_to_teach(case):
    student, _, batch, _, _ = case
    alone = Distillation(always(1.0), ce_weight=0.0, teacher=abstract_model(CONFIG), vocabulary=V, temperature=2.0)
    gradient, metrics = stepper(alone)(params_of(student), batch, params_of(student))
    # of equal logits it is exactly 0 (tests/losses); two forward passes need not round alike
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradient)) < 1e-6
    assert metrics["loss"] == metrics["kd"] < 1e-9 and metrics["ce"] > 4


@pytest.mark.parametrize("kind", ["stored", "online"])
def test_neither_micro_batches_nor_devices_change_the_gradient(case, kind):
    student, teacher, batch, log_q, _ = case
    batch = with_stored(batch, log_q, 5) if kind == "stored" else batch
    mesh = make_mesh({"fsdp": 2, "tensor": 2, "context": 2})

    said = params_of(teacher) if kind == "online" else None
    want, metrics = stepper(online_kind() if kind == "online" else stored_kind(5))(params_of(student), batch, said)
    beside = topk.stored_shapes(5) if kind == "stored" else None
    spread = put_batch(
        lambda rows: {name: array[rows] for name, array in batch.items()}, batch["tokens"].shape, mesh, beside
    )
    wide = jax.device_put(params_of(student), param_shardings(CONFIG, mesh))
    if kind == "online":
        # its own sharding: whole along fsdp
        said = jax.device_put(said, param_shardings(PADDED, mesh, RULES | {"embed": None}))
    wide_kind = Distillation(always(0.5), teacher=abstract_model(PADDED, mesh=mesh), vocabulary=V)
    wide_kind = wide_kind if kind == "online" else stored_kind(5)
    found, spread_metrics = stepper(wide_kind, 4, abstract_model(CONFIG, mesh=mesh))(wide, spread, said)
    close(want, jax.device_get(found))
    for name in ("loss", "ce", "kd", "accuracy"):
        np.testing.assert_allclose(metrics[name], spread_metrics[name], rtol=1e-5)


def test_draws_are_learned_from_as_the_distribution_is_on_average(case):
    """Stored draws whose shares are the teacher's probabilities: the gradient of the whole divergence."""
    student, _, batch, log_q, _ = case
    stored = with_stored(batch, log_q, V)
    draws = stored | {"topk_tail": np.zeros_like(stored["topk_tail"])}
    want, _ = stepper(stored_kind(V))(params_of(student), stored)
    got, _ = stepper(stored_kind(V, random=True))(params_of(student), draws)
    close(want, got, rtol=1e-4)
    assert codes_of(np.log([0.5])) == 1421  # 1 + 0.693 * 2048


def test_the_weight_goes_from_its_first_to_its_last_value():
    for schedule, middle in (("linear", 0.6), ("cosine", 0.6)):
        share = share_schedule(DistillConfig(source="stored", weight=1.0, final_weight=0.2, schedule=schedule), 11)
        got = [float(share(jnp.int32(s))) for s in (0, 5, 10, 11)]
        np.testing.assert_allclose(got, [1.0, middle, 0.2, 0.2], rtol=1e-6)
    assert float(share_schedule(DistillConfig(source="stored", weight=0.3), 1)(jnp.int32(0))) == pytest.approx(0.3)


def test_every_divergence_has_its_name_in_the_config():
    assert set(typing.get_args(typing.get_type_hints(Section)["divergence"])) == {*DIVERGENCES, "uld"}


def test_one_tokenizer_in_two_widths_is_one_vocabulary_and_two_tokenizers_are_refused():
    ids = {"a": 0, "b": 1, "c": 2}
    assert same_vocabulary(TokenMap(ids), TokenMap(dict(reversed(ids.items()))), "t", 5) == 3
    with pytest.raises(ValueError, match=r"student and of the teacher t differ: 'b' is 1 and 3"):
        same_vocabulary(TokenMap(ids), TokenMap(ids | {"b": 3}), "t", 5)
    assert TokenMap(ids).fingerprint != TokenMap(ids | {"b": 3}).fingerprint


def test_a_run_with_the_teacher_on_its_mesh(tmp_path):
    distill = {"source": "online", "divergence": "jsd", "teacher": "demo", "temperature": 2.0, "replicate": True}
    student = TINY["student"] | {"tokenizer": "demo"}
    path = prepared_run(
        tmp_path, student=student, evaluate=None, train=TINY["train"] | {"steps": 4, "log_every": 1, "distill": distill}
    )
    config = load(path)
    pipeline.run_command("train", config)
    lines = (tmp_path / "run" / "checkpoints" / "metrics.jsonl").read_text().splitlines()
    first, last = json.loads(lines[0]), json.loads(lines[-1])
    assert first["kd"] > last["kd"] > 0
    assert last["loss"] == pytest.approx(last["ce"] + last["kd"], rel=1e-4)
    # it knows these problems: a wrongly loaded one would not
    assert first["teacher_nll"] < 1 < 5 < first["ce"]
    identity = json.loads((tmp_path / "run" / "checkpoints" / "4" / "run" / "metadata").read_text())["identity"]
    assert identity["teacher"] == {"name": "demo", "revision": hub.revision_of(hub.demo_teacher())}
    # the same words under other numbers are another tokenizer
    tokens = json.loads((tmp_path / "run" / "tokenizer" / "tokenizer.json").read_text())
    vocab = tokens["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (tmp_path / "run" / "tokenizer" / "tokenizer.json").write_text(json.dumps(tokens))
    with pytest.raises(ValueError, match="tokenizers of the student and of the teacher demo differ: 'a' is"):
        set_up(config, RunDir(tmp_path / "run"))
