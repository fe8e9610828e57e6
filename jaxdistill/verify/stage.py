"""The verify stage: judges every trace, and says which may be learned from.

Reads `problems` and `traces`, writes `verdicts/verdicts.parquet`, one verdict a trace, in the order of the traces.
It keeps no state of its own: after a kill it starts anew, and gives the same verdicts.
"""

from __future__ import annotations

import contextlib
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
from jaxdistill.verify.answers import Check, check_math
from jaxdistill.verify.code import Sandbox, check_code
from jaxdistill.verify.filters import FILTERS, Candidate, TraceText, describe, select

NO_GOLD = "no gold answer"
NOT_RUN = "not run"
BATCH = 256
"""Traces that are judged at a time."""


@dataclass(frozen=True, slots=True)
class Gold:
    """What a problem's responses are held against; false if there is nothing."""

    answer: str = ""
    tests: str | None = None

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


CheckCode = Callable[[str, str], "Future[Check]"]
"""Judges a response by tests, in its own time."""


def judge(trace: TraceText, gold: Gold | None, check_code: CheckCode | None = None) -> Check | Future[Check]:
    """The check of one trace's answer or program; a cut or failed response is never searched for one.

    Args:
      check_code: what runs programs; without it they are not run.
    """
    if trace.finish_reason == "error":
        return Check("undecided", None, "no response", "")
    if trace.finish_reason == "length":
        return Check("undecided", None, "truncated", "")
    if not gold:
        return Check("undecided", None, NO_GOLD, "")
    if gold.tests:
        return check_code(trace.response, gold.tests) if check_code else Check("undecided", None, NOT_RUN, "")
    return check_math(trace.response, gold.answer)


def _read_gold(folder: Path) -> dict[str, Gold]:
    """Problem id -> its gold answer and tests."""
    problems = read_records(folder, Problem)
    return {problem.id: Gold((problem.answer or "").strip(), problem.tests) for problem in problems}


def _judge_all(folder: Path, gold: dict[str, Gold], config: VerifyConfig) -> list[Candidate]:
    total = sum(pq.read_metadata(file).num_rows for file in folder.glob("*.parquet"))
    candidates: list[Candidate] = []
    has_code = config.answer and any(one.tests for one in gold.values())
    with progress.bar("verify", total) as update, contextlib.ExitStack() as stack:
        check_code = _code_checker(config, stack) if has_code and total else None
        traces = iter(read_records(folder, TraceText))
        while batch := list(itertools.islice(traces, BATCH)):
            found = [judge(trace, gold.get(trace.problem_id), check_code) for trace in batch]
            checks = [check if isinstance(check, Check) else check.result() for check in found]
            candidates += map(describe, batch, checks)
            update(len(candidates), "")
    return candidates


def _code_checker(config: VerifyConfig, stack: contextlib.ExitStack) -> CheckCode:
    """Starts the sandbox and as many threads as it runs programs at a time; `stack` ends them."""
    workers = config.code.workers or len(os.sched_getaffinity(0))
    sandbox = stack.enter_context(Sandbox(workers=workers, isolation=config.code.isolation))
    pool = stack.enter_context(ThreadPoolExecutor(workers))
    stack.callback(pool.shutdown, cancel_futures=True)
    return lambda response, tests: pool.submit(check_code, response, tests, limits=config.code.limits, sandbox=sandbox)


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
