"""tools/compare_methods.py: one budget for all methods, one table from what runs left behind."""

import argparse
import dataclasses
from pathlib import Path

import pytest

from jaxdistill.config import load, with_baseline
from jaxdistill.records import RunDir, Score, write_manifest, write_records
from tests.helpers import load_tool

TOOL = Path(__file__).parents[2] / "tools" / "compare_methods.py"
CONFIG = TOOL.parents[1] / "configs" / "quickstart_methods.yaml"


@pytest.fixture(scope="module")
def tool():
    return load_tool("compare_methods")


def test_every_method_of_the_recipe_has_one_budget_and_the_same_traces(tool):
    config = load(CONFIG)
    assert tool.same_budget(config) == 240 * 8 * 272
    assert {"base", "cot", "star", *config.baselines} == set(tool.ORDER)
    mine = tool.seed_config(config, 2)
    methods = [mine, *(with_baseline(mine, name) for name in mine.baselines)]
    assert {method.seed for method in methods} == {2} and {method.student for method in methods} == {config.student}
    assert all((m.problems, m.traces, m.verify) == (config.problems, config.traces, config.verify) for m in methods)
    # a step of the contrastive one has six rows and two of pairs; half of the on-policy one's are rollouts
    contrastive, own = (with_baseline(mine, name).train for name in ("contrastive", "on_policy"))
    assert contrastive.batch_rows + contrastive.contrastive.batch_rows == 8
    assert own.batch_rows == 8 and own.on_policy.rows_of(8) == 4 and own.on_policy.after == 0
    rounds = tool.star_config(config, 2)
    assert (rounds.train.steps, rounds.seed, rounds.student.init) == (80, 2, config.student.init)
    assert rounds.problems == config.problems and rounds.evaluate == config.evaluate


def test_the_base_has_problems_of_its_own(tool):
    config = load(CONFIG)
    base = tool.base_config(config, argparse.Namespace(base_problems=100, base_steps=20))
    assert (base.problems.count, base.train.steps, base.student.init, base.baselines) == (100, 20, None, {})
    assert base.problems.seed not in {config.problems.seed, config.evaluate.problems.seed}
    assert base.evaluate.problems == config.evaluate.problems
    assert config.student.init == str(Path(base.run_dir) / "export")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("baselines.kd={train.batch_rows: 4}", "kd trains on 261,120 positions, and cot on 522,240"),
        ("train.steps=241", "star trains on 522,240 positions"),
        ("star=null", "set all three"),
    ],
)
def test_another_budget_is_refused(tool, change, message):
    with pytest.raises(ValueError, match=message):
        tool.same_budget(load(CONFIG, [change]))


def training(tool, method, seed, outcomes, **more):
    correct = {str(i): float(good) for i, good in enumerate(outcomes)}
    counts = {"tokens": 100, "sampled": 0, "seconds": 2.0} | more
    return tool.Training(method=method, seed=seed, correct=correct, **counts)


def test_rows_and_lines_by_hand(tool):
    found = [
        training(tool, "kd", 0, "1100"),
        training(tool, "kd", 1, "1111", tokens=200, seconds=4.0),
        training(tool, "base", 0, "0000"),
        training(tool, "star", 0, "1000", sampled=5000),
    ]
    base, star, kd = tool.rows_of(found)
    assert (base.method, star.method, kd.method) == ("base", "star", "kd")
    assert (kd.accuracy, kd.by_seed, kd.tokens, kd.seconds) == (0.75, [0.5, 1.0], 150, 3.0)
    assert kd.low < 0.75 < kd.high <= 1 and base.accuracy == base.high == 0
    text = tool.lines([star, dataclasses.replace(kd, low=0.5, high=1.0)], "said once")
    assert "| kd | 75.0% | 50.0 to 100.0 | 50.0, 100.0 | 150 | - | 3 |" in text
    assert any(line.startswith("| star | 25.0% |") and line.endswith("| 100 | 5,000 | 2 |") for line in text)
    assert text[-1] == "said once"


def test_star_is_the_sum_of_its_rounds(tool, tmp_path):
    config = load(CONFIG, [f"run_dir={tmp_path}", "baselines={}", "star.rounds=2"])

    def leave(folder, **counts):
        write_manifest(folder, stage="", config={}, config_hash="", inputs={}, counts=counts)

    def score(run, good):
        held = Score(
            model="student", problem_id="0", sample=0, response="", output_tokens=3, finish_reason="stop",
            outcome="correct" if good else "incorrect", reason="", extracted=None,
        )  # fmt: skip
        write_records(run.evaluation / "student" / "scores.parquet", Score, [held])

    for name in ("base", "seeds/0", "star/0/rounds/1", "star/0/rounds/2"):
        run = RunDir(tmp_path / name)
        score(run, good=name.endswith("2"))
        leave(run.checkpoints, tokens=100, seconds=1.5, **({"sampled_tokens": 40} if name == "seeds/0" else {}))
        leave(run.traces, output_tokens=30, wall_seconds=4.0)
    base, cot, star = tool.trainings_of(config, 1)
    assert (star.method, star.correct, star.tokens, star.sampled, star.seconds) == ("star", {"0": 1.0}, 200, 60, 11.0)
    assert (cot.tokens, cot.sampled, cot.seconds) == (100, 40, 1.5) and (base.sampled, base.correct) == (0, {"0": 0.0})
