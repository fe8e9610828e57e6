"""Which stored row stands at which position of the training: mixtures and curricula as pure functions of the position.

The training reads an endless list of rows; global batch s is its positions `s * batch_rows` to `(s + 1) * batch_rows`.
No row is dropped or padded at an epoch's end: a batch may hold the last rows of one epoch and the first of the next.

- Without a mixture, each epoch is every row once, in an order of its own (Grain's shuffle by (seed, epoch)).
- With weights, an epoch has as many positions as there are rows. Each source gets its share of them, to the row, evenly
  spread, and goes through its rows epoch by epoch of its own: none comes again before all of its source were there.
- With a curriculum, the phases come first, one after the other, each like the above on its own rows; then everything,
  without phases. One pass without `cumulative` is so exactly the first epoch, sorted ("SortaGrad", Amodei et al. 2015,
  arXiv:1512.02595; "one pass" and, cumulative, "baby steps", Cirik et al. 2016, arXiv:1611.06204).
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Group:
    """Rows that lie one behind the other on disk: of one source, and of one phase."""

    source: int
    phase: int
    first: int
    rows: int


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the stored rows are to be gone through; `order.json` beside them."""

    groups: tuple[Group, ...]
    sources: tuple[str, ...] = ("all",)
    weights: tuple[float, ...] | None = None
    """One a source; None: each source has the share of its rows."""
    passes: tuple[int, ...] = ()
    """One a phase; empty without a curriculum."""
    cumulative: bool = False

    @property
    def rows(self) -> int:
        return sum(group.rows for group in self.groups)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Layout:
        return cls(
            groups=tuple(Group(**group) for group in data["groups"]),
            sources=tuple(data["sources"]),
            weights=None if data["weights"] is None else tuple(data["weights"]),
            passes=tuple(data["passes"]),
            cumulative=data["cumulative"],
        )


def shares_of(sizes: Sequence[int], weights: Sequence[float] | None) -> list[int]:
    """How many of the `sum(sizes)` positions of an epoch each source gets.

    Returns:
      the sizes themselves without weights; else whole numbers next to the weights' shares (largest remainders), of the
      same sum, and at least 1 for every source that has a row, so that no small weight is rounded to nothing.
    """
    if weights is None:
        return list(sizes)
    total = sum(sizes)
    held = [w if n else 0.0 for n, w in zip(sizes, weights, strict=True)]
    exact = [total * w / sum(held) for w in held]
    counts = [max(int(x), 1 if n else 0) for x, n in zip(exact, sizes, strict=True)]
    while sum(counts) != total:
        step = 1 if sum(counts) < total else -1
        able = [i for i, n in enumerate(sizes) if n and (step > 0 or counts[i] > 1)]
        counts[max(able, key=lambda i: (step * (exact[i] - counts[i]), -i))] += step
    return counts


def spread(counts: Sequence[int]) -> np.ndarray:
    """Every source's number, as often as `counts` says, spread evenly: the j-th of n stands about at (j + 1/2) / n."""
    sources = np.repeat(np.arange(len(counts)), counts)
    where = np.concatenate([(np.arange(n) + 0.5) / max(n, 1) for n in counts])
    return sources[np.lexsort((sources, where))]


class Block:
    """A part of the training: so many passes over its pools, or endlessly many."""

    def __init__(self, pools: Sequence[np.ndarray], weights: Sequence[float] | None, seeds: Sequence[int]):
        """
        Args:
          pools: the rows of every source.
          seeds: of every source's shuffle.
        """
        import grain

        self.sizes = [len(pool) for pool in pools]
        self.counts = shares_of(self.sizes, weights)
        self.length = sum(self.counts)
        self._source = spread(self.counts)
        self._rank = np.zeros(self.length, np.int64)
        for source, count in enumerate(self.counts):
            self._rank[self._source == source] = np.arange(count)
        # endless lists: epoch after epoch of the source's own, each in its own order
        self._streams = [
            grain.MapDataset.source(pool).seed(seed).shuffle().repeat() if len(pool) else None
            for pool, seed in zip(pools, seeds, strict=True)
        ]

    def row_at(self, position: int) -> int:
        turn, at = divmod(position, self.length)
        source = int(self._source[at])
        stream = self._streams[source]
        assert stream is not None  # a source without rows has no position
        return int(stream[turn * self.counts[source] + int(self._rank[at])])


class Order:
    """The endless list of rows: `row_at(position)`, in any order of asking."""

    def __init__(self, layout: Layout, seed: int):
        phases = len(layout.passes)
        self.blocks = [self._block(layout, phase, seed) for phase in range(phases)]
        self.blocks.append(self._block(layout, None, seed))
        lengths = [block.length * n for block, n in zip(self.blocks, layout.passes, strict=False)]
        self.starts = [0, *itertools.accumulate(lengths)]
        """Where each phase begins, and then everything: positions."""

    @staticmethod
    def _block(layout: Layout, phase: int | None, seed: int) -> Block:
        taken = [
            group
            for group in layout.groups
            if phase is None or group.phase == phase or (layout.cumulative and group.phase < phase)
        ]
        pools = [
            np.concatenate([np.arange(0), *(np.arange(g.first, g.first + g.rows) for g in taken if g.source == s)])
            for s in range(len(layout.sources))
        ]
        # the plain case has the seed itself: no mixture is a mixture of one
        seeds = [
            seed if phase is None and s == 0 else _derive(seed, -1 if phase is None else phase, s)
            for s in range(len(pools))
        ]
        return Block(pools, layout.weights, seeds)

    def phase_at(self, position: int) -> int:
        """The phase of a position, from 0; the number of phases for what comes after them."""
        return bisect.bisect_right(self.starts, position) - 1

    def row_at(self, position: int) -> int:
        phase = self.phase_at(position)
        return self.blocks[phase].row_at(position - self.starts[phase])


def _derive(seed: int, phase: int, source: int) -> int:
    return int(np.random.SeedSequence([seed, phase + 1, source]).generate_state(1)[0])
