"""Traces that were not kept, for people: `jaxdistill show CONFIG --rejected 3`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from jaxdistill import control
from jaxdistill.config import RunConfig
from jaxdistill.progress import say
from jaxdistill.records import Problem, RunDir, Trace, Verdict, read_records


def show_rejected(config: RunConfig, count: int) -> None:
    """Prints the first rejected traces, one filter after the other in turns, each with what it was held against.

    Raises:
      ValueError: nothing was verified yet, or nothing was rejected.
    """
    run = RunDir(Path(config.run_dir))
    if not any(run.verdicts.glob("*.parquet")):
        raise ValueError(f"{run.verdicts}: no verdicts yet; run `verify` first.")
    chosen = {verdict.trace_id: verdict for verdict in _choose(read_records(run.verdicts, Verdict), count)}
    if not chosen:
        raise ValueError(f"{run.verdicts}: every trace was kept; there is none to show.")
    wanted = {verdict.problem_id for verdict in chosen.values()}
    problems = {problem.id: problem for problem in read_records(run.problems, Problem) if problem.id in wanted}
    for trace in read_records(run.traces, Trace):
        if trace.id in chosen:
            _show(trace, chosen[trace.id], problems.get(trace.problem_id))


def _choose(verdicts: Iterable[Verdict], count: int) -> list[Verdict]:
    """So many rejected ones: of every filter the first, then of every filter the second, and so on."""
    by_filter: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        found = by_filter.setdefault(verdict.rejected_for or "", [])
        if not verdict.kept and len(found) < count:
            found.append(verdict)
    in_turns = sorted((place, name) for name, found in by_filter.items() for place in range(len(found)))
    return [by_filter[name][place] for place, name in in_turns[:count]]


def _show(trace: Trace, verdict: Verdict, problem: Problem | None) -> None:
    detail = f": {verdict.detail}" if verdict.detail else ""
    say(f"{trace.id}: rejected for {verdict.rejected_for}{detail}")
    say(f"  {verdict.outcome}{f' ({verdict.reason})' if verdict.reason else ''}; ended by {trace.finish_reason}")
    if problem is not None:
        say(f"  gold answer: {control.clean(problem.answer or 'none')}; read from the trace: {verdict.extracted!r}")
        say(f"  question: {control.clean(problem.prompt)}")
    say(control.clean(trace.response))
    say()
