"""Which responses the report shows: held-out problems side by side, and rejected traces with their reasons.

The choice is a rule, never a taste: the first problem of each pattern of outcomes, the first traces of each reason.
"""

from __future__ import annotations

import dataclasses
import itertools
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.dataset
import pyarrow.parquet as pq

from jaxdistill.records import (
    Problem,
    RunDir,
    Score,
    Trace,
    Verdict,
    read_manifest,
    read_records,
    schema_of,
    split_response,
)

LONGEST_THINKING, LONGEST_CONTENT = 6_000, 2_000
"""Characters of one response that the page shows; the middle of what is longer is left out, and the page says so."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Response:
    """One response, ready to be shown."""

    author: str
    badge: str
    """`correct`, `incorrect`, `undecided` or, for a trace, the filter that it fell to."""
    verdict: str
    """Sets the badge's colour: `correct`, `incorrect` or `undecided`."""
    reason: str
    extracted: str | None
    thinking: str | None
    closed: bool
    """False where the thinking never ended."""
    content: str
    length: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """A problem with the responses of one or more authors."""

    title: str
    note: str
    problem: str
    gold: str | None
    responses: tuple[Response, ...]


def side_by_side(run: RunDir, models: list[str], limit: int = 5) -> list[Example]:
    """Held-out problems with every model's first response, one problem a pattern of outcomes."""
    problems = {p.id: p for p in read_records(run.problems / "heldout", Problem)}
    scores: dict[str, dict[str, Score]] = {}
    for model in models:
        for score in read_records(run.evaluation / model, Score):
            if score.sample == 0:
                scores.setdefault(score.problem_id, {})[model] = score
    complete = {i: each for i, each in scores.items() if len(each) == len(models) and i in problems}
    found, shown = [], set()
    for title, fits in _patterns(models):
        ids = [i for i, each in complete.items() if fits({m: s.outcome == "correct" for m, s in each.items()})]
        fresh = [i for i in ids if i not in shown]
        if not fresh or len(found) == limit:
            continue
        shown.add(fresh[0])
        problem = problems[fresh[0]]
        found.append(
            Example(
                title=title,
                note=f"{len(ids):,} of {len(complete):,} problems",
                problem=problem.prompt,
                gold=problem.answer,
                responses=tuple(_scored(complete[problem.id][model]) for model in models),
            )
        )
    return found


def _patterns(models: list[str]) -> list[tuple[str, Callable[[dict[str, bool]], bool]]]:
    """Titles and tests on {model: is correct}, the most telling first."""
    everyone = ("All right", "None right") if len(models) > 1 else (f"{models[0]} right", f"{models[0]} wrong")
    ends: list[tuple[str, Callable[[dict[str, bool]], bool]]] = [
        (everyone[0], lambda c: all(c.values())),
        (everyone[1], lambda c: not any(c.values())),
    ]
    if "student" not in models:
        return ends
    pairs = {
        name: [
            (f"Student right, {name} wrong", lambda c, name=name: c["student"] and not c[name]),
            (f"Student wrong, {name} right", lambda c, name=name: c[name] and not c["student"]),
        ]
        for name in models
        if name != "student"
    }
    teacher, baselines = pairs.pop("teacher", []), list(pairs.values())
    near, far = itertools.chain(*baselines[:1], teacher), itertools.chain(*baselines[1:])
    return [*near, *ends, *far]


def rejected_traces(run: RunDir, per_reason: int = 2, limit: int = 8) -> list[Example]:
    """Traces that were not learned from: the first few of each filter that any fell to."""
    if read_manifest(run.traces) is None or read_manifest(run.verdicts) is None:
        return []
    chosen: dict[str, list[Verdict]] = {}
    for verdict in read_records(run.verdicts, Verdict):
        if verdict.rejected_for == "unreadable":  # there is nothing to show of a malformed record
            continue
        if not verdict.kept and len(chosen.setdefault(verdict.rejected_for or "no reason", [])) < per_reason:
            chosen[verdict.rejected_for or "no reason"].append(verdict)
    # one of every reason before a second of any
    verdicts = [each[n] for n in range(per_reason) for each in chosen.values() if n < len(each)][:limit]
    traces = _traces(run.traces, [v.trace_id for v in verdicts])
    wanted = {v.problem_id for v in verdicts}
    problems = {p.id: p for p in read_records(run.problems, Problem) if p.id in wanted}
    found = []
    for verdict in sorted(verdicts, key=lambda v: list(chosen).index(v.rejected_for or "no reason")):
        if verdict.trace_id not in traces or verdict.problem_id not in problems:
            continue
        problem, trace = problems[verdict.problem_id], traces[verdict.trace_id]
        found.append(
            Example(
                title=trace.id,
                note=f"sampled at temperature {trace.temperature:g}" if trace.output_ids else "imported",
                problem=problem.prompt,
                gold=problem.answer,
                responses=(_rejected(trace, verdict),),
            )
        )
    return found


def _traces(folder: Path, ids: list[str]) -> dict[str, Trace]:
    """The traces with these ids, without reading the others' text."""
    files = [str(file) for file in sorted(folder.glob("*.parquet"))]
    if not files or not ids:
        return {}
    columns = schema_of(Trace).names
    assert set(columns) <= set(pq.read_schema(files[0]).names), "the stage `traces` writes Trace records"
    table = pyarrow.dataset.dataset(files).to_table(columns=columns, filter=pyarrow.dataset.field("id").isin(ids))
    return {row["id"]: Trace(**row) for row in table.to_pylist()}


def _scored(score: Score) -> Response:
    return _response(
        score.response,
        author=score.model,
        badge=score.outcome,
        verdict=score.outcome,
        reason=score.reason,
        extracted=score.extracted,
        length=f"{score.output_tokens:,} tokens",
    )


def _rejected(trace: Trace, verdict: Verdict) -> Response:
    return _response(
        trace.response,
        author=trace.teacher,
        badge=verdict.rejected_for or "rejected",
        verdict="undecided" if verdict.outcome != "incorrect" else "incorrect",
        reason=_why(verdict),
        extracted=verdict.extracted,
        length=f"{len(trace.output_ids):,} tokens" if trace.output_ids else f"{len(trace.response):,} characters",
    )


def _why(verdict: Verdict) -> str:
    """What was found of the answer, and what the filter says if that is something else."""
    answer = f"answer {verdict.outcome}: {verdict.reason}" if verdict.reason else f"answer {verdict.outcome}"
    return f"{answer}; {verdict.detail}" if verdict.detail not in ("", verdict.reason) else answer


def _response(text: str, **rest: Any) -> Response:
    thinking, content = split_response(text)
    closed = thinking is not None
    if not closed and "<think>" in text:
        thinking, content = text.partition("<think>")[2].strip("\n"), ""
    return Response(
        thinking=None if thinking is None else clip(textwrap.dedent(thinking), LONGEST_THINKING),
        closed=closed,
        content=clip(content, LONGEST_CONTENT),
        **rest,
    )


def clip(text: str, longest: int) -> str:
    """The text with its middle left out if it is longer than `longest` characters."""
    if len(text) <= longest:
        return text
    head, tail = longest * 3 // 4, longest // 4
    return f"{text[:head]}\n\n[… {len(text) - head - tail:,} characters left out …]\n\n{text[-tail:]}"
