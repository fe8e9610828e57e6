"""Which verdicts make a trace worth learning from (`data.take`), and what becomes of its thinking (`data.edit`)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq

from jaxdistill import edits
from jaxdistill.config import EditConfig, TakeConfig
from jaxdistill.records import RunDir, read_records, split_response

DONORS = 256
"""Traces whose steps `inserted_steps` draws from."""
ANSWER_FILTERS = ("incorrect", "undecided")
"""What a trace fell to that passed every filter but that of its answer."""


@dataclass(frozen=True, slots=True)
class VerdictText:
    """The columns of a `records.Verdict` that say what is taken."""

    trace_id: str
    problem_id: str
    outcome: str
    kept: bool
    rejected_for: str | None


@dataclass(frozen=True, slots=True)
class _Response:
    """The columns of a `records.Trace` that donors are made from."""

    id: str
    response: str


def wants(verdict: VerdictText, take: TakeConfig) -> bool:
    """Whether a trace may be learned from, by its verdict alone."""
    if take.verdicts == "incorrect":
        return verdict.rejected_for == "incorrect"
    return verdict.kept or (take.verdicts == "unverified" and verdict.rejected_for in ANSWER_FILTERS)


def limited(run: RunDir, take: TakeConfig, verdicts: Iterable[VerdictText]) -> set[str] | None:
    """The ids that are left by `per_problem` and `length`; None if neither is set.

    Raises:
      ValueError: `length` picks among the traces of a problem, and every problem has one.
    """
    if take.per_problem is None and take.length == "any":
        return None
    of_problem: dict[str, list[str]] = {}
    for verdict in verdicts:
        if wants(verdict, take):
            of_problem.setdefault(verdict.problem_id, []).append(verdict.trace_id)
    if take.length != "any":
        several = {problem: ids for problem, ids in of_problem.items() if len(ids) > 1}
        if not several:
            raise ValueError(f"data.take.length: {take.length} picks among several traces, and no problem has two.")
        lengths = _lengths(run.traces)
        pick = min if take.length == "shortest" else max
        # problems with one trace would dilute the difference between the two lengths
        return {pick(ids, key=lambda name: (lengths[name], name)) for ids in several.values()}
    return {
        name for ids in of_problem.values() for name in sorted(ids, key=_sample_number)[: take.per_problem or len(ids)]
    }


def _sample_number(trace_id: str) -> tuple[int, str]:
    """A trace's id ends with its sample number."""
    number = trace_id.rpartition("/")[2]
    return (int(number) if number.isdecimal() else 0, trace_id)


def _lengths(folder: Path) -> dict[str, int]:
    """Trace -> characters of its response, without holding the texts."""
    found: dict[str, int] = {}
    for file in sorted(folder.glob("*.parquet")):
        for batch in pq.ParquetFile(file).iter_batches(columns=["id", "response"]):
            sizes = pc.utf8_length(batch["response"]).to_pylist()
            found |= zip(batch["id"].to_pylist(), sizes, strict=True)
    return found


# ---------------------------------------------------------------------------------------------------- edits


def donors(parts: Iterable[tuple[Path, Collection[str]]], edit: EditConfig | None) -> list[tuple[str, str]]:
    """(trace, step) of the first traces, in their order, for `inserted_steps`; nothing for other edits."""
    if edit is None or edit.kind != "inserted_steps":
        return []
    found = []
    traces = 0
    for name, response in _responses(parts):
        thinking, _ = split_response(response)
        if thinking:
            found += [(name, step) for step in edits.split_steps(thinking)[0] if step.strip()]
            traces += 1
        if traces == DONORS:
            break
    return found


def _responses(parts: Iterable[tuple[Path, Collection[str]]]) -> Iterator[tuple[str, str]]:
    for folder, wanted in parts:
        for trace in read_records(folder, _Response):
            if trace.id in wanted:
                yield trace.id, trace.response


def edited(
    name: str, response: str, content: str, edit: EditConfig | None, steps: list[tuple[str, str]]
) -> tuple[str, str]:
    """(response, content) as they are learned from. A trace never gets steps of its own inserted."""
    if edit is None:
        return response, content
    changed = edits.apply(
        response,
        edit.kind,
        key=name,
        rate=edit.rate,
        keep_length=edit.keep_length,
        donors=[step for donor, step in steps if donor != name],
        seed=edit.seed,
    )
    return changed, split_response(changed)[1]
