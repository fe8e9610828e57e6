"""Pairs for contrastive losses: a kept trace, and a wrong one of the same problem.

They lie in rows of their own beside the packed rows, in the same form: a pair is two segments of one row that follow
each other, the chosen one first, so that segments 1, 3, 5, ... are chosen and 2, 4, 6, ... rejected. The texts of all
pairs are held in memory.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jaxdistill import progress
from jaxdistill.config import DataConfig, PairsConfig
from jaxdistill.data import packing, rows
from jaxdistill.data.examples import Example, Text, tokenize
from jaxdistill.data.order import Group, Layout, Order
from jaxdistill.data.sources import Taken, TraceText
from jaxdistill.data.workers import Job
from jaxdistill.records import RunDir, atomic_file, read_records
from jaxdistill.tokenization import load_tokenizer

FILE = "pairs.arrayrecord"
ORIGINS = "pairs.parquet"
WRONG = "incorrect"
"""The filter that a trace fell to which is wrong, and passed all that come before: it is finished and well formed."""
NUMBER = re.compile(r"(?<![\w.])\d+(?![\w]|\.\d)")


@dataclasses.dataclass(frozen=True, slots=True)
class _Verdict:
    """The columns of a `records.Verdict` that say which traces are wrong."""

    trace_id: str
    problem_id: str
    rejected_for: str | None


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two responses to one problem."""

    chosen: Text
    rejected: Text
    source: int
    edited: bool


def match(chosen: dict[str, list[str]], wrong: dict[str, list[str]], per_problem: int) -> list[tuple[str, str]]:
    """(kept trace, wrong trace) of each problem, in order; every trace at most once.

    Args:
      chosen, wrong: problem -> its traces.
    """
    return [
        pair
        for problem, kept in chosen.items()
        for pair in list(zip(sorted(kept), sorted(wrong.get(problem, ())), strict=False))[:per_problem]
    ]


def changed(text: Text) -> Text | None:
    """The trace with one number of its reasoning changed, in all that follows too, and another final number.

    What it says is a function of the trace's id. A trace whose answer has no number, or whose reasoning repeats none,
    has no such edit.
    """
    head, closing, content = text.response.rpartition("</think>")
    last = list(NUMBER.finditer(content))
    steps = list(NUMBER.finditer(head))
    if not closing or not last or not steps:
        return None
    rng = random.Random(hashlib.blake2b(text.trace_id.encode(), digest_size=8).digest())
    # the second half: what the problem itself states stands mostly before it
    picked = rng.choice(steps[len(steps) // 2 :])
    shift = rng.choice([1, 2, 10, -1 if int(picked[0]) else 1])

    def other(found: re.Match[str]) -> str:
        return str(int(found[0]) + shift) if found[0] == picked[0] else found[0]

    edited_head = head[: picked.start()] + NUMBER.sub(other, head[picked.start() :])
    end = last[-1]
    edited = NUMBER.sub(other, content[: end.start()]) + str(int(end[0]) + shift) + content[end.end() :]
    return Text(f"{text.trace_id}#edited", text.problem, f"{edited_head}{closing}{edited}", edited.strip())


def find_pairs(settings: PairsConfig, taken: list[Taken]) -> tuple[list[Pair], dict[str, int]]:
    """The pairs of all runs, and how many problems have none, `problems_without`.

    Raises:
      ValueError: not one problem has a pair.
    """
    found: list[Pair] = []
    problems = 0
    for part in taken:
        chosen, wrong = _by_problem(part)
        problems += len(chosen)
        matched = match(chosen, wrong, settings.per_problem)
        lonely = [sorted(kept)[0] for problem, kept in chosen.items() if not wrong.get(problem)]
        wanted = {name for pair in matched for name in pair} | set(lonely if settings.edits else ())
        texts = {
            trace.id: Text(trace.id, part.problems.prompt(trace.problem_id), trace.response, trace.content)
            for trace in read_records(part.run.traces, TraceText)
            if trace.id in wanted
        }
        found += [Pair(texts[a], texts[b], part.source_of[a], edited=False) for a, b in matched]
        if settings.edits:
            edits = ((texts[name], changed(texts[name])) for name in lonely)
            found += [Pair(a, b, part.source_of[a.trace_id], edited=True) for a, b in edits if b is not None]
    if not found:
        raise ValueError(
            "data.pairs: no problem has a kept trace and a wrong one; sample more often or hotter (traces.samples, "
            "traces.temperature), or set data.pairs.edits: true."
        )
    paired = {pair.chosen.trace_id.rsplit("/", 2)[0] for pair in found}
    return found, {"problems_without": problems - len(paired)}


def _by_problem(part: Taken) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """(kept, wrong) traces of every problem, in the order of the verdicts."""
    chosen: dict[str, list[str]] = {}
    wrong: dict[str, list[str]] = {}
    for verdict in read_records(part.run.verdicts, _Verdict):
        if verdict.trace_id in part.source_of:
            chosen.setdefault(verdict.problem_id, []).append(verdict.trace_id)
        elif verdict.rejected_for == WRONG:
            wrong.setdefault(verdict.problem_id, []).append(verdict.trace_id)
    return chosen, wrong


def write_pairs(data: DataConfig, run: RunDir, taken: list[Taken], job: Job, row_tokens: int) -> dict[str, Any]:
    """Tokenizes and packs the pairs into `tokens/pairs.arrayrecord`; returns the counts.

    Raises:
      ValueError: no pairs, or one that is longer than a row, under `overlong: error`.
    """
    assert data.pairs is not None
    found, counts = find_pairs(data.pairs, taken)
    examples = _tokenized(found, job, run)
    whole = [i for i, pair in enumerate(examples) if not any(example.ends_early for example in pair)]
    if len(whole) < len(examples):
        counts["early_eos_dropped"] = len(examples) - len(whole)
        found, examples = [found[i] for i in whole], [examples[i] for i in whole]
        if not found:
            raise ValueError("data.pairs: a token that ends a response stands inside a trace of every pair.")
    if data.pairs.span == "step":
        examples = [(first_step(a, b), first_step(b, a)) for a, b in examples]
        told = [i for i, pair in enumerate(examples) if all(np.any(example.regions) for example in pair)]
        counts["without_difference"] = len(examples) - len(told)
        found, examples = [found[i] for i in told], [examples[i] for i in told]
        if not found:
            raise ValueError(
                "data.pairs: no pair's traces differ in their tokens; look at the verdicts of their problems."
            )
    sizes = np.array([len(a.tokens) + len(b.tokens) for a, b in examples])
    fits = sizes <= row_tokens
    if not fits.all() and data.overlong == "error":
        first = int(np.argmin(fits))
        raise ValueError(
            f"{examples[first][0].trace_id}: the pair has {sizes[first]} tokens > data.row_tokens={row_tokens}, and "
            "must fit into one row; raise it, or set data.overlong: drop (counted)."
        )
    if not fits.any():
        raise ValueError(f"data.pairs: all {len(found)} pairs are longer than data.row_tokens={row_tokens}; raise it.")
    left = [e for e, fit in zip(examples, fits, strict=True) if fit]
    packed = packing.best_fit(sizes[fits], row_tokens)
    with atomic_file(run.tokens / FILE) as temporary:
        filled = (packing.fill_row([e for i in row for e in left[i]], row_tokens) for row in packed)
        rows.write_rows(temporary, filled)
    _write_origins(run.tokens / ORIGINS, left, packed)
    counts |= {
        "pairs": int(fits.sum()),
        "edited": sum(pair.edited for pair, fit in zip(found, fits, strict=True) if fit),
        "overlong_dropped": int((~fits).sum()),
        "rows": len(packed),
        "tokens": int(sizes[fits].sum()),
    }
    progress.say(
        f"  {counts['pairs']:,} pairs in {len(packed):,} rows ({counts['edited']:,} of the wrong traces made by an "
        f"edit); {counts['problems_without']:,} problems have no pair"
    )
    return counts


def _tokenized(pairs: list[Pair], job: Job, run: RunDir) -> list[tuple[Example, Example]]:
    tokenizer = load_tokenizer(str(run.tokenizer))
    found: dict[int, tuple[Example, Example]] = {}
    for source, prompting in enumerate(job.promptings):
        where = [i for i, pair in enumerate(pairs) if pair.source == source]
        options: Any = {
            "response": job.response,
            "ending": prompting.ending,
            "system": prompting.system,
            "suffix": prompting.suffix,
        }
        chosen = tokenize(tokenizer, [pairs[i].chosen for i in where], **options)
        rejected = tokenize(tokenizer, [pairs[i].rejected for i in where], **options)
        found.update(zip(where, zip(chosen, rejected, strict=True), strict=True))
    return [found[i] for i in range(len(pairs))]


def first_step(example: Example, other: Example) -> Example:
    """The example with every token as prompt but those of the first step that the other one has differently: from the
    first token that differs to the end of its line (all of what follows, if that is the last one).

    What stands before is the context that both share, and what comes after follows from the step, as it should even
    where the step is wrong.

    Source: Step-DPO, Lai et al. 2024, arXiv:2406.18629, section 3.1 (there the steps are found by a judge).
    """
    tokens, others = (np.asarray(x.tokens)[np.flatnonzero(x.regions)] for x in (example, other))
    shared = min(len(tokens), len(others))
    different = np.flatnonzero(tokens[:shared] != others[:shared])
    first = int(different[0]) if len(different) else shared
    regions = np.zeros_like(np.asarray(example.regions))
    if first < len(tokens):
        begins = len(example.written) - np.asarray(example.starts)
        # the line of the token's last character: one that starts with the break before a line belongs to that line
        last = begins[first + 1] - 1 if first + 1 < len(begins) else len(example.written)
        end = example.written.find("\n", last)
        kept = len(tokens) if end < 0 else max(first + 1, int(np.searchsorted(begins, end, side="right")))
        prompt = len(example.tokens) - len(tokens)
        regions[prompt + first : prompt + kept] = np.asarray(example.regions)[prompt + first : prompt + kept]
    return dataclasses.replace(example, regions=regions)


def _write_origins(path: Path, pairs: list[tuple[Example, Example]], packed: list[list[int]]) -> None:
    """A table of which pair stands where: one line a pair."""

    def lines() -> Iterator[dict[str, Any]]:
        for row, members in enumerate(packed):
            for number, (chosen, rejected) in enumerate(pairs[i] for i in members):
                yield {
                    "row": row,
                    "pair": number,
                    "chosen": chosen.trace_id,
                    "rejected": rejected.trace_id,
                    "chosen_tokens": len(chosen.tokens),
                    "rejected_tokens": len(rejected.tokens),
                }

    with atomic_file(path) as temporary:
        pq.write_table(pa.Table.from_pylist(list(lines())), temporary, compression="zstd")


class PairRows:
    """Rows of pairs; batch s is a pure function of (seed, s), as it is for the packed rows."""

    def __init__(self, folder: Path, *, batch_rows: int, seed: int):
        """
        Raises:
          ValueError: the folder holds no pairs.
        """
        if not (folder / FILE).is_file():
            raise ValueError(f"{folder}: no pairs; prepare with data.pairs.")
        import grain

        self._source = grain.sources.ArrayRecordDataSource([str(folder / FILE)])
        self.rows, self.batch_rows = len(self._source), batch_rows
        everything = self.stored(range(self.rows))
        self.segments = int(everything["segment_ids"].max())
        """Of the fullest row; an even number."""
        self.largest_token = int(everything["tokens"].max())
        self._order = Order(Layout((Group(0, 0, 0, self.rows),)), seed)

    def row_numbers(self, step: int, rows: slice = slice(None)) -> list[int]:
        """Which stored rows batch `step` has, or some of its rows."""
        return [self._order.row_at(step * self.batch_rows + i) for i in range(*rows.indices(self.batch_rows))]

    def stored(self, numbers: Any) -> packing.Row:
        """Some stored rows, stacked."""
        found = [rows.decode_row(self._source[number]) for number in numbers]
        return {name: np.stack([row[name] for row in found]) for name in rows.FIELDS}
