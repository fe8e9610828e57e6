"""Rationalization: a problem is asked with its answer as a hint, and the trace learned from as if there had been none.

Source: Zelikman et al. 2022, arXiv:2203.14465, section 3.2. That a trace must not show its hint is our addition.
"""

from __future__ import annotations

import dataclasses
import re

from jaxdistill.config import StarConfig, fingerprint
from jaxdistill.records import (
    Problem,
    RunDir,
    Trace,
    Verdict,
    atomic_folder,
    read_manifest,
    read_records,
    write_manifest,
    write_records,
)

STYLE = "rationalized"
REJECTED = "shows_hint"
"""The `rejected_for` of a trace that is right and shows its hint."""
COPIED = 5
"""Words in a row that a trace may not have from the hint."""
TALKS = re.compile(
    r"\bhints?\b|\banswer key\b|\bgold answer\b"
    r"|\b(?:given|provided|known|expected) (?:final )?answer\b"
    r"|\b(?:told|know|given) (?:us )?(?:that )?the (?:final )?answer\b"
    r"|\bsince the (?:final )?answer (?:is|must be|should be)\b|\bto match the (?:final )?answer\b",
    re.IGNORECASE,
)
WORD = re.compile(r"\w+")


def hinted(problem: Problem, hint: str) -> str:
    """The question with its answer in it."""
    assert problem.answer is not None
    return hint.replace("{answer}", problem.answer).replace("{problem}", problem.prompt)


def shows_hint(trace: Trace, problem: Problem, hint: str) -> str | None:
    """Why a trace that was sampled with a hint would teach something of it; None if it would not.

    It talks of a hint or of a known answer, it repeats the hint's words, or it has the answer in its first step where
    the problem does not state that number. A short word of the problem's own is no sign of a hint.
    """
    assert problem.answer is not None
    talks = TALKS.search(trace.response)
    if talks and talks[0].lower() not in problem.prompt.lower():
        return f"says {talks[0]!r}"
    copied = _word_runs(hinted(problem, hint).replace(problem.prompt, " ")) & _word_runs(trace.response)
    copied -= _word_runs(problem.prompt)
    if copied:
        return f"repeats {' '.join(min(copied))!r}"
    steps = [line for line in (trace.thinking or "").splitlines() if line.strip()]
    answer = problem.answer.strip()
    if len(steps) > 1 and answer and _stands_in(answer, steps[0]) and not _stands_in(answer, problem.prompt):
        return "begins with the answer"
    return None


def _word_runs(text: str) -> set[tuple[str, ...]]:
    words = WORD.findall(text.lower())
    return {tuple(words[i : i + COPIED]) for i in range(len(words) - COPIED + 1)}


def _stands_in(answer: str, text: str) -> bool:
    return re.search(rf"(?<![\w.]){re.escape(answer)}(?!\w|\.\d)", text) is not None


def write_rationalized(star: StarConfig, problems: list[Problem], asked: RunDir, target: RunDir) -> dict[str, int]:
    """Makes a run folder of what was answered with hints: the problems without them, and verdicts on what they show.

    Args:
      problems: as they are without hints.
      asked: the run whose problems hold the hints, verified.
    Returns:
      counts: `traces`, `correct` (kept by the verifier), `shows_hint`, `kept`.
    """
    before = read_manifest(asked.verdicts)
    assert before is not None
    source = {"verify": fingerprint(before["config_hash"], before["inputs"])}
    settings = {"hint": star.hint, "talks": TALKS.pattern, "copied": COPIED}
    manifest = read_manifest(target.verdicts)
    if manifest is not None and (manifest["config"], manifest["inputs"]) == (settings, source):
        return manifest["counts"]
    by_id = {problem.id: problem for problem in problems}
    traces = {trace.id: trace for trace in read_records(asked.traces, Trace)}
    verdicts, renamed = [], []
    for verdict in read_records(asked.verdicts, Verdict):
        trace, problem = traces[verdict.trace_id], by_id[verdict.problem_id]
        name = f"{problem.id}/{STYLE}/{trace.sample}" if trace.style == "plain" else f"{trace.id}/{STYLE}"
        shown = shows_hint(trace, problem, star.hint) if verdict.kept else None
        renamed.append(dataclasses.replace(trace, id=name, style=STYLE))
        change = {"kept": False, "rejected_for": REJECTED, "detail": shown} if shown else {}
        verdicts.append(dataclasses.replace(verdict, trace_id=name, **change))
    counts = {
        "traces": len(verdicts),
        "correct": sum(v.kept or v.rejected_for == REJECTED for v in verdicts),
        REJECTED: sum(v.rejected_for == REJECTED for v in verdicts),
        "kept": sum(v.kept for v in verdicts),
    }
    with atomic_folder(target.root) as folder:
        made = RunDir(folder)
        write_records(made.problems / "problems.parquet", Problem, by_id.values())
        write_records(made.traces / "traces.parquet", Trace, renamed)
        write_records(made.verdicts / "verdicts.parquet", Verdict, verdicts)
        write_manifest(
            made.verdicts,
            stage="verify",
            config=settings,
            config_hash=fingerprint(settings),
            inputs=source,
            counts=counts,
        )
    return counts
