"""Evaluation while training, warm starts, profiles: the stage `train`, run in this process."""

import json
import shutil

import jax
import numpy as np
import pytest

from jaxdistill import cli
from jaxdistill.config import load
from jaxdistill.generate import decode
from jaxdistill.hub import demo_teacher
from jaxdistill.models import abstract_model, param_shardings, params_of, with_params
from jaxdistill.models.orbax import load_params
from jaxdistill.parallel.mesh import make_mesh
from jaxdistill.records import Problem, RunDir, read_manifest, read_records
from jaxdistill.tokenization import decode_response, load_tokenizer, render_prompts
from jaxdistill.train.evaluation import Evaluator
from jaxdistill.train.setup import set_up
from jaxdistill.verify import check_math
from tests.helpers import TINY, prepared_run

TRAIN = TINY["train"] | {
    "steps": 6,
    "checkpoint_every": 4,
    "evaluate": {"every": 3, "rows": 5, "problems": 3, "max_tokens": 8},
    "keep_checkpoints": 1,
    "keep_best": 2,
    "profile": {"start": 2, "steps": 1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluated")
    prepared_run(root, train=TRAIN)
    assert cli.main(["train", str(root / "config.yaml")]) == 0
    return root


def test_evaluations_are_logged_and_saved_and_the_best_are_kept(folder):
    run = RunDir(folder / "run")
    lines = [json.loads(line) for line in (run.checkpoints / "evaluations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6]
    assert lines[1]["loss"] < lines[0]["loss"]
    assert 0 <= lines[0]["thinking_accuracy"] <= 1 and lines[0]["problems"] == 3 and lines[0]["rows"] == 5
    assert sorted(f.name for f in run.checkpoints.iterdir() if f.name.isdigit()) == ["3", "6"]
    metrics = [json.loads(line) for line in (run.checkpoints / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["step"] == 6 and metrics[-1]["data_wait_share"] >= 0


def test_the_losses_by_region_are_those_of_the_whole(folder):
    """Loss over all is the regions' mean by their tokens, on rows that training never saw."""
    config = load(folder / "config.yaml")
    run = RunDir(folder / "run")
    made = set_up(config, run)
    rows = made.rows.stored(made.rows.held_out)
    seen = {n for step in range(6) for n in made.rows.row_numbers(step)}
    assert not seen & set(made.rows.held_out)
    line = json.loads((run.checkpoints / "evaluations.jsonl").read_text().splitlines()[-1])
    counts = [np.count_nonzero(rows["regions"] == region) for region in (1, 2)]
    mean = (line["thinking_loss"] * counts[0] + line["answer_loss"] * counts[1]) / sum(counts)
    assert line["loss"] == pytest.approx(mean, rel=1e-5)


def test_accuracy_is_what_decoding_and_the_verifier_say(folder):
    """The teacher, put in the student's place, answers as it does when decoded by itself."""
    config = load(folder / "config.yaml", [f"student={{init: {demo_teacher()}}}", "train.evaluate.max_tokens=96"])
    run = RunDir(folder / "run")
    shutil.rmtree(run.tokenizer)
    shutil.copytree(demo_teacher(), run.tokenizer)
    made = set_up(config, run)
    from jaxdistill.models.student import start_student

    model = start_student(config.student, made.student, 0, made.mesh)
    line = Evaluator(config, run, run, made.rows, made.model, made.mesh, rows_at_once=8)(6, params_of(model), {})
    tokenizer = load_tokenizer(str(run.tokenizer))
    problems = list(read_records(run.problems / "heldout", Problem))[:3]
    prompts = render_prompts(tokenizer, [p.prompt for p in problems])
    stop = [tokenizer.eos_token_id]
    found = decode(model, prompts, [0] * 3, max_tokens=96, temperature=0.0, stop_ids=stop, batch=3)
    texts = {i: decode_response(tokenizer, ids) for i, ids, _ in found}
    right = [check_math(texts[i], p.answer).outcome == "correct" for i, p in enumerate(problems)]
    assert line["accuracy"] == sum(right) / 3 > 0.6


def test_the_checkpoint_that_is_asked_for_is_exported(folder, capsys):
    checkpoints = folder / "run" / "checkpoints"
    losses = checkpoints / "evaluations.jsonl"
    before = losses.read_text()

    def exported(wanted) -> int:
        call = ["export", str(folder / "config.yaml"), "--redo", "export", "--set", "export.check=none"]
        assert cli.main([*call, "--set", f"export.checkpoint={wanted}"]) == 0
        manifest = read_manifest(folder / "run" / "export")
        assert manifest is not None
        return manifest["counts"]["step"]

    assert [exported(wanted) for wanted in ("last", "best", 3)] == [6, 6, 3]
    # had it become worse, and one that is gone been the best of all
    losses.write_text('{"step": 1, "loss": 0.1}\n{"step": 3, "loss": 1.0}\n{"step": 6, "loss": 2.0}\n')
    assert exported("best") == 3
    for text, wanted, message in (("", "best", "none of its checkpoints was evaluated"), (before, 4, "those of 3, 6")):
        losses.write_text(text)
        call = ["export", str(folder / "config.yaml"), "--redo", "export", "--set", f"export.checkpoint={wanted}"]
        assert cli.main(call) == 1 and message in capsys.readouterr().err
    losses.write_text(before)


def test_a_profile_was_written(folder):
    assert list((folder / "run" / "checkpoints" / "profile").rglob("*.xplane.pb"))


def test_another_run_starts_from_the_checkpoints_of_this_one(folder, tmp_path):
    student = {"init": str(folder / "run" / "checkpoints")}
    # a rate of nothing: what comes out is what went in
    train = TRAIN | {"evaluate": None, "keep_best": 0, "profile": None, "steps": 1}
    train["optimizer"] = {"name": "adamw", "learning_rate": 1e-30, "schedule": "constant"}
    shutil.rmtree(folder / "run" / "tokenizer")
    prepared = prepared_run(tmp_path, student=TINY["student"])
    shutil.copytree(tmp_path / "run" / "tokenizer", folder / "run" / "tokenizer")
    shutil.rmtree(tmp_path / "run" / "tokens")
    prepared = prepared_run(tmp_path, student=student, train=train)
    for command in ("train", "export"):
        assert cli.main([command, str(prepared)]) == 0
    got, want = (_params(f) for f in (tmp_path, folder))
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert read_manifest(tmp_path / "run" / "export")["counts"]["check"]["max_difference"] < 1e-3


def _params(root):
    from jaxdistill.models import ModelConfig

    path = root / "run" / "checkpoints"
    shape = ModelConfig.from_hf(json.loads((path / "model.json").read_text()), "model.json")
    model = abstract_model(shape)
    _, params = load_params(path, params_of(model), param_shardings(shape, make_mesh({"fsdp": -1})))
    assert with_params(model, params).config == shape
    return jax.device_get(params)
