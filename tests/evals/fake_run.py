"""A run directory as the stages would leave it, without running them: for tests of the report, and to look at it.

python tests/evals/fake_run.py FOLDER     # a whole run, its report and the report of an empty one
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import sys
from pathlib import Path
from typing import Any

from jaxdistill import config as configuration
from jaxdistill.config import RunConfig, fingerprint
from jaxdistill.demo.task import make_problems
from jaxdistill.evals import facts
from jaxdistill.evals.summary import compare, summarise
from jaxdistill.records import (
    Problem,
    RunDir,
    Score,
    Trace,
    Verdict,
    split_response,
    write_json,
    write_manifest,
    write_records,
)

SKILL = {"teacher": 0.93, "student": 0.78, "answer_only": 0.16, "unverified": 0.66}


def make_config(folder: Path) -> RunConfig:
    return configuration.build(
        {
            "name": "quickstart",
            "run_dir": str(folder),
            "problems": {"source": "demo", "count": 1200},
            "traces": {"engine": "jax", "teacher": "demo", "samples": 2, "temperature": 0.8, "max_tokens": 160},
            "verify": {"keep_per_problem": 2},
            "data": {"row_tokens": 512},
            "student": {
                "architecture": {
                    "hidden_size": 128,
                    "intermediate_size": 384,
                    "num_hidden_layers": 4,
                    "num_attention_heads": 4,
                    "num_key_value_heads": 2,
                },
            },
            "train": {"batch_rows": 16, "epochs": 20, "optimizer": {"learning_rate": 2e-3}},
            "evaluate": {"problems": {"source": "demo", "count": 500, "seed": 1}},
            "baselines": {
                "answer_only": {"data.response": "answer"},
                "unverified": {"train.optimizer.learning_rate": 1e-3},
            },
        }
    )


def make_run(folder: Path, *, problems: int = 1200, held_out: int = 500) -> tuple[RunConfig, RunDir]:
    """A finished run with two baselines."""
    config, run, rng = make_config(folder), RunDir(folder), random.Random(0)
    add_problems(run, problems, held_out)
    add_traces(run, rng)
    for name, each in {
        "student": run,
        "answer_only": run.baseline("answer_only"),
        "unverified": run.baseline("unverified"),
    }.items():
        add_training(each, rng, floor=0.9 if name == "answer_only" else 0.08)
    add_evaluation(run, rng)
    add_ablations(run)
    return config, run


def _finish(folder: Path, stage: str, counts: dict[str, Any]) -> None:
    before = dict(zip(list(facts.STAGES)[1:], facts.STAGES, strict=False)).get(stage)
    inputs = {before: fingerprint(before)} if before else {}
    write_manifest(folder, stage=stage, config={}, config_hash=fingerprint(stage), inputs=inputs, counts=counts)


def add_problems(run: RunDir, problems: int, held_out: int) -> None:
    made = [
        Problem(
            id=f"demo-{i}", prompt=question, answer=str(answer), domain="math", source=f"demo:{i}", solution=solution
        )
        for i, (question, answer, solution) in enumerate(make_problems(problems + held_out, seed=0))
    ]
    write_records(run.problems / "problems.parquet", Problem, made[:problems])
    write_records(run.problems / "heldout" / "problems.parquet", Problem, made[problems:])
    _finish(run.problems, "problems", {"problems": problems, "heldout": held_out, "wall_seconds": 0.21})


def add_traces(run: RunDir, rng: random.Random) -> None:
    from jaxdistill.records import read_records

    traces, verdicts = [], []
    for problem in read_records(run.problems, Problem):
        for sample in range(2):
            response, finish, correct = respond(problem, SKILL["teacher"], rng)
            thinking, content = split_response(response)
            trace = Trace(
                id=f"{problem.id}/default/{sample}",
                problem_id=problem.id,
                style="default",
                sample=sample,
                engine="jax",
                teacher="demo",
                revision="sha256:8c5f7a1e90b2d346",
                temperature=0.8,
                top_p=1.0,
                max_tokens=160,
                seed=rng.randrange(2**31),
                prompt_ids=[1, 2, 3],
                output_ids=list(range(len(response) // 2)),
                response=response,
                thinking=thinking,
                content=content,
                finish_reason=finish,
            )
            traces.append(trace)
            verdicts.append(_verdict(trace, correct, duplicate=correct and rng.random() < 0.08))
    write_records(run.traces / "part-00000.parquet", Trace, traces)
    _finish(run.traces, "traces", {"traces": len(traces), "seconds": 94.0})
    write_records(run.verdicts / "part-00000.parquet", Verdict, verdicts)
    _finish(
        run.verdicts,
        "verdicts",
        {"rejected": dict.fromkeys(("truncated", "incorrect", "duplicate"), 1), "wall_seconds": 1.4},
    )


def _verdict(trace: Trace, correct: bool, duplicate: bool) -> Verdict:
    truncated = trace.finish_reason == "length"
    rejected = "truncated" if truncated else "duplicate" if duplicate else None if correct else "incorrect"
    return Verdict(
        trace_id=trace.id,
        problem_id=trace.problem_id,
        outcome="undecided" if truncated else "correct" if correct else "incorrect",
        reason="truncated" if truncated else "equal" if correct else "different",
        method="" if truncated else "integer",
        extracted=None if truncated else trace.content.rpartition("boxed{")[2][:-2],
        kept=rejected is None,
        rejected_for=rejected,
    )


def respond(problem: Problem, skill: float, rng: random.Random, *, thinks: bool = True) -> tuple[str, str, bool]:
    """(response, finish reason, is correct) of a model that gets `skill` of the problems right."""
    assert problem.solution is not None
    if rng.random() < skill:
        correct, response = True, problem.solution
    elif rng.random() < 0.15:
        lines = problem.solution.split("\n")
        return "\n".join([*lines[:-2], *[lines[-3]] * 12]), "length", False
    else:
        wrong = str(int(problem.answer or 0) + rng.choice([-10, -3, -2, -1, 1, 2, 5, 11]))
        correct, response = (
            False,
            wrong.join(problem.solution.rsplit(str(problem.answer), 2)) if thinks else problem.solution,
        )
        response = response.replace(f"boxed{{{problem.answer}}}", f"boxed{{{wrong}}}")
    if not thinks:
        response = "<think>\n</think>\n" + response.partition("</think>\n")[2]
    return response, "stop", correct


def add_training(run: RunDir, rng: random.Random, floor: float, steps: int = 900) -> None:
    _finish(
        run.tokens,
        "tokens",
        {
            "examples": 2080,
            "rows": 388,
            "tokens": 188_400,
            "packing_efficiency": 0.948,
            "trained_share": 0.52,
            "length_histograms": {
                "edges": [8, 12, 16, 24, 32, 48, 64],
                "prompt": [0, 0, 40, 900, 1000, 140],
                "thinking": [0, 10, 400, 1300, 370, 0],
                "answer": [2080, 0, 0, 0, 0, 0],
            },
            "thinking_tokens": 60_000,
            "answer_tokens": 22_000,
            "wall_seconds": 2.3,
        },
    )
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    held = [{"step": s, "rows": 16, "loss": 0.4 + 3 / s, "accuracy": 0.8 - 60 / s} for s in range(100, steps + 1, 100)]
    (run.checkpoints / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in held))
    lines = []
    for step in range(10, steps + 1, 10):
        rate = 2e-3 * min(1.0, step / 30) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        entry = {
            "step": step,
            "loss": (4.2 - floor) * math.exp(-step / 110) + floor + 0.25 * math.exp(-step / 400) * rng.random(),
            "learning_rate": rate,
            "gradient_norm": 0.4 + rng.random(),
            "accuracy": 1 - 0.6 * math.exp(-step / 200) - floor / 3,
            "tokens": step * 16 * 512,
            "trained_tokens": step * 16 * 260,
            "seconds": step * 0.19,
            "tokens_per_second": 41_000 + 3_000 * rng.random(),
        }
        lines.append(json.dumps(entry))
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    (run.checkpoints / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    _finish(
        run.checkpoints,
        "checkpoints",
        {"parameters": 1_180_000, "steps": steps, "wall_seconds": 3.0, "seconds": steps * 0.19},
    )
    run.export.mkdir(parents=True, exist_ok=True)
    (run.export / "model.safetensors").write_bytes(b"\0" * 4096)
    _finish(run.export, "export", {"check": {"max_difference": 2.4e-6}, "wall_seconds": 6.2})


def add_evaluation(run: RunDir, rng: random.Random, models: tuple[str, ...] = tuple(SKILL)) -> None:
    from jaxdistill.records import read_records

    counts, outcomes, held_out = {}, {}, list(read_records(run.problems / "heldout", Problem))
    for model in models:
        scores = [_score(model, problem, rng) for problem in held_out]
        add_scores(run, model, scores)
        outcomes[model] = scores
        counts[model] = summarise(scores, 11.0 + 3 * rng.random()) | {"checkpoint": f"{run.root}/export"}
        counts[model]["faithfulness"] = fake_faithfulness(SKILL[model])
    compared = {
        m: compare(outcomes["student"], outcomes[m]) for m in outcomes if m != "student" and "student" in outcomes
    }
    _finish(
        run.evaluation,
        "evaluation",
        {
            "heldout": len(held_out),
            "samples": 1,
            "models": counts,
            "compared": compared,
            "skipped": {},
            "seconds": 49.0,
            "benchmarks": add_benchmark(run, rng, held_out[: len(held_out) // 2], models),
        },
    )


def fake_faithfulness(skill: float) -> dict[str, Any]:
    names = {"none": 0.1, "first 0.25": 0.15, "first 0.5": 0.3, "first 0.75": 0.5, "whole": 1.0, "random digits": 0.05}
    variants = {name: {"probability": share * skill, "says": share * skill} for name, share in names.items()}
    gain = {"value": 0.9 * skill, "low": 0.9 * skill - 0.05, "high": min(1.0, 0.9 * skill + 0.05)}
    return {"responses": 64, "variants": variants, "gain": gain, "follows_mistake": skill}


def add_benchmark(run: RunDir, rng: random.Random, asked: list[Problem], models: tuple[str, ...]) -> dict[str, Any]:
    """A benchmark with four samples a problem."""
    asked = [dataclasses.replace(p, domain=("number theory", "geometry")[i % 2]) for i, p in enumerate(asked)]
    domains = {p.id: p.domain for p in asked}
    scores = {
        model: [dataclasses.replace(_score(model, p, rng), sample=s) for p in asked for s in range(4)]
        for model in models
    }
    for model, each in scores.items():
        write_records(run.evaluation / "benchmarks" / "math500" / model / "scores.parquet", Score, each)
    write_records(run.evaluation / "benchmarks" / "math500" / "problems" / "problems.parquet", Problem, asked)
    found = {m: summarise(each, 9.0, domains=domains) | {"checkpoint": ""} for m, each in scores.items()}
    return {
        "math500": {
            "title": "MATH-500",
            "problems": len(asked),
            "samples": 4,
            "in_training": 3,
            "models": found,
            "compared": {},
        }
    }


def add_ablations(run: RunDir) -> None:
    rows = []
    for name, value in (("reasoning", 0.78), ("answer_only", 0.16), ("shuffled_steps", 0.31), ("wrong_answers", 0.7)):
        own = name == "reasoning"
        rows.append(
            {
                "name": name,
                "seeds": 3,
                "accuracy": value,
                "low": value - 0.05,
                "high": value + 0.05,
                "by_seed": [value - 0.02, value, value + 0.02],
                "difference": None if own else value - 0.78,
                "difference_low": None if own else value - 0.84,
                "difference_high": None if own else value - 0.72,
                "examples": 2080,
                "thinking_tokens": 28.1,
                "trained_tokens": 82_000,
                "steps": 900,
                "output_tokens": 41.0,
            }
        )
    write_json(run.root / "ablations" / "ablations.json", {"heldout": 500, "match": "epochs", "rows": rows})


def add_scores(run: RunDir, model: str, scores: list[Score]) -> None:
    write_records(run.evaluation / model / "scores.parquet", Score, scores)
    write_json(run.evaluation / model / "model.json", {"asked": "", "checkpoint": "", "seconds": 12.0})


def _score(model: str, problem: Problem, rng: random.Random) -> Score:
    response, finish, correct = respond(problem, SKILL[model], rng, thinks=model != "answer_only")
    truncated = finish == "length"
    return Score(
        model=model,
        problem_id=problem.id,
        sample=0,
        response=response,
        output_tokens=len(response) // 2,
        finish_reason=finish,
        outcome="undecided" if truncated else "correct" if correct else "incorrect",
        reason="truncated" if truncated else "equal" if correct else "different",
        extracted=None if truncated else response.rpartition("boxed{")[2][:-2],
    )


def main(folder: Path) -> None:
    from jaxdistill.evals.report import report

    config, run = make_run(folder / "full")
    report(config, run)
    report(config, RunDir(folder / "empty"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
