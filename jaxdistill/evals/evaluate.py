"""Stage `evaluate`: teacher, student and baselines answer the same held-out problems, and the verifier marks them.

Each model has a folder of its own below `evaluation/`: `scores.parquet` and `model.json` (what was asked of which
checkpoint, and how long it took), which appear together. A model whose folder answers the question that is asked now is
not sampled again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import time
from pathlib import Path
from typing import Any

from jaxdistill import config as configuration
from jaxdistill import hub, tokenization
from jaxdistill.config import EvaluateConfig, RunConfig
from jaxdistill.evals import statistics
from jaxdistill.progress import bar, say
from jaxdistill.records import Problem, RunDir, Score, atomic_folder, read_records, write_json, write_records
from jaxdistill.traces import engines
from jaxdistill.verify import check_math

SCORES = "scores.parquet"
MODEL = "model.json"


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model to be evaluated, and the prompt that it is used to."""

    name: str
    checkpoint: Path
    system: str | None
    suffix: str


def evaluate(config: RunConfig, run: RunDir) -> dict[str, Any]:
    """Scores every model of `evaluate.models` on `problems/heldout`.

    Returns:
      Counts: `heldout`, `samples` a problem, `seconds` of sampling, `models` (see `summarise`), `compared` (the student
      against each other model: wins, losses, ties, p), and `skipped` (which models were left out, and why).
    Raises:
      ValueError: no `evaluate` section, no held-out problems, a checkpoint that is not there or cannot be run.
    """
    settings = config.evaluate
    if settings is None:
        raise ValueError(f"{config.name}: no section `evaluate`; add one with the held-out `problems`.")
    problems = list(read_records(run.problems / "heldout", Problem))
    subjects, skipped = find_subjects(config, run)
    models, outcomes = {}, {}
    for subject in subjects:
        folder = run.evaluation / subject.name
        asked = _question(subject, problems, settings)
        if not _is_answered(folder, asked):
            _score(subject, problems, settings, folder, asked)
        scores = list(read_records(folder, Score))
        measured = json.loads((folder / MODEL).read_text())
        outcomes[subject.name] = correct_by_problem(scores)
        models[subject.name] = summarise(scores, measured["seconds"]) | {"checkpoint": str(subject.checkpoint)}
    compared = {}
    if "student" in outcomes:
        others = (name for name in outcomes if name != "student")
        compared = {
            name: dataclasses.asdict(statistics.compare(outcomes["student"], outcomes[name])) for name in others
        }
    for line in table(models):
        say(line)
    for name, reason in skipped.items():
        say(f"  {name}: skipped, {reason}")
    return {
        "heldout": len(problems),
        "samples": settings.samples,
        "seconds": sum(m["seconds"] for m in models.values()),
        "models": models,
        "compared": compared,
        "skipped": skipped,
    }


def find_subjects(config: RunConfig, run: RunDir) -> tuple[list[Subject], dict[str, str]]:
    """The models that `evaluate.models` names, in its order, and the names that are left out with their reasons."""
    assert config.evaluate is not None
    subjects, skipped = [], {}
    for name in dict.fromkeys(config.evaluate.models):
        if name == "teacher":
            traces = config.traces
            if traces.teacher is None:
                skipped[name] = "the traces were imported and `traces.teacher` names no model"
                continue
            subjects.append(Subject(name, hub.fetch(traces.teacher, traces.revision), traces.system, traces.suffix))
        elif name == "student":
            subjects.append(_student(name, config, run))
        else:
            subjects += [_student(b, configuration.with_baseline(config, b), run.baseline(b)) for b in config.baselines]
    return subjects, skipped


def _student(name: str, config: RunConfig, run: RunDir) -> Subject:
    if not run.export.is_dir():
        raise ValueError(f"{run.export}: no export of {name} to evaluate; run the stage `export` first.")
    return Subject(name, hub.fetch(str(run.export.resolve())), config.data.system, config.data.suffix)


def _question(subject: Subject, problems: list[Problem], settings: EvaluateConfig) -> str:
    """A fingerprint of all that the scores depend on; which other models are evaluated is not part of it."""
    asked = configuration.to_dict(settings)
    for other in ("models", "problems", "batch"):
        del asked[other]
    held = [[p.id, p.prompt, p.answer] for p in problems]
    return configuration.fingerprint(asked, held, hub.revision_of(subject.checkpoint), subject.system, subject.suffix)


def _is_answered(folder: Path, asked: str) -> bool:
    # a folder appears whole (atomic_folder), so one that has this file has its scores too
    return (folder / MODEL).is_file() and json.loads((folder / MODEL).read_text())["asked"] == asked


def _score(subject: Subject, problems: list[Problem], settings: EvaluateConfig, folder: Path, asked: str) -> None:
    """Samples one model, marks its responses and writes its folder."""
    tokenizer = tokenization.load_tokenizer(str(subject.checkpoint))
    texts = [problem.prompt for problem in problems]
    prompts = tokenization.render_prompts(tokenizer, texts, system=subject.system, suffix=subject.suffix)
    requests, origin = [], {}
    for problem, prompt_ids in zip(problems, prompts, strict=True):
        for sample in range(settings.samples):
            request = engines.Request(f"{problem.id}/{sample}", prompt_ids, _seed(settings.seed, problem.id, sample))
            requests.append(request)
            origin[request.id] = (problem, sample)
    sampling = engines.Sampling(
        temperature=settings.temperature,
        top_p=settings.top_p,
        max_tokens=settings.max_tokens,
        stop_ids=tokenization.stop_ids(subject.checkpoint, tokenizer),
    )
    completions, seconds = _sample(subject, requests, sampling, settings)
    scores = []
    for request in requests:
        problem, sample = origin[request.id]
        completion = completions[request.id]
        response = tokenization.decode_response(tokenizer, completion.output_ids)
        scores.append(_mark(subject.name, problem, sample, response, completion))
    with atomic_folder(folder) as temporary:
        write_records(temporary / SCORES, Score, scores)
        write_json(temporary / MODEL, {"asked": asked, "checkpoint": str(subject.checkpoint), "seconds": seconds})


def _sample(
    subject: Subject, requests: list[engines.Request], sampling: engines.Sampling, settings: EvaluateConfig
) -> tuple[dict[str, engines.Completion], float]:
    """All completions by request id, and the seconds from the loaded model to the last of them."""
    started = time.monotonic()

    def ready() -> None:
        nonlocal started
        started = time.monotonic()

    found: dict[str, engines.Completion] = {}
    tokens = 0
    completions = engines.generate(
        settings.engine,
        subject.checkpoint,
        requests,
        sampling,
        vllm=settings.vllm,
        batch=settings.batch,
        ready=ready,
    )
    with bar(subject.name, len(requests)) as update, contextlib.closing(completions):
        for completion in completions:
            found[completion.id] = completion
            tokens += len(completion.output_ids)
            update(len(found), f"{tokens / max(time.monotonic() - started, 1e-9):,.0f} tokens/s")
    seconds = time.monotonic() - started
    assert len(found) == len(requests), f"{len(found)} completions of {len(requests)} requests"
    return found, seconds


def _seed(seed: int, problem_id: str, sample: int) -> int:
    """One seed a sample, in 0..2**31-1, that no other problem or sample number changes."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{problem_id}/{sample}".encode()).digest()[:4]) >> 1


def _mark(model: str, problem: Problem, sample: int, response: str, completion: engines.Completion) -> Score:
    """One response with its verdict; what was cut off or failed is undecided, whatever stands in it."""
    outcome, reason, extracted = "undecided", "", None
    if completion.error is not None:
        reason = completion.error
    elif completion.finish_reason == "length":
        reason = "truncated"
    elif not problem.answer:
        reason = "no gold answer"
    else:
        verdict = check_math(response, problem.answer)
        outcome, reason, extracted = verdict.outcome, verdict.reason, verdict.extracted
    return Score(
        model=model,
        problem_id=problem.id,
        sample=sample,
        response=response,
        output_tokens=len(completion.output_ids),
        finish_reason=completion.finish_reason,
        outcome=outcome,
        reason=reason,
        extracted=extracted,
    )


def correct_by_problem(scores: list[Score]) -> dict[str, list[bool]]:
    """Problem id -> whether each of its samples is correct; undecided is not correct."""
    found: dict[str, list[bool]] = {}
    for score in scores:
        found.setdefault(score.problem_id, []).append(score.outcome == "correct")
    return found


def summarise(scores: list[Score], seconds: float) -> dict[str, Any]:
    """What the manifest, the table and the report say of one model.

    Returns:
      `problems`; `correct`, `incorrect`, `undecided`, `truncated` (responses); `accuracy` with its 95% interval `low`,
      `high`; `mean_output_tokens`; `seconds` and `tokens_per_second` of sampling, loading the model left out.
    """
    by_problem = correct_by_problem(scores)
    found = statistics.accuracy(by_problem)
    tokens = sum(score.output_tokens for score in scores)
    return {
        "problems": len(by_problem),
        **{outcome: sum(s.outcome == outcome for s in scores) for outcome in ("correct", "incorrect", "undecided")},
        "accuracy": found.value,
        "low": found.low,
        "high": found.high,
        "mean_output_tokens": tokens / max(len(scores), 1),
        "truncated": sum(s.finish_reason == "length" for s in scores),
        "seconds": seconds,
        "tokens_per_second": tokens / seconds if seconds > 0 else 0.0,
    }


def table(models: dict[str, dict[str, Any]], width: int = 24) -> list[str]:
    """Aligned lines for people, one a model: accuracy, interval, tokens a response, truncated responses, a bar."""
    if not models:
        return []
    names = max(len("model"), *(len(name) for name in models))
    lines = [f"  {'model':<{names}}  accuracy   95% interval  tokens  truncated"]
    for name, m in models.items():
        interval = f"{100 * m['low']:.1f} to {100 * m['high']:.1f}"
        filled = round(width * m["accuracy"])
        lines.append(
            f"  {name:<{names}}  {100 * m['accuracy']:7.1f}%  {interval:>13}"
            f"  {m['mean_output_tokens']:6.0f}  {m['truncated']:9,}  {'█' * filled}{'░' * (width - filled)}"
        )
    return lines
