"""Tokenized examples on their way into rows: token ids in a scratch file, everything else in arrays."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from jaxdistill.data.examples import ANSWER, PROMPT, THINKING, Example
from jaxdistill.data.workers import Chunk

TOKENS = "tokens.bin"


class Store:
    """Examples by number. Memory grows by some hundred bytes an example, whatever its length."""

    def __init__(self, file: BinaryIO, sources: int):
        self._file = file
        self._chunks: list[Chunk] = []
        self.overlong: Counter[int] = Counter()
        """Source -> examples that were dropped for their length."""
        self.ends_early: Counter[int] = Counter()
        """Source -> examples that were dropped for an eos inside their response."""
        self.sources = sources

    def add(self, chunk: Chunk, longest: int | None) -> None:
        """Takes the examples of a chunk, but for those over `longest` tokens or with an eos inside.

        Raises:
          OSError: no room for the tokens.
        """
        lengths = chunk.lengths.sum(1)
        over = lengths > longest if longest is not None else np.zeros(len(lengths), bool)
        early = chunk.ends_early & ~over
        for counter, where in ((self.overlong, over), (self.ends_early, early)):
            counter.update(chunk.sources[where].tolist())
        keep = ~(over | early)
        tokens = chunk.tokens[np.repeat(keep, lengths)]
        self._file.write(tokens.tobytes())
        self._chunks.append(
            Chunk(
                ids=[name for name, k in zip(chunk.ids, keep, strict=True) if k],
                sources=chunk.sources[keep],
                domains=[name for name, k in zip(chunk.domains, keep, strict=True) if k],
                pass_rates=chunk.pass_rates[keep],
                tokens=np.array([tokens.max()] if len(tokens) else [], np.int32),
                lengths=chunk.lengths[keep],
                steps=chunk.steps[keep],
                ends_early=chunk.ends_early[keep],
            )
        )

    def __len__(self) -> int:
        return sum(len(c.ids) for c in self._chunks)

    def finish(self) -> Examples:
        """Everything that was added, to be read."""
        self._file.flush()
        chunks = self._chunks
        return Examples(
            Path(self._file.name),
            ids=[name for c in chunks for name in c.ids],
            domains=[name for c in chunks for name in c.domains],
            sources=np.concatenate([c.sources for c in chunks]),
            pass_rates=np.concatenate([c.pass_rates for c in chunks]),
            lengths=np.concatenate([c.lengths for c in chunks]),
            steps=np.concatenate([c.steps for c in chunks]),
            largest_token=max(int(c.tokens.max()) for c in chunks if len(c.tokens)),
        )


class Examples:
    """N finished examples: arrays of N, and each one's tokens from the file."""

    def __init__(
        self,
        path: Path,
        *,
        ids: list[str],
        domains: list[str],
        sources: np.ndarray,
        pass_rates: np.ndarray,
        lengths: np.ndarray,
        steps: np.ndarray,
        largest_token: int,
    ):
        self.ids, self.domains, self.sources, self.pass_rates = ids, domains, sources, pass_rates
        self.lengths, self.steps, self.largest_token = lengths, steps, largest_token
        self.totals = lengths.sum(1, dtype=np.int64)
        self._ends = np.cumsum(self.totals)
        self._tokens = np.memmap(path, np.int32, mode="r")

    def __len__(self) -> int:
        return len(self.ids)

    def example(self, i: int) -> Example:
        end = int(self._ends[i])
        regions = np.repeat(np.array([PROMPT, THINKING, ANSWER], np.uint8), self.lengths[i])
        return Example(self.ids[i], self._tokens[end - int(self.totals[i]) : end], regions)


@contextlib.contextmanager
def scratch(folder: Path, sources: int) -> Iterator[Store]:
    """A store whose file is removed at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / TOKENS
    try:
        with open(path, "wb") as file:
            yield Store(file, sources)
    finally:
        path.unlink(missing_ok=True)
