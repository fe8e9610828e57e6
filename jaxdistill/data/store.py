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

TOKENS, TOPK = "tokens.bin", "topk.bin"


class Store:
    """Examples by number. Memory grows by some hundred bytes an example, whatever its length."""

    def __init__(self, file: BinaryIO, sources: int, beside: BinaryIO):
        """
        Args:
          beside: for what is stored beside the tokens, if anything is.
        """
        self._file, self._beside = file, beside
        self.covered = 0
        """Response tokens that have a distribution of the teacher."""
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
        if chunk.topk is not None and chunk.covered is not None:
            self._beside.write(chunk.topk[np.repeat(keep, lengths)].tobytes())
            self.covered += int(chunk.covered[keep].sum())
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
        self._beside.flush()
        chunks = self._chunks
        return Examples(
            Path(self._file.name),
            Path(self._beside.name),
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
        beside: Path,
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
        size, total = beside.stat().st_size, int(self._ends[-1])
        self._topk = np.memmap(beside, np.uint8, mode="r", shape=(total, size // total)) if size else None

    def __len__(self) -> int:
        return len(self.ids)

    def example(self, i: int) -> Example:
        end = int(self._ends[i])
        where = slice(end - int(self.totals[i]), end)
        regions = np.repeat(np.array([PROMPT, THINKING, ANSWER], np.uint8), self.lengths[i])
        return Example(self.ids[i], self._tokens[where], regions, None if self._topk is None else self._topk[where])


@contextlib.contextmanager
def scratch(folder: Path, sources: int) -> Iterator[Store]:
    """A store whose files are removed at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with open(folder / TOKENS, "wb") as file, open(folder / TOPK, "wb") as beside:
            yield Store(file, sources, beside)
    finally:
        for name in (TOKENS, TOPK):
            (folder / name).unlink(missing_ok=True)
