"""Packed rows on disk (ArrayRecord), and global batch s as a pure function of (seed, s)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from jaxdistill.data.packing import Row

FIELDS: dict[str, Any] = {"tokens": np.int32, "regions": np.uint8, "segment_ids": np.int32, "positions": np.int32}
FILE = "rows.arrayrecord"


def encode_row(row: Row) -> bytes:
    """The arrays one after the other, in the order of `FIELDS`, little-endian."""
    return b"".join(np.ascontiguousarray(row[name], dtype).tobytes() for name, dtype in FIELDS.items())


def decode_row(data: bytes) -> Row:
    """Inverse of `encode_row`; the row's length follows from the size."""
    width = sum(np.dtype(t).itemsize for t in FIELDS.values())
    length, rest = divmod(len(data), width)
    if rest:
        raise ValueError(f"a packed row of {len(data)} bytes is no multiple of {width}; another version wrote it.")
    row, at = {}, 0
    for name, dtype in FIELDS.items():
        row[name] = np.frombuffer(data, dtype, count=length, offset=at)
        at += length * np.dtype(dtype).itemsize
    return row


def write_rows(path: Path, rows: list[Row]) -> None:
    """Writes one ArrayRecord file."""
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    for row in rows:
        writer.write(encode_row(row))
    writer.close()


class Batches:
    """Global batch s of a data set, for any s, in any order, on any number of hosts."""

    def __init__(self, folder: Path, *, batch_rows: int, seed: int):
        """Raises ValueError if the folder holds no rows."""
        import grain

        source = grain.sources.ArrayRecordDataSource([str(folder / FILE)])
        if not len(source):
            raise ValueError(f"{folder}: no packed rows; were all traces rejected? See the verdicts.")
        self.rows, self.batch_rows = len(source), batch_rows
        self.row_tokens = len(decode_row(source[0])["tokens"])
        self._source = source
        # an endless list: epoch after epoch, each in its own order
        self._order = grain.MapDataset.source(np.arange(self.rows)).seed(seed).shuffle().repeat()

    def stored_row(self, row: int) -> Row:
        """Row `row` as it lies on disk, whatever the order of training."""
        return decode_row(self._source[row])

    def row_numbers(self, step: int, rows: slice = slice(None)) -> list[int]:
        """Which stored rows batch `step` has, or some of its rows."""
        first = step * self.batch_rows
        return [int(self._order[first + i]) for i in range(*rows.indices(self.batch_rows))]

    def rows_of(self, step: int, rows: slice = slice(None)) -> Row:
        """The arrays [rows, T] of batch `step`, or of some of its rows (what one host needs)."""
        wanted = [self.stored_row(row) for row in self.row_numbers(step, rows)]
        return {name: np.stack([row[name] for row in wanted]) for name in FIELDS}
