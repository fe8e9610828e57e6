"""More samples until enough are kept: hard problems get their budget, easy ones nothing more."""

import shutil

import pytest

from jaxdistill import config as configs
from jaxdistill import pipeline, tokenization
from jaxdistill.records import RunDir, Trace, Verdict, read_records
from jaxdistill.traces import engines, resample
from jaxdistill.traces.engines import Completion
from tests.traces.tiny import checkpoint  # noqa: F401  (a fixture)

HARD = {"1": 3, "2": 99}
"""Problems whose first so many samples are wrong."""


@pytest.fixture
def config(tmp_path, checkpoint, monkeypatch):  # noqa: F811
    """Four problems and an engine that answers them; it stops after `limit` completions."""
    tokenizer = tokenization.load_tokenizer(str(checkpoint))
    (tmp_path / "set.jsonl").write_text("".join(f'{{"problem": "Say {n}.", "answer": {n}}}\n' for n in range(4)))

    def engine(folder, requests, sampling, **options):
        for request in requests:
            engine.asked.append(request.id)
            if len(engine.asked) == engine.limit:
                raise KeyboardInterrupt
            problem, _, sample = request.id.rsplit("/", 2)
            number = str(int(problem.split(":")[1]) - 1)
            right = int(sample) >= HARD.get(number, 0)
            text = f"<think>\n{sample}\n</think>\nThe answer is \\boxed{{{number if right else 77}}}."
            ids = tokenization.encode_response(tokenizer, text)
            yield Completion(id=request.id, output_ids=ids, finish_reason="stop")

    engine.asked, engine.limit = [], -1
    monkeypatch.setitem(engines.ENGINES, "jax", engine)
    built = configs.build(
        {
            "name": "test",
            "run_dir": str(tmp_path / "run"),
            "problems": {"source": "jsonl", "path": str(tmp_path / "set.jsonl")},
            "traces": {
                "engine": "jax",
                "teacher": str(checkpoint),
                "max_tokens": 60,
                "samples": 2,
                "until_kept": 2,
                "max_samples": 7,
            },
            "data": {"row_tokens": 64},
            "student": {"init": "demo"},
            "train": {"batch_rows": 1, "steps": 1, "optimizer": {"learning_rate": 0.1}},
        }
    )
    return built, engine


def drawn_of(run):
    found: dict[str, int] = {}
    for trace in read_records(run.traces, Trace):
        found[trace.problem_id] = found.get(trace.problem_id, 0) + 1
    return found


def test_hard_problems_are_drawn_until_enough_are_kept_or_the_budget_is_spent(config, capsys):
    built, engine = config
    run = RunDir(pipeline.Path(built.run_dir))
    pipeline.run_command("generate", built)
    assert drawn_of(run) == dict.fromkeys(["set:1", "set:2", "set:3", "set:4"], 2)
    pipeline.run_command("verify", built)
    assert drawn_of(run) == {"set:1": 2, "set:2": 6, "set:3": 7, "set:4": 2}
    assert len(engine.asked) == len(set(engine.asked)) == 17
    kept = [verdict.trace_id for verdict in read_records(run.verdicts, Verdict) if verdict.kept]
    assert [name for name in kept if name.startswith("set:2")] == [f"set:2/plain/{n}" for n in (3, 4, 5)]
    assert "7 of 17 traces kept (41.2%)" in capsys.readouterr().out
    # it is done: neither command has anything to do
    before = (run.traces / "traces.parquet").read_bytes()
    pipeline.run_command("generate", built)
    pipeline.run_command("verify", built)
    assert resample.plan(built, run) == 0
    assert (run.traces / "traces.parquet").read_bytes() == before
    assert len(engine.asked) == 17


def run_both(config):
    for command in ("generate", "verify"):
        pipeline.run_command(command, config)


@pytest.mark.parametrize("limit", [5, 10, 14])
def test_a_run_that_was_stopped_in_any_round_ends_the_same(config, limit):
    built, engine = config
    run = RunDir(pipeline.Path(built.run_dir))
    run_both(built)
    expected = (run.traces / "traces.parquet").read_bytes()
    shutil.rmtree(run.root)

    engine.asked, engine.limit = [], limit
    with pytest.raises(KeyboardInterrupt):
        run_both(built)
    engine.limit = -1
    run_both(built)
    assert (run.traces / "traces.parquet").read_bytes() == expected
    assert len(engine.asked) == 18  # the one that was cut short is drawn again


def test_without_a_budget_nothing_is_planned(config, tmp_path):
    built, _ = config
    run = RunDir(tmp_path / "run")
    with pytest.raises(ValueError, match="run generate and verify first"):
        resample.plan(built, run)
    data = configs.to_dict(built)
    data["traces"] |= {"until_kept": 0, "max_samples": None}
    assert resample.plan(configs.build(data), run) == 0
