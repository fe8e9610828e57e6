"""A teacher behind servers: where its grades land, the step's loss from them, and a run that is stopped and goes on."""

import dataclasses
import json
import os
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import cli
from jaxdistill.config import OnPolicyConfig, ServerConfig, TracesConfig, VLLMConfig
from jaxdistill.models import abstract_model, param_shardings, params_of, with_params
from jaxdistill.parallel.mesh import make_mesh
from jaxdistill.parallel.processes import STOPPED
from jaxdistill.train import setup
from jaxdistill.train.answering import ByDecoder, ByVLLM
from jaxdistill.train.distill import SERVED, served_shapes
from jaxdistill.train.gradients import ROLLOUT_WEIGHTS, gradients
from jaxdistill.train.grading import ByServers
from jaxdistill.train.on_policy import fill, graded
from jaxdistill.train.step import put_batch
from tests.helpers import TINY, prepared_run
from tests.losses import reference
from tests.losses.test_topk import estimate
from tests.traces.fake_server import FakeServer
from tests.train.test_distill import STEP
from tests.train.test_on_policy import ANSWERS, ASKED, TRAIN, V, logits_of, models  # noqa: F401  (a fixture)
from tests.train.test_step import CONFIG, WEIGHTS, close

K = 4
NOWHERE = Path("/nowhere")


def by_servers(*urls: str, vocabulary: int = 60, retries: int = 0) -> ByServers:
    server = ServerConfig(urls=urls, retries=retries, patience_s=1.0, backoff_s=0.01)
    traces = TracesConfig(engine="import", teacher="demo", server=server)
    return ByServers(traces, NOWHERE, topk=K, vocabulary=vocabulary, row_tokens=32, log=NOWHERE)


# ---------------------------------------------------------------------------------------------------- the grades


def test_grades_lie_beside_the_tokens_that_they_are_about():
    rows = fill(ASKED, [ANSWERS[0], ANSWERS[1], []], 20)  # an empty answer is not asked about
    with FakeServer() as server:
        found = by_servers(server.url)(rows)
    assert sorted(body["prompt"] for body in server.asked) == [[5, 6, 7, 20, 21, 97], [8, 9, *ANSWERS[1]]]
    assert all(body["prompt_logprobs"] == K and body["max_tokens"] == 1 for body in server.asked)
    answers = rows["regions"] > 0
    # the fake teacher finds each token's k successors likelier, and what is no token of the student's is left out
    own = np.where(answers, -rows["tokens"] / np.float32(10) - 1, 0).astype(np.float32)
    np.testing.assert_allclose(found[SERVED[2]], own, rtol=1e-6)
    ids = rows["tokens"][..., None] + np.arange(1, K + 1)
    np.testing.assert_array_equal(found[SERVED[0]], np.where(answers[..., None] & (ids < 60), ids, -1))
    np.testing.assert_allclose(found[SERVED[1]][answers], np.tile(-np.arange(1, K + 1) / np.float32(10), (9, 1)))
    assert not found[SERVED[1]][~answers].any()


def test_an_answer_that_cannot_be_graded_ends_the_run_with_one_line():
    with FakeServer({5: ("500", 9)}) as server, pytest.raises(ValueError, match=r"could not grade .*HTTP 500") as error:
        by_servers(server.url)(fill(ASKED, ANSWERS, 20))
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------------ the loss


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl"])
def test_value_and_gradient_are_those_of_the_loss_written_out(models, divergence):  # noqa: F811
    """Cut into micro-batches, spread over devices; the reverse KL as it is estimated, the forward KL with a bucket."""
    student, teacher = models
    own = fill(ASKED, ANSWERS, 32)
    own = {name: np.concatenate([array, np.zeros((6, 32), array.dtype)]) for name, array in own.items()}
    log_q = reference.log_softmax(np.asarray(logits_of(teacher, own), np.float64))
    # at position t of the log-probabilities: what is said of token t + 1
    ids = np.argsort(-log_q, -1)[..., :K].astype(np.int32)
    logprobs = np.take_along_axis(log_q, ids, -1)
    said = np.take_along_axis(log_q[:, :-1], own["tokens"][:, 1:, None], -1)[..., 0]
    said = np.pad(said, ((0, 0), (1, 0)))
    rows = own | dict(
        zip(SERVED, (np.roll(ids, 1, 1), *(x.astype(np.float32) for x in (np.roll(logprobs, 1, 1), said))), strict=True)
    )
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    settings = OnPolicyConfig(max_tokens=6, weight=0.7, grader="server", divergence=divergence)
    kind = graded(dataclasses.replace(TRAIN, distill=None, on_policy=settings), None, V)
    step = jax.jit(
        lambda params, rollouts: gradients(
            abstract_model(CONFIG, mesh=mesh), params, {}, WEIGHTS, 2, step=STEP, rollouts=rollouts, on_policy=kind
        )
    )
    spread = put_batch(lambda part: {k: v[part] for k, v in rows.items()}, (8, 32), mesh, served_shapes(K))
    got, metrics = step(jax.device_put(params_of(student), param_shardings(CONFIG, mesh)), spread)

    log_p = reference.log_softmax(np.asarray(logits_of(student, own), np.float64))
    weights = (np.asarray(ROLLOUT_WEIGHTS)[own["regions"]])[:, 1:]
    flat = [x[:, :-1].reshape(-1, x.shape[-1]) for x in (log_p, log_q, ids)]
    drawn = own["tokens"][:, 1:].reshape(-1)
    if divergence == "reverse_kl":
        value = estimate(*flat, drawn)[0]
    else:
        value = reference.bucketed_kl(flat[1], flat[0], flat[2])
    mean = (weights.reshape(-1) * value).sum() / weights.sum()
    np.testing.assert_allclose(metrics["on_policy_kd"], mean, rtol=2e-5)
    np.testing.assert_allclose(metrics["loss"], 0.7 * mean, rtol=2e-5)
    ratio = np.take_along_axis(flat[0] - flat[1], drawn[:, None], -1)[:, 0]
    np.testing.assert_allclose(metrics["on_policy_kl"], (weights.reshape(-1) * ratio).sum() / weights.sum(), rtol=2e-4)
    if divergence == "forward_kl":
        return  # its gradient is looked at in tests/losses
    inside = (ids[:, :-1] == own["tokens"][:, 1:, None]).any(-1)
    terms = np.take_along_axis(log_p - log_q, ids, -1)[:, :-1]
    rest = np.where(inside, 0.0, ratio.reshape(weights.shape))

    def surrogate(params):
        new = jax.nn.log_softmax(logits_of(with_params(student, params), own))[:, :-1]
        whole = (jnp.exp(jnp.take_along_axis(new, jnp.asarray(ids[:, :-1]), -1)) * terms.astype(np.float32)).sum(-1)
        whole += rest.astype(np.float32) * jnp.take_along_axis(new, jnp.asarray(own["tokens"][:, 1:, None]), -1)[..., 0]
        return 0.7 * (weights.astype(np.float32) * whole).sum() / weights.sum()

    close(jax.jit(jax.grad(surrogate))(params_of(student)), jax.device_get(got), rtol=5e-5)


# --------------------------------------------------------------------------------------------------------- a run


class EverySecond(ByDecoder):
    """Has the step's own weights at every second step only, and asks for an end at step 2."""

    def __call__(self, step, model, asked):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().__call__(step, model, asked)

    def renews(self, step):
        return step % 2 == 0


@pytest.mark.slow
def test_a_run_with_servers_stops_where_it_can_be_gone_on_with(tmp_path, monkeypatch):
    train = TINY["train"] | {
        "batch_rows": 8,
        "steps": 5,
        "checkpoint_every": 5,
        "log_every": 1,
        "compute_dtype": "float32",
        "on_policy": {"max_tokens": 12, "grader": "server", "topk": K, "fraction": 1.0},
        "mesh": {"data": 8, "fsdp": 1},
    }
    with FakeServer() as server:
        traces = {"engine": "import", "teacher": "demo", "server": {"urls": [server.url]}}
        student = TINY["student"] | {"tokenizer": "demo"}
        path = prepared_run(tmp_path, traces=traces, student=student, train=train, evaluate=None)
        checkpoints = tmp_path / "run" / "checkpoints"
        make = setup.set_up_answerer
        monkeypatch.setattr(
            setup, "set_up_answerer", lambda t, run, T, stop: EverySecond(t.on_policy, stop=stop, rows=8, row_tokens=T)
        )
        assert cli.main(["train", str(path)]) == STOPPED
        assert [f.name for f in checkpoints.iterdir() if f.name.isdigit()] == ["4"]  # and not 3
        monkeypatch.setattr(setup, "set_up_answerer", make)
        assert cli.main(["train", str(path)]) == 0
        asked = len(server.asked)
    lines = [json.loads(line) for line in (checkpoints / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert all(np.isfinite(line["on_policy_kd"]) and line["loss"] == line["on_policy_kd"] for line in lines)
    assert asked >= 5 * 8  # every answer of five steps


def test_vllm_is_given_weights_at_the_first_step_and_at_every_multiple(tmp_path):
    settings = OnPolicyConfig(max_tokens=4, rollouts="vllm", after=3, sync_every=4)
    options = {"stop": 2, "dtype": "float32", "tokenizer": tmp_path, "folder": tmp_path / "w", "log": tmp_path / "log"}
    student = ByVLLM(settings, row_tokens=32, **options)
    assert [step for step in range(14) if student.renews(step)] == [0, 1, 2, 3, 4, 8, 12]
    student.close()
    short = dataclasses.replace(settings, vllm=VLLMConfig(max_model_len=16))
    with pytest.raises(ValueError, match=r"max_model_len=16 is less than data\.row_tokens=32"):
        ByVLLM(short, row_tokens=32, **options)
