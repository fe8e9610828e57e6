"""The rows that training reads: checked, without those held out for evaluation, and read ahead of the devices."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxdistill.data.packing import Row
from jaxdistill.data.rows import FIELDS, Batches
from jaxdistill.data.topk import stored_shapes
from jaxdistill.train.gradients import Batch
from jaxdistill.train.step import PAIRS, put_batch

AHEAD = 2
"""Batches that are read while the devices work."""


class TrainRows:
    """Batch s of the rows that are trained on, as arrays of this process's part."""

    def __init__(self, batches: Batches, *, seed: int, vocabulary: int, held_out: int = 0, stored: bool = False):
        """
        Args:
          stored: whether the teacher's stored distributions come along.
          vocabulary: ids at or above it are refused.
          held_out: so many rows, drawn by the seed, are never trained on. In an epoch their places go to other rows,
            which are drawn by seed and position, so that batch s stays a pure function of (seed, s).
        Raises:
          ValueError: more rows are to be held out than half of all, or there are no stored distributions.
        """
        if stored and batches.topk is None:
            raise ValueError(
                "train.distill.source: stored, and the rows have no distributions; prepare with data.topk."
            )
        self._codec = batches.topk if stored else None
        if 2 * held_out > batches.rows:
            raise ValueError(
                f"train.evaluate.rows={held_out} would hold out more than half of {batches.rows} packed rows; lower it."
            )
        self._batches, self._seed, self._vocabulary = batches, seed, vocabulary
        drawn = np.random.default_rng([seed, 1]).permutation(batches.rows)
        self.held_out: list[int] = sorted(drawn[:held_out].tolist())
        self._held, self._others = set(self.held_out), drawn[held_out:]

    def row_numbers(self, step: int, rows: slice = slice(None)) -> list[int]:
        """Which stored rows batch `step` has, or some of its rows."""
        numbers = self._batches.row_numbers(step, rows)
        if not self._held:
            return numbers
        places = range(*rows.indices(self._batches.batch_rows))
        return [self._instead(step, place, n) for place, n in zip(places, numbers, strict=True)]

    def _instead(self, step: int, place: int, row: int) -> int:
        if row not in self._held:
            return row
        draw = np.random.default_rng([self._seed, 2, step, place]).integers(len(self._others))
        return int(self._others[draw])

    def rows_of(self, step: int, rows: slice = slice(None)) -> Row:
        """The arrays [rows, T] of batch `step`, or of some of its rows.

        Raises:
          ValueError: a token that the student has no embedding for.
        """
        return self.stored(self.row_numbers(step, rows))

    def stored(self, numbers: Sequence[int]) -> Row:
        """Some stored rows, stacked."""
        rows = [self._batches.stored_row(number) for number in numbers]
        for number, row in zip(numbers, rows, strict=True):
            least, most = int(row["tokens"].min()), int(row["tokens"].max())
            if least < 0 or most >= self._vocabulary:
                raise ValueError(
                    f"packed row {number}: token {least if least < 0 else most} is outside of the student's vocabulary "
                    f"of {self._vocabulary}; prepare the data again with the student's own tokenizer."
                )
        found = {name: np.stack([row[name] for row in rows]) for name in FIELDS}
        if self._codec is not None:
            beside = [self._codec.unpack(row["topk"]) for row in rows]
            found |= {name: np.stack([row[name] for row in beside]) for name in beside[0]}
        return found

    @property
    def topk(self) -> int | None:
        """Tokens of each stored distribution, where they come along."""
        return None if self._codec is None else self._codec.k


def read_ahead(
    rows: TrainRows,
    steps: range,
    shape: tuple[int, int],
    mesh: Mesh,
    waited: Callable[[float], Any],
    pairs: Callable[[int], Batch] | None = None,
    stored: Callable[[int], int] | None = None,
) -> Generator[tuple[int, Batch], None, None]:
    """(step, batch on the devices) for every step, read in the background; `waited` hears how late each was.

    Args:
      shape: rows and tokens of a whole batch.
      pairs: gives the batch of pairs that goes with each.
      stored: how many of a batch's rows are wanted, its first ones; all by default. Of none the batch is empty.
    """
    with ThreadPoolExecutor(1) as reader:
        beside = stored_shapes(rows.topk) if rows.topk else None

        def read(step: int) -> Future[Batch]:
            return reader.submit(whole, step)

        def whole(step: int) -> Batch:
            count = shape[0] if stored is None else stored(step)
            wanted = (count, shape[1])
            batch = put_batch(lambda part: rows.rows_of(step, part), wanted, mesh, beside) if count else {}
            return batch if pairs is None else batch | {PAIRS: pairs(step)}

        coming = deque(read(step) for step in steps[:AHEAD])
        for step in steps:
            begun = time.monotonic()
            batch = coming.popleft().result()
            waited(time.monotonic() - begun)
            if step + AHEAD in steps:
                coming.append(read(step + AHEAD))
            yield step, batch


def empty_like(row: Row, count: int) -> Row:
    """Rows of padding alone, which count for nothing."""
    return {name: np.zeros((count, *array.shape[1:]), array.dtype) for name, array in row.items()}


def in_batches(rows: Row, size: int, mesh: Mesh) -> Iterator[Batch]:
    """Given rows on the devices, `size` at a time; the last batch is filled up with padding."""
    count = len(rows["tokens"])
    filled = jax.tree.map(lambda a, b: np.concatenate([a, b]), rows, empty_like(rows, -count % size))
    for first in range(0, count, size):
        part = {name: array[first : first + size] for name, array in filled.items()}
        yield put_batch(lambda s, part=part: {k: v[s] for k, v in part.items()}, part["tokens"].shape, mesh)
