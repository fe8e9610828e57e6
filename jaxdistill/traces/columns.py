"""Rows of tables that lie column by column: Parquet, Arrow streams, and Arrow files (which Feather is, too)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jaxdistill.traces.values import BadRow, missing_column

BATCH = 256
"""Rows held as Python values at once: long traces are large."""


def rows(
    path: Path, name: str, kind: str, wanted: Collection[str], needed: Collection[str]
) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    """Every row with its number from 1; of its columns those that are wanted.

    Raises:
      ValueError: a needed column is not there.
      pyarrow.ArrowException, OSError: damaged, or not of that kind.
    """
    with contextlib.ExitStack() as open_now:
        schema, batches = READERS[kind](path, open_now)
        if missing := missing_column(needed, schema.names):
            raise ValueError(f"{name}: {missing[0]}; it has {', '.join(schema.names) or 'none'}{missing[1]}.")
        chosen = [column for column in schema.names if column in wanted] or schema.names
        number = 0
        for batch in batches(chosen):
            for start in range(0, batch.num_rows, BATCH):
                for row in _python(batch.slice(start, BATCH)):
                    number += 1
                    yield number, row


def _python(batch: pa.RecordBatch) -> list[dict[str, Any] | BadRow]:
    """The rows as Python values; where one cannot be had, the others still can."""
    names = batch.schema.names
    values = [_shortest(column) for column in batch.columns]
    with contextlib.suppress(ValueError, OverflowError, pa.ArrowException):  # UTF-8 that is none is a ValueError
        lists = [column.to_pylist() for column in values]
        return [dict(zip(names, row, strict=True)) for row in zip(*lists, strict=True)]
    return [_one(names, values, i) for i in range(batch.num_rows)]


def _one(names: list[str], values: list[pa.Array], i: int) -> dict[str, Any] | BadRow:
    row = {}
    for name, column in zip(names, values, strict=True):
        try:
            row[name] = column[i].as_py()
        except (ValueError, OverflowError, pa.ArrowException) as error:
            return BadRow(f"column {name!r} holds a value that cannot be read", f" ({' '.join(str(error).split())})")
    return row


def _shortest(column: pa.Array) -> pa.Array:
    """0.1 in half or single precision is 0.1, and not the 0.10000000149011612 that doubles make of it."""
    if pa.types.is_float16(column.type):
        values = (None if value is None else float(str(np.float16(value))) for value in column.to_pylist())
        return pa.array(values, pa.float64())
    if pa.types.is_float32(column.type):
        return pc.cast(pc.cast(column, pa.string()), pa.float64())
    return column


# Each gives the schema, and a function from names of columns to batches of them.
Opened = tuple[pa.Schema, Callable[[list[str]], Iterator[pa.RecordBatch]]]


def _parquet(path: Path, open_now: contextlib.ExitStack) -> Opened:
    file = open_now.enter_context(pq.ParquetFile(path))
    return file.schema_arrow, lambda names: file.iter_batches(batch_size=BATCH, columns=names)


def _arrow_stream(path: Path, open_now: contextlib.ExitStack) -> Opened:
    """What `datasets` keeps."""
    stream = open_now.enter_context(pa.ipc.open_stream(open_now.enter_context(pa.memory_map(str(path)))))
    return stream.schema, lambda names: (batch.select(names) for batch in stream)


def _arrow_file(path: Path, open_now: contextlib.ExitStack) -> Opened:
    file = open_now.enter_context(pa.ipc.open_file(open_now.enter_context(pa.memory_map(str(path)))))
    count = file.num_record_batches
    return file.schema, lambda names: (file.get_batch(i).select(names) for i in range(count))


READERS: dict[str, Callable[[Path, contextlib.ExitStack], Opened]] = {
    "parquet": _parquet,
    "arrow stream": _arrow_stream,
    "arrow file": _arrow_file,
}
