"""Stage `evaluate`: teacher, student and baselines answer the same problems, and the verifier marks them.

The held-out problems come first, then the benchmarks. Each model has a folder of its own below `evaluation/`, and below
`evaluation/benchmarks/NAME/`: `scores.parquet` and `model.json` (what was asked of which checkpoint, and how long it
took), which appear together. A model whose folder answers the question that is asked now is not sampled again.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxdistill import config as configuration
from jaxdistill import hub, tokenization
from jaxdistill.config import EvaluateConfig, QualityConfig, RunConfig
from jaxdistill.evals import benchmarks, sampling, scoring, summary
from jaxdistill.evals.benchmarks import Item
from jaxdistill.evals.sampling import Response, TestSet
from jaxdistill.evals.subjects import Subject, find_subjects, tokenizer_of
from jaxdistill.progress import say
from jaxdistill.records import Problem, RunDir, Score, atomic_folder, read_records, write_json, write_records
from jaxdistill.verify import Check

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from jaxdistill.evals.reading import Reader

SCORES = "scores.parquet"
MODEL = "model.json"
FAITHFULNESS = "faithfulness.json"
BENCHMARKS = "benchmarks"
HELDOUT = "heldout"
ASKED = ("engine", "samples", "temperature", "top_p", "max_tokens", "seed", "vllm")


def evaluate(config: RunConfig, run: RunDir) -> dict[str, Any]:
    """Scores every model of `evaluate.models` on `problems/heldout` and on the benchmarks.

    Returns:
      Counts: `heldout`, `samples` a problem, `seconds` of sampling, `models` (see `summary.summarise`), `compared` (the
      student against each other model, see `summary.compare`), `skipped` (which models were left out, and why), and
      `benchmarks`: name -> `title`, `problems`, `samples`, `in_training`, `models` and `compared` of each.
    Raises:
      ValueError: no `evaluate` section, no problems, a checkpoint that is not there or cannot be run.
    """
    settings = config.evaluate
    if settings is None:
        raise ValueError(f"{config.name}: no section `evaluate`; add one with the held-out `problems`.")
    sets = find_sets(config, run)
    subjects, skipped = find_subjects(config, run)
    for subject in subjects:
        _answer(subject, sets, config)
    found = {each.name: _report(each, subjects, settings) for each in sets}
    for each in sets:
        if each.name != HELDOUT:
            found[each.name]["in_training"] = benchmarks.overlap(each.items, _training(run))
        _tell(each, found[each.name])
    for name, reason in skipped.items():
        say(f"  {name}: skipped, {reason}")
    main = found.pop(HELDOUT, {"problems": 0, "models": {}, "compared": {}})
    everything = [main, *found.values()]
    seconds = sum(m["seconds"] for part in everything for m in part["models"].values())
    asked = sum(len(each.items) for each in sets)
    say(f"  {len(subjects)} model(s) asked {asked:,} problems each, {seconds:,.0f} s of sampling")
    return {
        "heldout": main["problems"],
        "samples": settings.samples * settings.seeds,
        "seconds": seconds,
        "models": main["models"],
        "compared": main["compared"],
        "skipped": skipped,
        "benchmarks": found,
    }


def find_sets(config: RunConfig, run: RunDir) -> list[TestSet]:
    """The held-out problems and the benchmarks; the benchmarks' questions are written below `evaluation/benchmarks`."""
    settings = config.evaluate
    assert settings is not None
    sets = []
    if settings.problems is not None:
        problems = read_records(run.problems / HELDOUT, Problem)
        items = [Item(problem, scoring.scorer_of(problem.tests)) for problem in problems]
        drawing = sampling.drawing_of(settings)
        sets.append(TestSet(HELDOUT, "held-out problems", items, drawing, run.evaluation))
    for benchmark in settings.benchmarks:
        items = benchmarks.load(benchmark)
        folder = run.evaluation / BENCHMARKS / benchmark.name
        write_records(folder / "problems" / "problems.parquet", Problem, (item.problem for item in items))
        title = benchmarks.describe(benchmark).title
        sets.append(TestSet(benchmark.name, title, items, sampling.drawing_of(settings, benchmark), folder))
    return sets


def _training(run: RunDir) -> Iterator[str]:
    if any(run.problems.glob("*.parquet")):
        for problem in read_records(run.problems, Problem):
            yield problem.prompt


# ------------------------------------------------------------------------------------------------ one model


def _answer(subject: Subject, sets: list[TestSet], config: RunConfig) -> None:
    """Samples and marks whatever this model has not answered yet."""
    settings = config.evaluate
    assert settings is not None
    tokenizer = tokenizer_of(subject, RunDir(Path(config.run_dir)).first_day(note=False))
    asked = {each.name: _question(subject, each, settings) for each in sets}
    todo = [each for each in sets if not _is_answered(each.folder / subject.name, asked[each.name])]
    drawn = sampling.draw(subject, tokenizer, todo, settings) if todo else {}
    reader = _Lazy(subject, settings.quality)
    with scoring.Marker(config.verify.code, workers=config.verify.workers) as marker:
        for each in todo:
            responses, seconds = drawn[each.name]
            scores = _mark(subject.name, responses, marker)
            if settings.best_of == "likelihood" and each.drawing.total > 1:
                prompts = _prompts(subject, tokenizer, each.items)
                scores = _with_likelihood(reader, scores, responses, prompts)
            with atomic_folder(each.folder / subject.name) as temporary:
                write_records(temporary / SCORES, Score, scores)
                facts = {"asked": asked[each.name], "checkpoint": str(subject.checkpoint), "seconds": seconds}
                write_json(temporary / MODEL, facts)
    held = next((each for each in sets if each.name == HELDOUT), None)
    if held is not None and settings.quality is not None and settings.quality.problems:
        _probe(subject, held, tokenizer, reader, settings.quality, asked[HELDOUT])


def _question(subject: Subject, each: TestSet, settings: EvaluateConfig) -> str:
    """A fingerprint of all that the scores depend on; which other models are evaluated is not part of it."""
    section = configuration.to_dict(settings)
    drawing = dataclasses.asdict(each.drawing)
    asked = {key: drawing.get(key, section[key]) for key in ASKED}
    if each.drawing.seeds > 1:
        asked["seeds"] = each.drawing.seeds
    if settings.best_of != "none":
        asked["best_of"] = settings.best_of
    held = [[i.problem.id, i.problem.prompt, i.problem.answer, i.problem.tests, i.extra] for i in each.items]
    return configuration.fingerprint(asked, held, hub.revision_of(subject.checkpoint), subject.system, subject.suffix)


def _is_answered(folder: Path, asked: str) -> bool:
    # a folder appears whole (atomic_folder), so one that has this file has its scores too
    return (folder / MODEL).is_file() and json.loads((folder / MODEL).read_text())["asked"] == asked


def _mark(model: str, responses: list[Response], marker: scoring.Marker) -> list[Score]:
    """Responses with their verdicts; what was cut off or failed is undecided, whatever stands in it."""
    whole = [response for response in responses if response.completion.finish_reason == "stop"]
    checks = dict(zip(map(id, whole), marker.mark([(r.text, r.item) for r in whole]), strict=True))
    scores = []
    for response in responses:
        completion = response.completion
        check = checks.get(id(response)) or Check("undecided", None, completion.error or "truncated", "")
        scores.append(
            Score(
                model=model,
                problem_id=response.item.problem.id,
                sample=response.sample,
                response=response.text,
                output_tokens=completion.output_tokens,
                finish_reason=completion.finish_reason,
                outcome=check.outcome,
                reason=check.reason,
                extracted=check.extracted,
            )
        )
    return scores


# ---------------------------------------------------------------------------- what the JAX model reads again


class _Lazy:
    """The model that reads, loaded when it is needed first."""

    def __init__(self, subject: Subject, settings: QualityConfig | None):
        self._subject, self._settings = subject, settings or QualityConfig()
        self._reader: Reader | None = None

    def __call__(self) -> Reader:
        if self._reader is None:
            from jaxdistill.evals.reading import Reader

            self._reader = Reader(self._subject.checkpoint, self._settings.batch)
        return self._reader


def _prompts(subject: Subject, tokenizer: PreTrainedTokenizerBase, items: list[Item]) -> dict[str, list[int]]:
    found = {}
    for item in items:
        suffix = subject.suffix if item.scorer == "math" else ""
        prompt = item.problem.prompt
        found[item.problem.id] = tokenization.render_prompt(tokenizer, prompt, system=subject.system, suffix=suffix)
    return found


def _with_likelihood(
    reader: _Lazy, scores: list[Score], responses: list[Response], prompts: dict[str, list[int]]
) -> list[Score]:
    """Every response's mean logprob a token; what has no tokens is the least likely."""
    some = [i for i, response in enumerate(responses) if response.completion.output_ids]
    pairs = [(prompts[responses[i].item.problem.id], responses[i].completion.output_ids) for i in some]
    read = dict(zip(some, (reading.mean for reading in reader().read(pairs)), strict=True))
    return [dataclasses.replace(score, likelihood=read.get(i, -1e9)) for i, score in enumerate(scores)]


def _probe(
    subject: Subject,
    held: TestSet,
    tokenizer: PreTrainedTokenizerBase,
    reader: _Lazy,
    settings: QualityConfig,
    asked: str,
) -> None:
    """Writes `faithfulness.json` beside the scores, unless it is there for the same scores and settings."""
    from jaxdistill.evals import faithfulness

    folder = held.folder / subject.name
    wanted = configuration.fingerprint(asked, settings.problems, settings.seed)
    path = folder / FAITHFULNESS
    if path.is_file() and json.loads(path.read_text())["asked"] == wanted:
        return
    scores = list(read_records(folder, Score))
    prompts = _prompts(subject, tokenizer, held.items)
    found = faithfulness.probe(reader(), tokenizer, prompts, scores, limit=settings.problems, seed=settings.seed)
    write_json(path, {"asked": wanted, **found})


# -------------------------------------------------------------------------------------------------- reports


def _report(each: TestSet, subjects: list[Subject], settings: EvaluateConfig) -> dict[str, Any]:
    """The counts of one set: `title`, `problems`, `samples`, `models` and `compared`."""
    domains = {item.problem.id: item.problem.domain for item in each.items}
    models, scores = {}, {}
    for subject in subjects:
        folder = each.folder / subject.name
        scores[subject.name] = list(read_records(folder, Score))
        measured = json.loads((folder / MODEL).read_text())
        found = summary.summarise(scores[subject.name], measured["seconds"], seeds=each.drawing.seeds, domains=domains)
        models[subject.name] = found | {"checkpoint": str(subject.checkpoint)}
        if settings.quality is not None and (folder / FAITHFULNESS).is_file():
            read = json.loads((folder / FAITHFULNESS).read_text())
            models[subject.name]["faithfulness"] = {k: v for k, v in read.items() if k != "asked"}
    compared = {}
    if "student" in scores:
        compared = {name: summary.compare(scores["student"], scores[name]) for name in scores if name != "student"}
    return {
        "title": each.title,
        "problems": len(each.items),
        "samples": each.drawing.total,
        "models": models,
        "compared": compared,
    }


def _tell(each: TestSet, found: dict[str, Any]) -> None:
    if each.name != HELDOUT:
        seen = f", {found['in_training']:,} of them among the training problems" if found["in_training"] else ""
        say(f"  {each.title}: {found['problems']:,} problems{seen}")
    for line in [*summary.table(found["models"]), *summary.more_lines(found["models"])]:
        say(line)
