"""Packed rows on disk (ArrayRecord), and global batch s as a pure function of (seed, s)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from jaxdistill.data.order import Group, Layout, Order
from jaxdistill.data.packing import Row
from jaxdistill.data.topk import FILE as TOPK
from jaxdistill.data.topk import TopK

FIELDS: dict[str, Any] = {"tokens": np.int32, "regions": np.uint8, "segment_ids": np.int32, "positions": np.int32}
FILE = "rows.arrayrecord"
ORDER = "order.json"
"""The `Layout` of the rows; without it they are one group."""


def encode_row(row: Row) -> bytes:
    """The arrays one after the other, in the order of `FIELDS`, little-endian, then `topk` if it is there."""
    arrays = b"".join(np.ascontiguousarray(row[name], dtype).tobytes() for name, dtype in FIELDS.items())
    return arrays + (row["topk"].tobytes() if "topk" in row else b"")


def decode_row(data: bytes, topk: int = 0) -> Row:
    """Inverse of `encode_row`; the row's length follows from the size.

    Args:
      topk: bytes that the teacher's distribution takes beside each token; 0 if there is none.
    """
    width = sum(np.dtype(t).itemsize for t in FIELDS.values()) + topk
    length, rest = divmod(len(data), width)
    if rest:
        raise ValueError(f"a packed row of {len(data)} bytes is no multiple of {width}; another version wrote it.")
    row, at = {}, 0
    for name, dtype in FIELDS.items():
        row[name] = np.frombuffer(data, dtype, count=length, offset=at)
        at += length * np.dtype(dtype).itemsize
    if topk:
        row["topk"] = np.frombuffer(data, np.uint8, offset=at).reshape(length, topk)
    return row


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Writes one ArrayRecord file, one row after the other."""
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    for row in rows:
        writer.write(encode_row(row))
    writer.close()


class Batches:
    """Global batch s of a data set, for any s, in any order, on any number of hosts; see `order` for which rows."""

    def __init__(self, folder: Path, *, batch_rows: int, seed: int):
        """
        Args:
          folder: with what `prepare` wrote.
          batch_rows: rows of a global batch, over all hosts.
        Raises:
          ValueError: the folder holds no rows, or another number of them than `order.json` says.
        """
        import grain

        source = grain.sources.ArrayRecordDataSource([str(folder / FILE)])
        if not len(source):
            raise ValueError(f"{folder}: no packed rows; were all traces rejected? See the verdicts.")
        self.rows, self.batch_rows = len(source), batch_rows
        self.topk: TopK | None = None
        """How the teacher's distributions lie beside the tokens, if they do."""
        self.topk_origin: dict[str, Any] = {}
        if (folder / TOPK).is_file():
            found = json.loads((folder / TOPK).read_text())
            self.topk, self.topk_origin = TopK.from_dict(found["codec"]), found
        self._width = self.topk.width if self.topk else 0
        self.row_tokens = len(decode_row(source[0], self._width)["tokens"])
        self.layout = Layout((Group(0, 0, 0, self.rows),))
        if (folder / ORDER).is_file():
            self.layout = Layout.from_dict(json.loads((folder / ORDER).read_text()))
        if self.layout.rows != self.rows:
            raise ValueError(f"{folder}: {self.rows} rows, and {ORDER} tells of {self.layout.rows}; prepare again.")
        self.order = Order(self.layout, seed)
        self._source = source

    def stored_row(self, row: int) -> Row:
        """Row `row` as it lies on disk, whatever the order of training."""
        return decode_row(self._source[row], self._width)

    def row_numbers(self, step: int, rows: slice = slice(None)) -> list[int]:
        """Which stored rows batch `step` has, or some of its rows."""
        first = step * self.batch_rows
        return [self.order.row_at(first + i) for i in range(*rows.indices(self.batch_rows))]

    def rows_of(self, step: int, rows: slice = slice(None)) -> Row:
        """The arrays [rows, T] of batch `step`, or of some of its rows (what one host needs)."""
        wanted = [self.stored_row(row) for row in self.row_numbers(step, rows)]
        return {name: np.stack([row[name] for row in wanted]) for name in FIELDS}
