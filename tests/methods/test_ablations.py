"""Ablations: students of changed traces, trained, scored and tabled by one command, which goes on where it stopped."""

from __future__ import annotations

import json
import re

import pytest

from jaxdistill import cli, pipeline
from jaxdistill.config import load, with_baseline
from jaxdistill.data.rows import Batches
from jaxdistill.methods import ablations
from jaxdistill.records import RunDir, Score, read_manifest, write_manifest, write_records
from jaxdistill.tokenization import load_tokenizer
from jaxdistill.traces import engines
from tests.helpers import TINY, tiny_config

ABLATE = {"variants": ["shuffled_steps", "no_keywords", "lora", "samples_1"], "seeds": [0]}
ARCHITECTURE = TINY["student"]["architecture"] | {"num_hidden_layers": 1}
SMALL = {
    "student": TINY["student"] | {"architecture": ARCHITECTURE},
    "train": TINY["train"] | {"steps": 2, "checkpoint_every": 2},
    "export": {"check": "none"},
    "evaluate": TINY["evaluate"] | {"models": ["student"]},
    "ablate": ABLATE,
}


@pytest.fixture(scope="module")
def in_process():
    """Every stage in this process, as other tests have it, with a stand-in for the decoder; what was run is noted."""
    ran = []

    def run_commands(commands, config_path, overrides, debug):
        for command in commands:
            ran.append((command, config_path))
            pipeline.run_command(command, load(config_path, overrides))
        return 0

    def answer(checkpoint, requests, sampling, **options):
        options["ready"]()
        for request in requests:  # a student of two steps has nothing to say
            yield engines.Completion(id=request.id, output_ids=sampling.stop_ids[:1], finish_reason="stop")

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(engines.ENGINES, "jax", answer)
        patch.setattr(cli, "_run_commands", run_commands)
        yield ran


@pytest.fixture(scope="module")
def finished(tmp_path_factory, in_process):
    root = tmp_path_factory.mktemp("ablate")
    path = tiny_config(root, **SMALL)
    assert cli.main(["ablate", str(path)]) == 0
    return path, RunDir(root / "run")


@pytest.mark.slow
def test_the_table_has_every_student(finished):
    _, run = finished
    found = json.loads((run.root / "ablations" / "ablations.json").read_text())
    assert [row["name"] for row in found["rows"]] == ["reasoning", "shuffled_steps"], "the others make no sense here"
    assert all(row["seeds"] == 1 and len(row["by_seed"]) == 1 and row["steps"] == 2 for row in found["rows"])
    assert found["rows"][0]["difference"] is None and found["rows"][1]["difference"] is not None
    first, second = (row["thinking_tokens"] for row in found["rows"])
    assert second == pytest.approx(first, rel=0.02), "the length is controlled for"
    page = (run.report / "index.html").read_text()
    assert "shuffled_steps" in page and 'id="ablations"' in page


@pytest.mark.slow
def test_the_students_share_traces_and_verdicts_and_differ_in_what_they_learn(finished):
    _, run = finished
    folder = RunDir(run.root / "ablations")
    assert folder.verdicts.is_symlink() and folder.checkpoints.resolve() == run.checkpoints.resolve()
    assert [p.name for p in (folder.root / "baselines").iterdir()] == ["shuffled_steps-seed0"]
    tokenizer = load_tokenizer(str(run.tokenizer))

    def answers(tokens) -> dict[str, tuple[str, str]]:
        """Question -> thinking and solution, of every example."""
        found, batches = {}, Batches(tokens, batch_rows=1, seed=0)
        for number in range(read_manifest(tokens)["counts"]["rows"]):
            row = batches.stored_row(number)
            for segment in range(1, row["segment_ids"].max() + 1):
                text = tokenizer.decode(row["tokens"][row["segment_ids"] == segment])
                question, thinking, solution = re.search(r"(.*)<think>\n(.*)\n</think>(.*)", text, re.S).groups()
                found[question] = (thinking, solution)
        return found

    plain, shuffled = answers(run.tokens), answers(folder.baseline("shuffled_steps-seed0").tokens)
    assert plain.keys() == shuffled.keys() and len(plain) == 40
    for question, (thinking, solution) in plain.items():
        other = shuffled[question]
        assert sorted(thinking.split("\n")) == sorted(other[0].split("\n")) and thinking != other[0]
        assert solution == other[1], "the solution stays"


@pytest.mark.slow
def test_the_same_command_goes_on_and_repeats_nothing(finished, in_process, capsys):
    path, run = finished
    folder = RunDir(run.root / "ablations")
    saved = folder.baseline("shuffled_steps-seed0")
    before = (saved.checkpoints / "manifest.json").stat().st_mtime_ns
    (folder.evaluation / "manifest.json").unlink()  # as if it had been killed there
    in_process.clear()
    assert cli.main(["ablate", str(path)]) == 0
    assert [command for command, _ in in_process][-5:] == ["prepare", "train", "export", "evaluate", "report"]
    assert (saved.checkpoints / "manifest.json").stat().st_mtime_ns == before
    output = capsys.readouterr().out
    assert "no_keywords: skipped, it changes nothing in these traces" in output
    assert "lora: skipped, adapters need `student.init`" in output
    assert "samples_1: skipped, it takes the same traces" in output
    assert "| shuffled_steps |" in output


@pytest.mark.slow
def test_a_runs_folder_stands_for_its_config(finished, capsys):
    _, run = finished
    (run.report / "index.html").unlink()
    assert cli.main(["report", str(run.root)]) == 0
    assert (run.report / "index.html").is_file()


def test_an_empty_folder_is_one_clear_line(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "no run in this folder" in error and error.count("\n") == 1


@pytest.mark.slow
def test_one_run_against_itself_and_its_ablations(finished, capsys):
    _, run = finished
    folder = run.root / "ablations"
    assert cli.main(["compare", str(run.root), f"{folder}:shuffled_steps-seed0"]) == 0
    output = capsys.readouterr().out
    assert "12 problems that all answered" in output and "ablations:shuffled_steps-seed0" in output
    for names, message in (
        ([str(run.root / "none")], "no such run folder"),
        ([f"{run.root}:other"], "no scores of other; it has student"),
        ([str(run.problems)], "nothing has been evaluated"),
    ):
        assert cli.main(["compare", *names, str(run.root)]) == 1
        assert message in capsys.readouterr().err


def test_every_variant_is_a_config(tmp_path):
    config = load(tiny_config(tmp_path))
    for name, differences in ablations.VARIANTS.items():
        students = ablations.students(config, {name: differences})
        for student in students:
            import dataclasses

            with_baseline(dataclasses.replace(config, baselines=students), student)
    matched = load(tiny_config(tmp_path, ablate={"match": "steps", "seeds": [5]}))
    found = ablations.students(matched, {"answer_only": {"data.response": "answer"}}, steps=7)
    assert found["answer_only-seed5"] == {
        "train.steps": 7, "train.epochs": None, "data.response": "answer", "seed": 5
    }  # fmt: skip
    assert "reasoning-seed5" in found and "reasoning-seed0" not in found


def test_unknown_variants_and_missing_problems(tmp_path):
    config = load(tiny_config(tmp_path, ablate={"variants": ["shufled"]}))
    with pytest.raises(ValueError, match="'shufled'; known are answer_only"):
        ablations.prepare(config)
    with pytest.raises(ValueError, match=r"add `evaluate\.problems`"):
        ablations.prepare(load(tiny_config(tmp_path, evaluate=None)))
    taken = load(tiny_config(tmp_path, ablate={"extra": {"lora": {"seed": 1}}, "variants": []}))
    with pytest.raises(ValueError, match="there is a variant of this name"):
        ablations.prepare(taken)


def test_rows_by_hand(tmp_path):
    """Two trainings of two variants on four problems, scored by hand."""
    run = RunDir(tmp_path)
    right = {"student": "1110", "reasoning-seed1": "1100", "other-seed0": "1000", "other-seed1": "0000"}
    counts = {"examples": 4, "thinking_tokens": 40, "answer_tokens": 12, "steps": 9}
    for name, outcomes in right.items():
        scores = [
            Score(
                model=name, problem_id=str(i), sample=0, response="", output_tokens=3, finish_reason="stop",
                outcome="correct" if good == "1" else "incorrect", reason="", extracted=None,
            )
            for i, good in enumerate(outcomes)
        ]  # fmt: skip
        write_records(run.evaluation / name / "scores.parquet", Score, scores)
        own = run if name == "student" else run.baseline(name)
        for folder in (own.tokens, own.checkpoints):
            write_manifest(folder, stage="", config={}, config_hash="", inputs={}, counts=counts)
    models = {"models": {name: {"mean_output_tokens": 3.0} for name in right}}
    write_manifest(run.evaluation, stage="", config={}, config_hash="", inputs={}, counts=models)
    baselines = {name: {} for name in right if name != "student"}
    config = load(tiny_config(tmp_path, baselines=baselines))
    base, other = ablations.rows_of(config, run, 0, (0, 1))
    assert (base.name, base.accuracy, base.by_seed) == ("reasoning", 0.625, [0.75, 0.5]) and base.difference is None
    assert (other.name, other.accuracy, other.difference) == ("other", 0.125, -0.5)
    assert other.difference_low < -0.5 < other.difference_high <= 0 and other.low == 0.0
    assert (other.thinking_tokens, other.trained_tokens, other.steps) == (10.0, 52, 9)


def test_a_line_by_hand():
    row = ablations.Row(
        name="other", seeds=2, accuracy=0.25, low=0.0, high=0.5, by_seed=[0.25, 0.25], difference=-0.5,
        difference_low=-1.0, difference_high=0.0, examples=40, thinking_tokens=28.06, trained_tokens=1, steps=9,
        output_tokens=3.0,
    )  # fmt: skip
    line = "| other | 25.0% | 0.0 to 50.0 | -50.0 (-100.0 to +0.0) | 25.0, 25.0 | 40 | 28.1 | 9 |"
    assert line in ablations.lines([row], 12)


@pytest.mark.slow
def test_manifests_are_left(finished):
    assert read_manifest(RunDir(finished[1].root / "ablations").evaluation) is not None
