"""The verify stage: judges every trace, and says which may be learned from.

Reads `problems` and `traces`, writes `verdicts/verdicts.parquet`, one verdict a trace, in the order of the traces.
It keeps no state of its own: after a kill it starts anew, and gives the same verdicts.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from jaxdistill import progress
from jaxdistill.config import RunConfig, VerifyConfig
from jaxdistill.records import Problem, RunDir, Verdict, read_records, write_records
from jaxdistill.verify.answers import Check
from jaxdistill.verify.code import Sandbox, check_code
from jaxdistill.verify.filters import FILTERS, Candidate, TraceText, describe, select
from jaxdistill.verify.pool import MathPool

NO_GOLD = "no gold answer"
NOT_RUN = "not run"
BATCH = 512
"""Traces that are judged at a time."""


@dataclass(frozen=True, slots=True)
class Gold:
    """What a problem's responses are held against; false if there is nothing."""

    answer: str = ""
    tests: str | None = None
    prompt: str = ""

    def __bool__(self) -> bool:
        return bool(self.answer or self.tests)


def verify(config: RunConfig, run: RunDir) -> dict[str, Any]:
    """Judges the traces of a run; returns the counts of `count_yield`.

    Raises:
      ValueError: answers are to be verified, and no problem has a gold answer, or no trace's problem is known.
    """
    gold = _read_gold(run.problems)
    if config.verify.answer and not any(gold.values()):
        raise ValueError(
            f"{run.problems}: no problem has a gold answer; name it with problems.answer_field, "
            "or set verify.answer: false."
        )
    candidates = _judge_all(run.traces, gold, config.verify)
    if config.verify.answer and candidates and not any(c.problem_id in gold for c in candidates):
        raise ValueError(f"{run.traces}: no trace belongs to a problem of {run.problems}; collect the traces again.")
    rejected = select(candidates, config.verify)
    for left in run.verdicts.glob(".verdicts.parquet.*.tmp"):  # of a process that was killed
        left.unlink(missing_ok=True)
    verdicts = (_verdict(c, reason) for c, reason in zip(candidates, rejected, strict=True))
    write_records(run.verdicts / "verdicts.parquet", Verdict, verdicts)
    counts = count_yield(candidates, rejected, gold)
    print_yield(counts, config.verify)
    return counts


def judge_without(trace: TraceText, gold: Gold | None) -> Check | None:
    """The check of a trace whose answer need not be looked at; a cut or failed response is never searched for one."""
    if trace.finish_reason == "error":
        return Check("undecided", None, "no response", "")
    if trace.finish_reason == "length":
        return Check("undecided", None, "truncated", "")
    return None if gold else Check("undecided", None, NO_GOLD, "")


def _read_gold(folder: Path) -> dict[str, Gold]:
    """Problem id -> its gold answer and tests."""
    problems = read_records(folder, Problem)
    return {problem.id: Gold((problem.answer or "").strip(), problem.tests, problem.prompt) for problem in problems}


def _judge_all(folder: Path, gold: dict[str, Gold], config: VerifyConfig) -> list[Candidate]:
    total = sum(pq.read_metadata(file).num_rows for file in folder.glob("*.parquet"))
    candidates: list[Candidate] = []
    with progress.bar("verify", total) as update, contextlib.ExitStack() as stack:
        judges = _Judges(config, stack)
        traces = iter(read_records(folder, TraceText))
        while batch := list(itertools.islice(traces, BATCH)):
            checks = judges.check([(trace, gold.get(trace.problem_id)) for trace in batch])
            candidates += map(describe, batch, checks)
            update(len(candidates), "")
    return candidates


class _Judges:
    """Checks answers and programs on several processors; what that takes is started when it is needed first."""

    def __init__(self, config: VerifyConfig, stack: contextlib.ExitStack):
        """Args: `stack` ends all that was started."""
        self._config, self._stack = config, stack
        self._workers = config.workers or len(os.sched_getaffinity(0))
        self._math: MathPool | None = None
        self._code: Callable[[str, str], Future[Check]] | None = None

    def check(self, batch: list[tuple[TraceText, Gold | None]]) -> list[Check]:
        checks: dict[int, Check] = {}
        programs: dict[int, Future[Check]] = {}
        answers: dict[int, tuple[str, str, str]] = {}
        for i, (trace, gold) in enumerate(batch):
            if (check := judge_without(trace, gold)) or gold is None:
                assert check, trace.id
                checks[i] = check
            elif not gold.tests:
                answers[i] = (trace.response, gold.answer, gold.prompt)
            elif self._config.answer:
                programs[i] = self._check_code(trace.response, gold.tests)
            else:
                checks[i] = Check("undecided", None, NOT_RUN, "")
        checks |= zip(answers, self._check_math(list(answers.values())), strict=True)
        checks |= {i: program.result() for i, program in programs.items()}
        return [checks[i] for i in range(len(batch))]

    def _check_math(self, triples: list[tuple[str, str, str]]) -> list[Check]:
        if self._math is None and triples:
            self._math = self._stack.enter_context(MathPool(self._workers))
        return self._math.check(triples) if self._math else []

    def _check_code(self, response: str, tests: str) -> Future[Check]:
        if self._code is None:
            code = self._config.code
            sandbox = self._stack.enter_context(Sandbox(workers=self._workers, isolation=code.isolation))
            pool = self._stack.enter_context(ThreadPoolExecutor(self._workers))
            self._stack.callback(pool.shutdown, cancel_futures=True)
            self._code = functools.partial(pool.submit, check_code, limits=code.limits, sandbox=sandbox)
        return self._code(response, tests)


def _verdict(candidate: Candidate, rejected_for: str | None) -> Verdict:
    return Verdict(
        trace_id=candidate.trace_id,
        problem_id=candidate.problem_id,
        outcome=candidate.check.outcome,
        reason=candidate.check.reason,
        method=candidate.check.method,
        extracted=candidate.check.extracted,
        kept=rejected_for is None,
        rejected_for=rejected_for,
    )


# -------------------------------------------------------------------------------------------- the waterfall

_STEPS = {
    "finished": ("failed", "truncated"),
    "well_formed": ("malformed",),
    "correct": ("incorrect", "undecided"),
    "unique": ("duplicate",),
    "kept": ("surplus",),
}
"""What the waterfall counts, and the filters that a trace has to pass to be counted there."""


def count_yield(candidates: list[Candidate], rejected: list[str | None], gold: dict[str, Gold]) -> dict[str, Any]:
    """Counts of a verified set.

    Returns:
      `traces`, then `finished`, `well_formed`, `correct`, `unique` and `kept`: the traces that are left after each step
      (with `verify.answer: false` no trace falls at `correct`; `outcomes` then still says what was found). `rejected`:
      filter -> traces. `outcomes`: outcome -> traces. `undecided`: reason -> traces. `unknown_problems`: traces without
      a problem. `problems`, and `problems_with_a_kept_trace`.
    """
    fell = Counter(name for name in rejected if name)
    counts: dict[str, Any] = {"traces": len(candidates)}
    left = len(candidates)
    for step, names in _STEPS.items():
        left -= sum(fell[name] for name in names)
        counts[step] = left
    checks = [candidate.check for candidate in candidates]
    kept = {c.problem_id for c, reason in zip(candidates, rejected, strict=True) if reason is None}
    return counts | {
        "rejected": {name: fell[name] for name in FILTERS if fell[name]},
        "outcomes": {o: sum(c.outcome == o for c in checks) for o in ("correct", "incorrect", "undecided")},
        "undecided": dict(Counter(c.reason for c in checks if c.outcome == "undecided").most_common()),
        "unknown_problems": sum(c.problem_id not in gold for c in candidates),
        "problems": len(gold),
        "problems_with_a_kept_trace": len(kept),
    }


def print_yield(counts: dict[str, Any], config: VerifyConfig) -> None:
    """Prints the waterfall: one line a step, with what fell at it."""
    progress.say(f"  {counts['traces']:,} traces of {counts['problems']:,} problems")
    for step, names in _STEPS.items():
        if step == "correct" and not config.answer:
            continue
        fell = ", ".join(f"{counts['rejected'][name]:,} {name}" for name in names if name in counts["rejected"])
        share = counts[step] / max(1, counts["traces"])
        progress.say(f"  {step.replace('_', ' '):<12}{counts[step]:>10,}{share:>8.1%}  {fell and '- ' + fell}".rstrip())
    progress.say(f"  problems with a kept trace: {counts['problems_with_a_kept_trace']:,}")
