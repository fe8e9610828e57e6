"""Packing examples into rows of one length, ahead of time.

Packing before training, not in the loader, makes batch s a pure function of (seed, s): resuming is O(1) and the number
of hosts changes nothing.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np

from jaxdistill.data.examples import Example

Row = dict[str, np.ndarray]


def best_fit(lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Best-fit-decreasing bin packing: longest first, each into the row that it fills best.

    Returns:
      the rows, each a list of indices into `lengths`; deterministic, every index exactly once.
    Raises:
      ValueError: a length over `row_tokens` (nothing is ever cut).
    """
    rows: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # (space left, row), sorted
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        if length > row_tokens:
            raise ValueError(f"example {index} has {length} tokens > data.row_tokens={row_tokens}.")
        at = bisect.bisect_left(spaces, (length, -1))
        if at == len(spaces):
            space, row = row_tokens, len(rows)
            rows.append([])
        else:
            space, row = spaces.pop(at)
        rows[row].append(index)
        if space > length:
            bisect.insort(spaces, (space - length, row))
    return rows


def fill_row(examples: Sequence[Example], row_tokens: int) -> Row:
    """One packed row, each array of length T: tokens, regions, segment_ids (from 1; 0 is padding), positions."""
    row = {
        "tokens": np.zeros(row_tokens, np.int32),
        "regions": np.zeros(row_tokens, np.uint8),
        "segment_ids": np.zeros(row_tokens, np.int32),
        "positions": np.zeros(row_tokens, np.int32),
    }
    start = 0
    for segment, example in enumerate(examples, start=1):
        end = start + len(example.tokens)
        row["tokens"][start:end] = example.tokens
        row["regions"][start:end] = example.regions
        row["segment_ids"][start:end] = segment
        row["positions"][start:end] = np.arange(end - start)
        start = end
    return row


def unpack(row: Row) -> list[tuple[list[int], list[int]]]:
    """The (tokens, regions) of every segment of a row, in order."""
    found = []
    for segment in range(1, int(row["segment_ids"].max()) + 1):
        where = row["segment_ids"] == segment
        found.append((row["tokens"][where].tolist(), row["regions"][where].tolist()))
    return found
