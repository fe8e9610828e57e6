"""The verify stage: judges every trace, and says which may be learned from.

Reads `problems` and `traces`, writes `verdicts/verdicts.parquet`, one verdict a trace, in the order of the traces. What
was found of each trace is kept in `verdicts/cache`, so that only new traces are looked at: after a kill, when more were
drawn, or with other filters. The verdicts are byte for byte those of a run from nothing.
"""

from __future__ import annotations

import contextlib
import itertools
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxdistill.config import RunConfig, VerifyConfig
from jaxdistill.progress import say
from jaxdistill.records import CACHE, JudgeMark, Problem, RunDir, Verdict, read_records, write_records
from jaxdistill.verify import judge as judging
from jaxdistill.verify.causes import Looked, is_next_to_nothing, likeliest, worst_filter
from jaxdistill.verify.consistency import vote
from jaxdistill.verify.decontaminate import find_contaminated
from jaxdistill.verify.examine import Examiner, Gold, examine
from jaxdistill.verify.filters import UNKNOWN_DOMAIN, Candidate, Rejection, TraceText, is_formed
from jaxdistill.verify.selection import Known, Marks, pass_rates, select
from jaxdistill.verify.similarity import first_alike
from jaxdistill.verify.waterfall import count_yield, print_yield

PROBLEM_NGRAM = 3
LOOKED_AT = 200
"""Traces of which it is asked why nothing was kept."""
MARKS = "judge"
"""Folder of the judge's marks; among the verdicts' own files it would be read as verdicts."""


def verify(config: RunConfig, run: RunDir) -> dict[str, Any]:
    """Judges the traces of a run; returns the counts of `waterfall.count_yield`, and those of the other steps.

    Raises:
      ValueError: answers are to be verified, and no problem has a gold answer, or no trace's problem is known; a
        benchmark that cannot be read; a judge that cannot be asked.
    """
    settings, cache = config.verify, run.verdicts / CACHE
    gold = _read_gold(run.problems)
    if settings.answer and not settings.majority and not any(gold.values()):
        raise ValueError(
            f"{run.problems}: no problem has a gold answer; name it with problems.answer_field, "
            "set verify.majority, or set verify.answer: false."
        )
    known, more = _know_problems(gold, settings)
    candidates, found_before, where = examine(run.traces, gold, settings, cache)
    if settings.answer and candidates and not any(c.problem_id in gold for c in candidates):
        raise ValueError(f"{run.traces}: no trace belongs to a problem of {run.problems}; collect the traces again.")
    if settings.majority is not None:
        candidates = _vote(candidates, gold, settings, cache)
    if settings.judge is not None:
        marks = _judge(candidates, gold, settings, run)
        known = replace(known, marks={m.trace_id: Marks(m.faithfulness, m.coherence) for m in marks})
        more["judge"] = judging.agreement(marks, {c.trace_id: c.check.outcome for c in candidates})
    rejected = select(candidates, settings, known)
    _write(candidates, rejected, run.verdicts)
    counts = count_yield(candidates, rejected, gold)
    if found_before:
        say(f"  {found_before:,} results were known from before")
    print_yield(counts, settings)
    if any(rejection is not None for rejection in rejected):
        say(f"  what was rejected, and why: jaxdistill show {shlex.quote(config.run_dir)} --rejected 3")
    if is_next_to_nothing(counts):
        counts["cause"] = _likeliest_cause(counts, candidates, rejected, gold, config, run)
        say(f"  kept is {'nothing' if not counts['kept'] else 'next to nothing'}; likeliest cause: {counts['cause']}")
    if "judge" in more:
        judging.say_agreement(more["judge"])
    return counts | more | where


def _read_gold(folder: Path) -> dict[str, Gold]:
    """Problem id -> what its traces are held against, in the order of the problems."""
    return {
        p.id: Gold((p.answer or "").strip(), p.tests, p.prompt or "", p.domain or UNKNOWN_DOMAIN)
        for p in read_records(folder, Problem)
    }


def _know_problems(gold: dict[str, Gold], config: VerifyConfig) -> tuple[Known, dict[str, Any]]:
    """What is to be known of the problems, whatever their traces are; and counts of it."""
    counts: dict[str, Any] = {}
    contaminated, alike = {}, {}
    questions = [(name, problem.prompt) for name, problem in gold.items()]
    if config.decontaminate is not None:
        contaminated = find_contaminated(config.decontaminate, questions)
        found = {
            name: sum(match.benchmark == name for match in contaminated.values()) for name in config.decontaminate.files
        }
        counts["contaminated"] = {
            "problems": found,
            "matches": {name: str(match) for name, match in contaminated.items()},
        }
        for name, count in found.items():
            say(f"  {count:,} of {len(gold):,} problems stand in {name}")
    if config.near_duplicate_problems is not None:
        names = list(gold)
        first = first_alike([text for _, text in questions], PROBLEM_NGRAM, config.near_duplicate_problems)
        alike = {name: names[first[i]] for i, name in enumerate(names)}
    place = {name: i for i, name in enumerate(gold)}
    return Known(place=place, alike=alike, contaminated=contaminated), counts


def _vote(candidates: list[Candidate], gold: dict[str, Gold], config: VerifyConfig, cache: Path) -> list[Candidate]:
    assert config.majority is not None
    without = {name for name, problem in gold.items() if not problem}
    with contextlib.ExitStack() as stack:
        return vote(candidates, without, config.majority, Examiner(config, cache, stack).compare)


def _judge(candidates: list[Candidate], gold: dict[str, Gold], config: VerifyConfig, run: RunDir) -> list[JudgeMark]:
    assert config.judge is not None
    wanted = {c.trace_id for c in candidates if is_formed(c, config) and c.problem_id in gold}
    shown = judging.shown_traces(run.traces, wanted, lambda problem: gold[problem].prompt)
    folder = run.verdicts / MARKS
    folder.mkdir(parents=True, exist_ok=True)
    marks = judging.judge(config.judge, shown, run.verdicts / CACHE, folder / "vllm.log")
    write_records(folder / "judge.parquet", JudgeMark, marks)
    return marks


def _likeliest_cause(
    counts: dict[str, Any],
    candidates: list[Candidate],
    rejected: list[Rejection | None],
    gold: dict[str, Gold],
    config: RunConfig,
    run: RunDir,
) -> str:
    """Looks at some of the traces that fell where most did."""
    name = worst_filter(counts)
    fell = [c for c, r in zip(candidates, rejected, strict=True) if r is not None and r.name == name][:LOOKED_AT]
    wanted = {c.trace_id for c in fell}
    found = (trace for trace in read_records(run.traces, TraceText) if trace.id in wanted)
    looked = Looked(
        responses=[trace.response or "" for trace in itertools.islice(found, len(wanted))],
        extracted=[c.check.extracted for c in fell],
        gold=[gold[c.problem_id].answer if c.problem_id in gold else "" for c in fell],
    )
    return likeliest(counts, looked, config.verify, config.traces)


def _write(candidates: list[Candidate], rejected: list[Rejection | None], folder: Path) -> None:
    for left in folder.glob(".verdicts.parquet.*.tmp"):  # of a process that was killed
        left.unlink(missing_ok=True)
    rates = pass_rates(candidates)
    verdicts = (
        Verdict(
            trace_id=candidate.trace_id,
            problem_id=candidate.problem_id,
            outcome=candidate.check.outcome,
            reason=candidate.check.reason,
            method=candidate.check.method,
            extracted=candidate.check.extracted,
            kept=rejection is None,
            rejected_for=rejection.name if rejection else None,
            detail=rejection.detail if rejection else "",
            pass_rate=rates.get(candidate.problem_id),
        )
        for candidate, rejection in zip(candidates, rejected, strict=True)
    )
    write_records(folder / "verdicts.parquet", Verdict, verdicts)
