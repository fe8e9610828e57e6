"""The stage `prepare`: kept traces -> packed rows of tokens."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jaxdistill import hub, progress
from jaxdistill.config import RunConfig
from jaxdistill.data import packing, rows
from jaxdistill.data.examples import ANSWER, THINKING, Example, tokenize
from jaxdistill.records import Problem, RunDir, Trace, Verdict, atomic_file, atomic_folder, read_records
from jaxdistill.tokenization import load_tokenizer

CHUNK = 1000
"""Traces tokenized at once."""


def prepare(config: RunConfig, run: RunDir, shared: RunDir) -> dict[str, Any]:
    """Tokenizes and packs every kept trace.

    Args:
      run: where tokens are written: the run's own folder, or a baseline's.
      shared: the run's folder, with problems, traces and verdicts.
    Returns:
      counts: examples, rows, tokens, trained tokens, packing efficiency, what was dropped.
    Raises:
      ValueError: nothing kept, or an overlong example under `overlong: error`.
    """
    prepare_tokenizer(config, run, shared)
    tokenizer = load_tokenizer(str(run.tokenizer))
    kept = {v.trace_id for v in read_records(shared.verdicts, Verdict) if v.kept}
    if not kept:
        raise ValueError(
            f"{shared.verdicts}: not one trace was kept, so there is nothing to train on; the verdicts say why."
        )
    problems = {p.id: p for p in read_records(shared.problems, Problem)}
    examples, overlong = [], 0
    pairs = ((problems[t.problem_id], t) for t in read_records(shared.traces, Trace) if t.id in kept)
    with progress.bar("tokenize", len(kept)) as update:
        while chunk := list(itertools.islice(pairs, CHUNK)):
            for example in tokenize(
                tokenizer, chunk, response=config.data.response, system=config.data.system, suffix=config.data.suffix
            ):
                if len(example.tokens) <= config.data.row_tokens:
                    examples.append(example)
                elif config.data.overlong == "drop":
                    overlong += 1
                else:
                    raise ValueError(
                        f"{example.trace_id}: {len(example.tokens)} tokens > data.row_tokens={config.data.row_tokens}; "
                        "raise it, or set data.overlong: drop."
                    )
            update(len(examples) + overlong, "")
    if not examples:
        raise ValueError(
            f"all {overlong} kept traces are longer than data.row_tokens={config.data.row_tokens}; raise it."
        )
    counts = _write(run.tokens, examples, config.data.row_tokens) | {"overlong_dropped": overlong}
    progress.say(
        f"  {counts['examples']:,} examples in {counts['rows']:,} rows of {config.data.row_tokens}: "
        f"{counts['packing_efficiency']:.1%} of the positions are real, {counts['trained_share']:.1%} of those trained"
        + (f"; {overlong:,} overlong dropped" if overlong else "")
    )
    return counts


def prepare_tokenizer(config: RunConfig, run: RunDir, shared: RunDir) -> None:
    """Puts the student's tokenizer into the run folder, so that every later stage uses the very same one."""
    start = config.student.init
    if start is not None and hub.is_checkpoints(start):  # of another run, whose tokenizer lies beside them
        start = str(Path(start).parent / "tokenizer")
    name = config.student.tokenizer or start or config.traces.teacher
    if name is None:
        raise ValueError(
            "student.tokenizer is missing; name a folder or repository id, or `train` to make one from the traces."
        )
    with atomic_folder(run.tokenizer) as folder:
        if name == "train":
            from jaxdistill.data.tokenizer import train_tokenizer

            train_tokenizer(folder, _texts(shared), config.student.tokenizer_vocab)
            return
        source = hub.fetch(name, config.student.revision if name == config.student.init else None, weights=False)
        for file in sorted(source.iterdir()):
            if file.suffix in (".jinja", ".txt", ".model") or file.name in (
                "tokenizer.json",
                "tokenizer_config.json",
                "special_tokens_map.json",
            ):
                shutil.copyfile(file, folder / file.name)


def _texts(shared: RunDir) -> list[str]:
    """The text that a new tokenizer learns from: problems and kept traces."""
    kept = {v.trace_id for v in read_records(shared.verdicts, Verdict) if v.kept}
    texts = [p.prompt for p in read_records(shared.problems, Problem)]
    return texts + [t.response for t in read_records(shared.traces, Trace) if t.id in kept]


def _write(folder: Path, examples: list[Example], row_tokens: int) -> dict[str, Any]:
    """Writes rows and their origins; returns the counts."""
    packed = packing.best_fit([len(e.tokens) for e in examples], row_tokens)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / rows.FILE) as temporary:
        rows.write_rows(temporary, [packing.fill_row([examples[i] for i in row], row_tokens) for row in packed])
    origins = {"row": [], "segment": [], "trace_id": [], "tokens": []}
    for r, row in enumerate(packed):
        for segment, i in enumerate(row, start=1):
            for name, value in zip(origins, (r, segment, examples[i].trace_id, len(examples[i].tokens)), strict=True):
                origins[name].append(value)
    with atomic_file(folder / "origins.parquet") as temporary:
        pq.write_table(pa.table(origins), temporary, compression="zstd")
    lengths = np.array([len(e.tokens) for e in examples])
    thinking = sum(e.regions.count(THINKING) for e in examples)
    answer = sum(e.regions.count(ANSWER) for e in examples)
    return {
        "examples": len(examples),
        "rows": len(packed),
        "tokens": int(lengths.sum()),
        "thinking_tokens": thinking,
        "answer_tokens": answer,
        "packing_efficiency": float(lengths.sum() / (len(packed) * row_tokens)),
        "trained_share": float((thinking + answer) / lengths.sum()),
        "length_histogram": json.loads(json.dumps(dict(zip(*_histogram(lengths), strict=True)))),
    }


def _histogram(lengths: np.ndarray, bins: int = 20) -> tuple[list[str], list[int]]:
    counts, edges = np.histogram(lengths, bins=bins)
    return [f"{int(a)}-{int(b)}" for a, b in itertools.pairwise(edges)], [int(c) for c in counts]
