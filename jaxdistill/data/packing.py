"""Packing examples into rows of one length, ahead of time.

Packing before training, not in the loader, makes batch s a pure function of (seed, s): resuming is O(1) and the number
of hosts changes nothing.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from jaxdistill.data.examples import Example

Row = dict[str, np.ndarray]


def best_fit(lengths: Sequence[int] | np.ndarray, row_tokens: int) -> list[list[int]]:
    """Best-fit-decreasing bin packing: longest first, each into the row that it fills best.

    Of rows with the same space left, the oldest is filled first. Rows are kept by their space in heaps, and the spaces
    that any row has in the bits of one integer, so an example costs microseconds however many rows are open.

    Returns:
      the rows, each a list of indices into `lengths`; deterministic, every index exactly once.
    Raises:
      ValueError: a length over `row_tokens` (nothing is ever cut).
    Source: Johnson 1973, "Near-optimal bin packing algorithms".
    """
    wanted = np.asarray(lengths, np.int64)
    rows: list[list[int]] = []
    by_space: defaultdict[int, list[int]] = defaultdict(list)
    spaces = 0  # bit n: some row has n positions left
    for index in np.argsort(-wanted, kind="stable").tolist():
        length = int(wanted[index])
        if length > row_tokens:
            raise ValueError(f"example {index} has {length} tokens > data.row_tokens={row_tokens}.")
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            row = heapq.heappop(by_space[space])
            if not by_space[space]:
                spaces ^= 1 << space
        else:
            space, row = row_tokens, len(rows)
            rows.append([])
        rows[row].append(index)
        if space > length:
            heapq.heappush(by_space[space - length], row)
            spaces |= 1 << (space - length)
    return rows


def fill_row(examples: Sequence[Example], row_tokens: int) -> Row:
    """One packed row, each array of length T: tokens, regions, segment_ids (from 1; 0 is padding), positions.

    Where the examples have distributions of a teacher, there is also `topk`, [T, width], with zeros at the padding.
    """
    row = {
        "tokens": np.zeros(row_tokens, np.int32),
        "regions": np.zeros(row_tokens, np.uint8),
        "segment_ids": np.zeros(row_tokens, np.int32),
        "positions": np.zeros(row_tokens, np.int32),
    }
    if examples and examples[0].topk is not None:
        row["topk"] = np.zeros((row_tokens, examples[0].topk.shape[1]), np.uint8)
    start = 0
    for segment, example in enumerate(examples, start=1):
        end = start + len(example.tokens)
        row["tokens"][start:end] = example.tokens
        row["regions"][start:end] = example.regions
        row["segment_ids"][start:end] = segment
        row["positions"][start:end] = np.arange(end - start)
        if example.topk is not None:
            row["topk"][start:end] = example.topk
        start = end
    return row


def unpack(row: Row) -> list[tuple[list[int], list[int]]]:
    """The (tokens, regions) of every segment of a row, in order."""
    found = []
    for segment in range(1, int(row["segment_ids"].max()) + 1):
        where = row["segment_ids"] == segment
        found.append((row["tokens"][where].tolist(), row["regions"][where].tolist()))
    return found
