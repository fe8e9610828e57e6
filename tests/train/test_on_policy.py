"""On-policy distillation: what is asked and trained, the loss against references, and resuming to the bit."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import cli
from jaxdistill.config import DistillConfig, MeshConfig, OnPolicyConfig, OptimizerConfig, TrainConfig, build, load
from jaxdistill.data.packing import fill_row, unpack
from jaxdistill.generate import decode
from jaxdistill.losses import shift
from jaxdistill.models import abstract_model, init_model, param_shardings, params_of, with_params
from jaxdistill.parallel.mesh import make_mesh
from jaxdistill.records import RunDir
from jaxdistill.tokenization import load_tokenizer
from jaxdistill.train.answering import ByDecoder, Question
from jaxdistill.train.distill import Distillation, share_schedule
from jaxdistill.train.feed import TrainRows
from jaxdistill.train.gradients import ROLLOUT_WEIGHTS, gradients
from jaxdistill.train.on_policy import Rollouts, fill, graded, questions, seed_of
from jaxdistill.train.program import make_program
from jaxdistill.train.setup import set_up
from jaxdistill.train.step import put_batch
from tests.helpers import TINY, prepared_run, tiny_config
from tests.losses import reference
from tests.train.test_distill import PADDED, STEP, packed
from tests.train.test_step import CONFIG, WEIGHTS, close, examples

V = CONFIG.vocab_size
EOS = 97
TRAIN = TrainConfig(
    batch_rows=16,
    steps=4,
    optimizer=OptimizerConfig(learning_rate=1e-2),
    distill=DistillConfig(source="online", weight=0.5),
    on_policy=OnPolicyConfig(max_tokens=6, weight=0.7),
)
NO_ROWS = object.__new__(TrainRows)
NOBODY = object.__new__(ByDecoder)
ASKED = [[Question([5, 6, 7], 6), Question([8, 9], 6)], [Question([10, 11, 12, 13], 6)]]
ANSWERS = [[20, 21, EOS], [22, 23, 24, 25, 26, 27], [EOS]]


# ------------------------------------------------------------------------------------- what is asked and trained


def test_the_mask_is_the_sampled_answer_and_its_eos():
    rows = fill(ASKED, ANSWERS, 20)
    targets, weights = shift(
        *(jnp.asarray(x) for x in (rows["tokens"], np.asarray(ROLLOUT_WEIGHTS)[rows["regions"]], rows["segment_ids"]))
    )
    for row, wanted in enumerate(([20, 21, EOS, 22, 23, 24, 25, 26, 27], [EOS])):
        assert np.asarray(targets[row])[np.asarray(weights[row]) > 0].tolist() == wanted
    # the first token of an answer is predicted at the last one of its prompt
    assert np.flatnonzero(weights[0]).tolist() == [2, 3, 4, 7, 8, 9, 10, 11, 12]
    assert rows["positions"][0, :8].tolist() == [0, 1, 2, 3, 4, 5, 0, 1]
    assert set(np.unique(weights)) == {0.0, 1.0}


def test_a_row_asks_as_many_of_its_problems_as_are_sure_to_fit():
    row = fill_row([e for e in examples(4, seed=1)], 64)
    for example in (stored := unpack(row)):
        assert example[0]
    prompts = [[t for t, r in zip(*segment, strict=True) if r == 0] for segment in stored]
    for most in (1, 5, 14, 60, 500):
        found = questions(row, 64, most)
        assert found[0].prompt == prompts[0]
        assert sum(len(q.prompt) + q.limit for q in found) <= 64
        assert found[0].limit == min(most, 64 - len(prompts[0]))
        assert all(q.limit == most for q in found[1:])
    assert [q.prompt for q in questions(row, 64, 1)] == prompts


def test_seeds_differ_by_run_step_and_answer():
    seeds = {seed_of(seed, step, i) for seed in range(3) for step in range(20) for i in range(20)}
    assert len(seeds) == 1200
    assert all(0 <= seed < 2**31 for seed in seeds)


# ----------------------------------------------------------------------------------------------------- the loss


@pytest.fixture(scope="module")
def models():
    # sure of something, other than at the start
    return tuple(
        with_params(model, params_of(model) | {"embed": scale * params_of(model)["embed"]})
        for model, scale in ((init_model(CONFIG, 0), 10), (init_model(PADDED, 7), 40))
    )


@pytest.fixture(scope="module")
def batches():
    own = fill(ASKED, ANSWERS, 32)
    return packed(), {k: np.concatenate([v, np.zeros((6, 32), v.dtype)]) for k, v in own.items()}


def kinds(mesh=None) -> tuple[Distillation, Distillation]:
    """How stored rows are distilled, and how rollouts are graded."""
    assert TRAIN.distill is not None
    share = share_schedule(TRAIN.distill, 4)
    stored = Distillation(share, teacher=abstract_model(PADDED, mesh=mesh), vocabulary=V)
    own = graded(TRAIN, stored, None)
    assert own is not None
    return stored, own


def stepper(kinds, micro_batches=1, model=None):
    stored, own = kinds
    return jax.jit(
        lambda params, batch, rollouts, teacher: gradients(
            model or abstract_model(CONFIG), params, batch, WEIGHTS, micro_batches,
            distillation=stored if batch else None, teacher=teacher, step=STEP, rollouts=rollouts, on_policy=own,
        )
    )  # fmt: skip


def parts_of(rows, region_weights, log_p, log_q, np=np):
    """(weights, -log p of the tokens, forward KL, reverse KL) of every position, from whole distributions."""
    weights = np.asarray(region_weights)[rows["regions"]][:, 1:]
    weights = weights * (rows["segment_ids"][:, 1:] == rows["segment_ids"][:, :-1])
    log_p, log_q = log_p[:, :-1], log_q[:, :-1]
    nll = -np.take_along_axis(log_p, rows["tokens"][:, 1:, None], -1)[..., 0]
    return weights, nll, (np.exp(log_q) * (log_q - log_p)).sum(-1), (np.exp(log_p) * (log_p - log_q)).sum(-1)


def plain_loss(batch, own, of_student, of_teacher, np=np):
    """The whole loss, from logits [B, T, V] of both models on both kinds of rows; with jax.numpy or NumPy."""
    log_softmax = jax.nn.log_softmax if np is jnp else reference.log_softmax
    total = count = 0.0
    if batch is not None:
        w, nll, forward, _ = parts_of(batch, WEIGHTS, log_softmax(of_student[0]), log_softmax(of_teacher[0]), np)
        total, count = (w * (nll + 0.5 * forward)).sum(), w.sum()
    w, _, _, reverse = parts_of(own, ROLLOUT_WEIGHTS, log_softmax(of_student[1]), log_softmax(of_teacher[1]), np)
    return (total + (0.7 * w * reverse).sum()) / (count + w.sum())


def logits_of(model, rows):
    arrays = (jnp.asarray(rows[name]) for name in ("tokens", "positions", "segment_ids"))
    return jax.jit(model)(*arrays)[..., :V]  # op by op it would take seconds


def test_value_and_gradient_are_those_of_the_loss_written_out(models, batches):
    """Cut into micro-batches and spread over devices, stored rows and rollouts are one mean."""
    student, teacher = models
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    wide, theirs = (
        jax.device_put(params_of(m), param_shardings(c, mesh)) for m, c in ((student, CONFIG), (teacher, PADDED))
    )
    stored, own = (
        put_batch(lambda part, rows=rows: {k: v[part] for k, v in rows.items()}, rows["tokens"].shape, mesh)
        for rows in batches
    )
    got, metrics = stepper(kinds(mesh), 2, abstract_model(CONFIG, mesh=mesh))(wide, stored, own, theirs)
    said = [logits_of(teacher, rows) for rows in batches]

    def loss(params):
        return plain_loss(*batches, [logits_of(with_params(student, params), rows) for rows in batches], said, jnp)

    close(jax.jit(jax.grad(loss))(params_of(student)), jax.device_get(got), rtol=5e-5)
    mine = [np.asarray(logits_of(student, rows), np.float64) for rows in batches]
    said = [np.asarray(logits, np.float64) for logits in said]
    np.testing.assert_allclose(metrics["loss"], plain_loss(*batches, mine, said), rtol=2e-5)
    log_p, log_q = reference.log_softmax(mine[1]), reference.log_softmax(said[1])
    w, nll, _, reverse = parts_of(batches[1], ROLLOUT_WEIGHTS, log_p, log_q)
    assert w.sum() == sum(map(len, ANSWERS))
    np.testing.assert_allclose(metrics["on_policy_kd"], (w * reverse).sum() / w.sum(), rtol=2e-5)
    theirs = parts_of(batches[1], ROLLOUT_WEIGHTS, log_q, log_p)[1]
    np.testing.assert_allclose(metrics["on_policy_kl"], (w * (theirs - nll)).sum() / w.sum(), rtol=2e-4)


def test_without_stored_rows_the_loss_is_the_mean_over_the_answers(models, batches):
    student, teacher = models
    step = stepper(kinds())
    metrics = jax.jit(lambda *arrays: step(*arrays)[1])(params_of(student), {}, batches[1], params_of(teacher))
    mine, said = ([None, np.asarray(logits_of(model, batches[1]), np.float64)] for model in models)
    np.testing.assert_allclose(metrics["loss"], plain_loss(None, batches[1], mine, said), rtol=2e-5)
    assert metrics["count"] == sum(map(len, ANSWERS))
    np.testing.assert_allclose(metrics["loss"], 0.7 * metrics["on_policy_kd"], rtol=1e-6)


# -------------------------------------------------------------------------------------------------------- a run


def lines_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "run" / "checkpoints" / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A student that answers half of its problems itself."""
    root = tmp_path_factory.mktemp("on_policy")
    train = TINY["train"] | {
        "batch_rows": 16,
        "steps": 3,
        "checkpoint_every": 2,
        "log_every": 1,
        "compute_dtype": "float32",
        "distill": {"source": "online", "teacher": "demo", "weight": 0.0},
        "on_policy": {"max_tokens": 12},
        "mesh": {"data": 8, "fsdp": 1},
    }
    prepared_run(root, student=TINY["student"] | {"tokenizer": "demo"}, train=train, evaluate=None)
    assert cli.main(["train", str(root / "config.yaml")]) == 0
    return root


def test_a_run_goes_on_policy_and_resumes_to_the_bit(folder):
    checkpoints = folder / "run" / "checkpoints"
    lines = lines_of(folder)
    assert all(0 <= line["finished"] <= 1 and 1 <= line["rollout_tokens"] <= 12 for line in lines)
    assert lines[0]["on_policy_kd"] > 1  # nearly nothing of what it writes would the teacher write
    record = json.loads((checkpoints / "3" / "run" / "metadata").read_text())
    shutil.rmtree(checkpoints / "3")
    (checkpoints / "manifest.json").unlink()
    assert cli.main(["train", str(folder / "config.yaml")]) == 0
    again = json.loads((checkpoints / "3" / "run" / "metadata").read_text())
    assert again["checksums"] == record["checksums"]
    for line, other in zip(lines, lines_of(folder), strict=True):
        names = line.keys() - {
            "seconds", "tokens_per_second", "mfu", "data_wait_share", "sampling_share", "host_memory_gib"
        }  # fmt: skip
        assert {n: line[n] for n in names} == {n: other[n] for n in names}


def test_rollouts_are_the_students_answers_to_the_problems_whose_places_they_take(folder):
    config, run = load(folder / "config.yaml"), RunDir(folder / "run")
    made = set_up(config, run)
    assert made.rollouts is not None
    params = jax.device_put(params_of(init_model(made.student, 3)), param_shardings(made.student, made.mesh))
    assert made.rollouts.stored_rows(0) == 8
    later = dataclasses.replace(config.train, on_policy=OnPolicyConfig(max_tokens=12, after=2))
    waiting = Rollouts(later, made, made.rows, NOBODY, vocabulary=9, seed=0)
    assert waiting(1, params, {}) == (None, {})
    assert [waiting.stored_rows(s) for s in (1, 2)] == [16, 8]
    rows, said = made.rollouts(3, params, {})
    rows = jax.device_get(rows)
    stored = made.rows.rows_of(3, slice(8, 16))
    answers = []
    for i in range(8):
        asked = questions({k: v[i] for k, v in stored.items()}, made.shape[1], 12)
        segments = unpack({k: v[i] for k, v in rows.items()})
        assert len(segments) == len(asked)
        for question, (tokens, regions) in zip(asked, segments, strict=True):
            n = len(question.prompt)
            assert tokens[:n] == question.prompt and not any(regions[:n]) and all(regions[n:])
            answers.append((question.prompt, tokens[n:]))
    assert said["rollout_tokens"] == np.mean([len(ids) for _, ids in answers])
    # on one device, where nothing is spread
    model = with_params(abstract_model(made.student, dtype="float32"), jax.device_get(params))
    eos = load_tokenizer(str(run.tokenizer)).eos_token_id
    alone = decode(
        model, [p for p, _ in answers], [seed_of(0, 3, i) for i in range(len(answers))], max_tokens=12, temperature=1.0,
        stop_ids=[eos], batch=8,
    )  # fmt: skip
    assert all(ids == answers[index][1] for index, ids, _ in alone)
    # again the same; another step is other answers
    jax.tree.map(np.testing.assert_array_equal, rows, jax.device_get(made.rollouts(3, params, {})[0]))
    assert not np.array_equal(rows["tokens"], made.rollouts(4, params, {})[0]["tokens"])

    def otherwise(stop: int, vocabulary: int) -> tuple[list[list[tuple[list[int], list[int]]]], dict[str, float]]:
        assert config.train.on_policy is not None
        answerer = ByDecoder(config.train.on_policy, stop=stop, rows=8, row_tokens=made.shape[1])
        sampler = Rollouts(config.train, made, made.rows, answerer, vocabulary=vocabulary, seed=0)
        found, said = sampler(3, params, {})
        return [unpack({k: np.asarray(v)[i] for k, v in found.items()}) for i in range(8)], said

    # where the first token of the first answer ends an answer, that one is done, its eos is trained, and it counts
    prompt, ids = answers[0]
    ended, said = otherwise(ids[0], made.student.vocab_size)
    assert ended[0][0] == (prompt + ids[:1], [0] * len(prompt) + [2])
    assert said["finished"] >= 1 / len(answers)
    # a token that only the vocabulary's padding has is cut off with all that follows
    cut, _ = otherwise(eos, ids[0])
    assert cut[0][0] == (prompt, [0] * len(prompt))
    assert all(token < ids[0] for row in cut for tokens, regions in row for token in np.compress(regions, tokens))


# ------------------------------------------------------------------------------------------------- what is refused

SERVED = {"max_tokens": 4, "grader": "server"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distill": None}, "needs a teacher beside the student"),
        ({"distill": {"source": "stored"}}, "needs a teacher beside the student"),
        ({"on_policy": {"max_tokens": 4, "fraction": 0.01}}, "is no row"),
        ({"on_policy": {"max_tokens": 4, "fraction": 0.0}}, "set a share in"),
        ({"on_policy": {"max_tokens": 4, "temperature": 0}}, "greedy answers are not"),
        ({"contrastive": {}}, "do not go together"),
        ({"distill": {"source": "online", "weight": 0, "ce_weight": 0.5}}, "leave ce_weight at 1"),
        ({"on_policy": None, "distill": {"source": "online", "weight": 0}}, "nothing is distilled"),
        ({"on_policy": {"max_tokens": 4, "sync_every": 2}}, "is for rollouts: vllm"),
        ({"on_policy": {"max_tokens": 4, "sync_every": 2, "rollouts": "vllm"}}, "checkpoint_every.*multiples of it"),
        ({"on_policy": SERVED}, "has a teacher on the mesh too"),
        ({"on_policy": SERVED | {"divergence": "jsd"}, "distill": None}, "set forward_kl or reverse_kl"),
        ({"on_policy": SERVED | {"temperature": 2.0}, "distill": None}, "what the student itself samples"),
        ({"on_policy": SERVED, "distill": None}, "needs `traces.teacher`"),
        ({"on_policy": SERVED, "distill": None, "teacher": "demo"}, "needs `traces.server.urls`"),
    ],
)
def test_what_does_not_go_together_is_said_at_once(tmp_path, changes, message):
    train = TINY["train"] | {"distill": {"source": "online", "teacher": "demo"}, "on_policy": {"max_tokens": 4}}
    traces = TINY["traces"] | {"teacher": changes.pop("teacher", None)}
    more = {"run_dir": str(tmp_path), "traces": traces, "data": {"row_tokens": 160, "pairs": {}}}
    with pytest.raises(ValueError, match=message):
        build(TINY | more | {"train": train | changes})


@pytest.mark.parametrize(
    ("changes", "mesh", "message"),
    [
        ({}, {"fsdp": 4, "context": 2}, "context to 1"),
        ({"on_policy": OnPolicyConfig(max_tokens=6, fraction=0.25)}, {"fsdp": 8}, "makes 4 of 16 rows rollouts"),
        ({"on_policy": OnPolicyConfig(max_tokens=6, after=4)}, {"fsdp": 8}, "before the end of the 4 steps"),
    ],
)
def test_what_does_not_fit_the_devices_or_the_steps_is_one_line(changes, mesh, message):
    train = dataclasses.replace(TRAIN, mesh=MeshConfig(**mesh), **changes)
    made = make_program(train, CONFIG, None, make_mesh(mesh), row_tokens=32, steps=4, seed=0)
    with pytest.raises(ValueError, match=message):
        Rollouts(train, made, NO_ROWS, NOBODY, vocabulary=V, seed=0)


def test_plan_refuses_it(tmp_path, capsys):
    train = TINY["train"] | {"distill": {"source": "online", "teacher": "demo"}, "on_policy": {"max_tokens": 4}}
    config = tiny_config(tmp_path, train=train)
    assert cli.main(["plan", str(config), "--topology", "cpu:8"]) == 1
    assert "plan knows nothing of train.on_policy" in capsys.readouterr().err
