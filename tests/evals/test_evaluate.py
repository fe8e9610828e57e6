"""The stage `evaluate`, with a stand-in for the engine: real tokenizers, prompts, verifier and files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jaxdistill import config as configuration
from jaxdistill import tokenization
from jaxdistill.data.tokenizer import train_tokenizer
from jaxdistill.demo.task import make_problems
from jaxdistill.evals.evaluate import evaluate
from jaxdistill.evals.sampling import sample_seed
from jaxdistill.evals.subjects import find_subjects
from jaxdistill.evals.summary import summarise, table
from jaxdistill.records import Problem, RunDir, Score, read_records, write_records
from jaxdistill.traces import engines

TEACHER_SUFFIX, STUDENT_SUFFIX = "\nThink step by step.", "\nAnswer."


def make_checkpoint(folder: Path) -> Path:
    """All of a checkpoint but a model: enough for every part of the stage that is not the engine."""
    folder.mkdir(parents=True, exist_ok=True)
    train_tokenizer(folder, (f"{q}\n{s}" for q, _, s in make_problems(50, seed=9)), vocab_size=400)
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 2048}))
    (folder / "model.safetensors").write_bytes(folder.as_posix().encode())
    return folder


@pytest.fixture
def run(tmp_path):
    """A run directory with 12 held-out problems and the exports of a student and two baselines."""
    found = RunDir(tmp_path / "run")
    make_checkpoint(found.export)
    for name in ("answer_only", "other"):
        make_checkpoint(found.baseline(name).export)
    write_records(found.problems / "heldout" / "problems.parquet", Problem, held_out(12))
    return found


def held_out(count: int) -> list[Problem]:
    made = make_problems(count, seed=1)
    return [
        Problem(id=f"demo:{i}", prompt=q, answer=str(a), domain="math", source="demo", solution=s)
        for i, (q, a, s) in enumerate(made)
    ]


@pytest.fixture
def config(tmp_path):
    return make_config(make_checkpoint(tmp_path / "teacher"))


def make_config(teacher: Path | None, **evaluation):
    return configuration.build(
        {
            "name": "test",
            "run_dir": "unused",
            "problems": {"source": "demo", "count": 4},
            "traces": {
                "engine": "jax" if teacher else "import",
                "teacher": teacher and str(teacher),
                "suffix": TEACHER_SUFFIX,
            },
            "data": {"row_tokens": 256, "suffix": STUDENT_SUFFIX},
            "student": {"init": "unused/student"},
            "train": {"batch_rows": 4, "steps": 1, "optimizer": {"learning_rate": 1e-3}},
            "evaluate": {"problems": {"source": "demo", "count": 12, "seed": 1}} | evaluation,
            "baselines": {"answer_only": {"data.response": "answer"}, "other": {"data.suffix": "\nOther."}},
        }
    )


class Engine:
    """Answers every demo problem from its worked solution, but for those that `spoil` has something else for.

    It keeps what it was asked, and gives completions in reverse order.
    """

    def __init__(self):
        self.solutions = {q: s for q, _, s in make_problems(12, seed=1)}
        self.calls: list[tuple[Path, list[engines.Request], engines.Sampling]] = []
        self.prompts: dict[Path, list[str]] = {}
        self.dies_at: Path | None = None

    def spoil(self, checkpoint: Path, number: int, solution: str) -> tuple[str, str]:
        """What the model says to its n-th request, and how that ends."""
        return solution, "stop"

    def __call__(self, checkpoint, requests, sampling, *, vllm, batch, log, ready):
        if checkpoint == self.dies_at:
            raise KeyboardInterrupt
        self.calls.append((checkpoint, requests, sampling))
        tokenizer = tokenization.load_tokenizer(str(checkpoint))
        prompts = [tokenizer.decode(r.prompt_ids) for r in requests]
        self.prompts[checkpoint] = prompts
        ready()
        for number in reversed(range(len(requests))):
            question = next(q for q in self.solutions if q in prompts[number])
            text, reason = self.spoil(checkpoint, number, self.solutions[question])
            ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
            if reason == "error":
                yield engines.Completion(id=requests[number].id, output_ids=[], finish_reason="error", error="too hot")
            else:
                yield engines.Completion(
                    id=requests[number].id, output_ids=ids if reason == "stop" else ids[:-1], finish_reason=reason
                )


@pytest.fixture
def engine(monkeypatch):
    found = Engine()
    monkeypatch.setitem(engines.ENGINES, "jax", found)
    return found


def test_every_model_answers_every_problem_and_is_marked(config, run, engine):
    students = {run.export: 3, run.baseline("answer_only").export: 9}

    def spoil(checkpoint, number, solution):
        wrong = number < students.get(checkpoint, 0)
        return solution.rpartition("{")[0] + "{1000}." if wrong else solution, "stop"

    engine.spoil = spoil
    counts = evaluate(config, run)
    assert counts["heldout"] == 12 and counts["skipped"] == {}
    assert list(counts["models"]) == ["teacher", "student", "answer_only", "other"]
    found = {
        name: (m["correct"], m["incorrect"], m["undecided"], m["accuracy"]) for name, m in counts["models"].items()
    }
    assert found == {
        "teacher": (12, 0, 0, 1.0),
        "student": (9, 3, 0, 0.75),
        "answer_only": (3, 9, 0, 0.25),
        "other": (12, 0, 0, 1.0),
    }
    compared = counts["compared"]["answer_only"]
    assert (compared["wins"], compared["losses"], compared["ties"]) == (6, 0, 6)
    assert compared["p"] == pytest.approx(2 / 2**6)
    assert json.loads(json.dumps(counts)) == counts
    scores = list(read_records(run.evaluation / "student", Score))
    assert [s.problem_id for s in scores] == [p.id for p in held_out(12)], (
        "in the problems' order, whatever the engine's"
    )
    assert scores[0].extracted == "1000" and scores[0].outcome == "incorrect"
    assert scores[5].response.startswith("<think>\n") and "</think>\nThe answer is" in scores[5].response
    assert "<|im_end|>" not in scores[5].response, "special tokens are no part of the text"


def test_each_model_gets_the_prompt_that_it_was_made_for(config, run, engine):
    evaluate(config, run)
    teacher = find_subjects(config, run)[0][0].checkpoint
    expected = {teacher: TEACHER_SUFFIX, run.export: STUDENT_SUFFIX, run.baseline("answer_only").export: STUDENT_SUFFIX}
    expected[run.baseline("other").export] = "\nOther."
    for checkpoint, suffix in expected.items():
        question = held_out(1)[0].prompt
        prompt = engine.prompts[checkpoint][0]
        assert prompt == f"<|im_start|>user\n{question}{suffix}<|im_end|>\n<|im_start|>assistant\n"


def test_what_is_cut_off_or_failed_is_never_correct(config, run, engine):
    engine.spoil = lambda checkpoint, number, solution: (solution, ("length", "error", "stop")[min(number, 2)])
    counts = evaluate(config, run)
    student = counts["models"]["student"]
    assert (student["correct"], student["undecided"], student["truncated"]) == (10, 2, 1)
    assert student["accuracy"] == pytest.approx(10 / 12), "undecided counts as not correct"
    scores = list(read_records(run.evaluation / "student", Score))
    assert [(s.outcome, s.reason) for s in scores[:2]] == [("undecided", "truncated"), ("undecided", "too hot")]


def test_a_problem_without_gold_is_undecided(config, run, engine):
    question, _, solution = next(iter(make_problems(1, seed=1)))
    open_ended = Problem(id="x", prompt=question, answer=None, domain="math", source="demo", solution=solution)
    write_records(run.problems / "heldout" / "problems.parquet", Problem, [open_ended])
    assert evaluate(config, run)["models"]["student"]["undecided"] == 1


def test_an_empty_thinking_is_an_answer(config, run, engine):
    engine.spoil = lambda checkpoint, number, solution: (
        "<think>\n</think>\n" + solution.partition("</think>\n")[2],
        "stop",
    )
    assert evaluate(config, run)["models"]["answer_only"]["accuracy"] == 1.0


def test_after_a_kill_only_what_is_missing_is_sampled(config, run, engine):
    engine.dies_at = run.baseline("answer_only").export
    with pytest.raises(KeyboardInterrupt):
        evaluate(config, run)
    assert [c[0] for c in engine.calls][1:] == [run.export]
    leftover = run.evaluation / ".answer_only.1.tmp"  # of a process that died between two writes
    leftover.mkdir()
    (leftover / "scores.parquet").write_bytes(b"half")
    engine.dies_at = None
    engine.calls.clear()
    resumed = evaluate(config, run)
    assert [c[0] for c in engine.calls] == [run.baseline("answer_only").export, run.baseline("other").export]
    assert not leftover.exists()
    engine.calls.clear()
    assert evaluate(config, run) == resumed, "times too are those of the sampling itself"
    assert engine.calls == []


def test_another_question_is_asked_again(config, run, engine, tmp_path):
    evaluate(config, run)
    engine.calls.clear()
    teacher = tmp_path / "teacher"
    assert len(evaluate(make_config(teacher, models=["student"]), run)["models"]) == 1
    assert engine.calls == [], "which other models are evaluated does not matter"
    evaluate(make_config(teacher, temperature=0.6), run)
    assert len(engine.calls) == 4
    engine.calls.clear()
    (run.export / "model.safetensors").write_bytes(b"trained anew")
    evaluate(make_config(teacher, temperature=0.6), run)
    assert [c[0] for c in engine.calls] == [run.export]


def test_samples_have_seeds_of_their_own(config, run, engine, tmp_path):
    counts = evaluate(make_config(tmp_path / "teacher", samples=3, temperature=1.0, max_tokens=77), run)
    checkpoint, requests, sampling = engine.calls[1]
    assert checkpoint == run.export and len(requests) == 36
    assert len({r.seed for r in requests}) == 36 and all(0 <= r.seed < 2**31 for r in requests)
    assert [r.id for r in requests[:4]] == ["demo:0/0", "demo:0/1", "demo:0/2", "demo:1/0"]
    assert (sampling.temperature, sampling.max_tokens) == (1.0, 77)
    assert sampling.stop_ids == [tokenization.load_tokenizer(str(run.export)).eos_token_id]
    # the seed of a sample is the same when more samples are drawn
    assert requests[3].seed == sample_seed(0, "demo:1", 0)
    student = counts["models"]["student"]
    assert (student["problems"], student["correct"]) == (12, 36)
    assert student["low"] == pytest.approx(counts["models"]["teacher"]["low"]) and student["low"] < 0.8, (
        "12 problems, not 36"
    )


def test_without_a_teacher_it_is_skipped_with_a_reason(run, engine, capsys):
    counts = evaluate(make_config(None), run)
    assert list(counts["models"]) == ["student", "answer_only", "other"]
    assert "imported" in counts["skipped"]["teacher"]
    assert "teacher: skipped, the traces were imported" in capsys.readouterr().out


def test_a_missing_export_is_named(config, tmp_path, engine):
    bare = RunDir(tmp_path / "bare")
    write_records(bare.problems / "heldout" / "problems.parquet", Problem, held_out(1))
    with pytest.raises(ValueError, match=r"bare/export: no export of student.*run the stage `export` first"):
        evaluate(config, bare)


def test_no_section_evaluate(config, run):
    plain = configuration.to_dict(config)
    with pytest.raises(ValueError, match="no section `evaluate`"):
        evaluate(configuration.build(plain | {"evaluate": None}), run)


def test_the_table_is_aligned(capsys):
    scores = [
        Score(
            model="m",
            problem_id=str(i),
            sample=0,
            response="",
            output_tokens=60,
            finish_reason="stop",
            outcome="correct" if i < 3 else "undecided",
            reason="",
            extracted=None,
        )
        for i in range(4)
    ]
    measured = summarise(scores, 2.0)
    assert (measured["tokens_per_second"], measured["mean_output_tokens"], measured["accuracy"]) == (120.0, 60.0, 0.75)
    perfect = measured | {"accuracy": 1.0, "low": 0.9, "high": 1.0, "truncated": 12_345}
    lines = table({"teacher": perfect, "a_long_baseline": measured})
    assert "100.0%" in lines[1] and "75.0%   30.1 to 95.4" in lines[2] and "12,345" in lines[1]
    assert len({len(line) for line in lines[1:]}) == 1
    assert lines[1].endswith("█" * 24) and lines[2].endswith("█" * 18 + "░" * 6)
    assert lines[0].index("tokens") + len("tokens") == lines[1].index("    60") + 6
    assert table({}) == []


# -------------------------------------------------------------------------------- benchmarks, samples, quality


def benchmark_file(folder: Path) -> Path:
    """Four of the engine's questions as JSON lines."""
    path = folder / "mine.jsonl"
    rows = [{"problem": q, "answer": a, "domain": f"d{i % 2}"} for i, (q, a, _) in enumerate(make_problems(4, seed=1))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_benchmarks_are_answered_with_the_held_out_problems(run, engine, tmp_path, capsys):
    teacher = make_checkpoint(tmp_path / "teacher")
    mine = {"name": "mine", "kind": "jsonl", "path": str(benchmark_file(tmp_path))}
    training = held_out(1)
    write_records(run.problems / "problems.parquet", Problem, training)
    students = (run.export,)
    engine.spoil = lambda checkpoint, number, solution: (
        solution.rpartition("{")[0] + "{1000}." if checkpoint in students and number >= 12 else solution,
        "stop",
    )
    counts = evaluate(make_config(teacher, benchmarks=[mine]), run)
    found = counts["benchmarks"]["mine"]
    assert counts["models"]["student"]["accuracy"] == 1.0 and found["models"]["student"]["accuracy"] == 0.0
    assert found["models"]["teacher"]["accuracy"] == 1.0 and found["problems"] == 4 and found["in_training"] == 1
    assert found["compared"]["teacher"]["difference"] == -1.0 and found["compared"]["teacher"]["losses"] == 4
    assert list(found["models"]["student"]["domains"]) == ["d0", "d1"]
    assert [len(requests) for _, requests, _ in engine.calls] == [16] * 4, "one start of the engine a model"
    assert "1 of them among the training problems" in capsys.readouterr().out
    engine.calls.clear()
    more = [mine, mine | {"name": "again", "max_tokens": 99}]
    evaluate(make_config(teacher, benchmarks=more), run)
    assert [(len(requests), sampling.max_tokens) for _, requests, sampling in engine.calls] == [(4, 99)] * 4, (
        "what was answered is not asked again"
    )


def test_benchmarks_alone(run, engine, tmp_path):
    mine = {"name": "mine", "kind": "jsonl", "path": str(benchmark_file(tmp_path))}
    counts = evaluate(make_config(make_checkpoint(tmp_path / "teacher"), problems=None, benchmarks=[mine]), run)
    assert counts["heldout"] == 0 and counts["models"] == {} and counts["benchmarks"]["mine"]["problems"] == 4


def test_several_samples_and_seeds(run, engine, tmp_path):
    """The student is right in its first sample of each seed alone."""
    engine.spoil = lambda checkpoint, number, solution: (
        solution if number % 2 == 0 else solution.rpartition("{")[0] + f"{{{1000 + number % 4}}}.",
        "stop",
    )
    settings = {"samples": 2, "seeds": 2, "temperature": 1.0, "models": ["student"]}
    counts = evaluate(make_config(make_checkpoint(tmp_path / "teacher"), **settings), run)
    student = counts["models"]["student"]
    assert counts["samples"] == 4 and student["accuracy"] == 0.5 and student["by_seed"] == [0.5, 0.5]
    assert student["pass_at"]["1"]["value"] == 0.5 and student["pass_at"]["4"]["value"] == 1.0
    assert student["pass_at"]["2"]["value"] == pytest.approx(1 - 1 / 6)
    assert student["maj_at"]["4"]["value"] == 1.0, "two votes for the right answer, one for each wrong one"
    requests = engine.calls[0][1]
    assert [r.seed for r in requests[:4]] == [sample_seed(s, "demo:0", i) for s in (0, 1) for i in (0, 1)]


def test_alike_samples_and_unknown_sets_are_refused():
    with pytest.raises(ValueError, match="3 samples at temperature 0 are all alike"):
        make_config(None, samples=3)
    with pytest.raises(ValueError, match="neither `problems` nor `benchmarks`"):
        make_config(None, problems=None)
    with pytest.raises(ValueError, match="a name comes twice"):
        make_config(None, benchmarks=[{"name": "mmlu"}, {"name": "mmlu"}])


def test_a_tokenizer_that_loses_the_tags_is_named(config, run, engine):
    path = run.export / "tokenizer.json"
    data = json.loads(path.read_text())
    data["normalizer"] = {"type": "Replace", "pattern": {"String": "think"}, "content": ""}
    data["added_tokens"] = [t for t in data["added_tokens"] if "think" not in t["content"]]
    for tag in ("<think>", "</think>"):
        data["model"]["vocab"].pop(tag, None)
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"export: the tokenizer of student does not keep <think> and </think>"):
        evaluate(config, run)


def test_the_student_reads_itself(tmp_path):
    """The real decoder and the real reader, on the demo teacher: quality, and best-of-n by likelihood."""
    found = RunDir(tmp_path / "run")
    write_records(found.problems / "heldout" / "problems.parquet", Problem, held_out(4))
    settings = {"quality": {"problems": 3}, "models": ["teacher"], "max_tokens": 96, "batch": 8}
    more = {"samples": 2, "temperature": 0.7, "best_of": "likelihood"}
    config = make_config(Path("demo"), **settings, **more)
    config = configuration.build(configuration.to_dict(config) | {"traces": {"engine": "jax", "teacher": "demo"}})
    teacher = evaluate(config, found)["models"]["teacher"]
    assert teacher["accuracy"] >= 0.75 and teacher["quality"]["well_formed"] >= 0.75
    assert teacher["faithfulness"]["responses"] == 3 and teacher["faithfulness"]["gain"]["value"] > 0.3
    assert 0 <= teacher["best_of_n"]["low"] <= teacher["best_of_n"]["value"] <= 1
    scores = list(read_records(found.evaluation / "teacher", Score))
    assert all(score.likelihood < 0 for score in scores)
