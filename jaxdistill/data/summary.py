"""What `prepare` tells: counts for the manifest, and the same for people."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
from rich.table import Table

from jaxdistill import progress
from jaxdistill.config import CurriculumConfig, TrainConfig
from jaxdistill.data.examples import NAMES
from jaxdistill.data.order import Layout, shares_of
from jaxdistill.data.store import Examples

BAR = 24
"""The longest bar, in characters, where the terminal is wide enough."""
MOST_BINS = 16
"""More than these, and they are octaves."""


def count(examples: Examples, layout: Layout, row_tokens: int, rows_of: list[np.ndarray]) -> dict[str, Any]:
    """The counts of a prepared set.

    Args:
      rows_of: for every group of the layout, the numbers of its examples.
    Returns:
      totals, `length_histograms` (shared bins of prompt, thinking and answer), and a list of `sources`, `phases` (each
      only where there are several) and `domains`.
    """
    sums = examples.lengths.sum(0, dtype=np.int64)
    total = int(examples.totals.sum())
    found: dict[str, Any] = {
        "examples": len(examples),
        "rows": layout.rows,
        "row_tokens": row_tokens,
        "tokens": total,
        **{f"{name}_tokens": int(n) for name, n in zip(NAMES, sums, strict=True)},
        "longest": int(examples.totals.max()),
        "packing_efficiency": total / (layout.rows * row_tokens),
        "trained_share": int(sums[1:].sum()) / total,
        "length_histograms": histograms(examples.lengths),
    }
    domains = np.array(examples.domains)
    if len(set(examples.domains)) > 1:
        found["domains"] = [
            {"domain": str(name), **_part(examples, np.flatnonzero(domains == name))} for name in np.unique(domains)
        ]
    by_source = [_members(layout, rows_of, source=k) for k in range(len(layout.sources))]
    if len(layout.sources) > 1:
        found["sources"] = _sources(examples, layout, by_source)
    if layout.passes:
        found["phases"] = [
            {
                "rows": sum(g.rows for g in layout.groups if g.phase == phase),
                "passes": passes,
                **_part(examples, _members(layout, rows_of, phase=phase)),
            }
            for phase, passes in enumerate(layout.passes)
        ]
    return found


def _part(examples: Examples, where: np.ndarray) -> dict[str, int]:
    lengths = examples.lengths[where]
    return {
        "examples": len(where),
        "tokens": int(lengths.sum(dtype=np.int64)),
        "trained_tokens": int(lengths[:, 1:].sum(dtype=np.int64)),
    }


def _members(layout: Layout, rows_of: list[np.ndarray], **wanted: int) -> np.ndarray:
    chosen = [
        rows
        for g, rows in zip(layout.groups, rows_of, strict=True)
        if all(getattr(g, k) == v for k, v in wanted.items())
    ]
    return np.concatenate([np.arange(0), *chosen]).astype(np.int64)


def _sources(examples: Examples, layout: Layout, members: list[np.ndarray]) -> list[dict[str, Any]]:
    """Wanted and realised shares of one epoch, which has as many rows as are stored."""
    sizes = [sum(g.rows for g in layout.groups if g.source == k) for k in range(len(layout.sources))]
    counts = shares_of(sizes, layout.weights)
    weights = layout.weights or sizes
    parts = [_part(examples, m) for m in members]
    passes = [c / n for c, n in zip(counts, sizes, strict=True)]
    trained = [p["trained_tokens"] * turns for p, turns in zip(parts, passes, strict=True)]
    return [
        {
            "source": name,
            "rows": sizes[k],
            **parts[k],
            "wanted_share": weights[k] / sum(weights),
            "share": counts[k] / sum(counts),
            "trained_token_share": trained[k] / sum(trained),
            "passes_per_epoch": passes[k],
        }
        for k, name in enumerate(layout.sources)
    ]


def histograms(lengths: np.ndarray) -> dict[str, list[int]]:
    """How long prompts, thinkings and answers are: counts in shared bins.

    Returns:
      `edges`, of n + 1 numbers, and for each region n counts. Bin i is from `edges[i]` to below `edges[i + 1]`; bins
      widen by halves of octaves, or by octaves where there would be too many.
    """
    most = max(int(lengths.max()), 1)
    edges = [0, 1]
    for octave in range(most.bit_length()):
        edges += [2 << octave] if octave < 1 else [3 << (octave - 1), 2 << octave]
    edges = _trim(edges, lengths)
    if len(edges) - 1 > MOST_BINS:
        edges = _trim([0, 1, *(2 << octave for octave in range(most.bit_length()))], lengths)
    found = {"edges": edges}
    for region, name in enumerate(NAMES):
        found[name] = np.histogram(lengths[:, region], bins=edges)[0].tolist()
    return found


def _trim(edges: list[int], lengths: np.ndarray) -> list[int]:
    """Without empty bins at either end; the last edge is above the largest length."""
    low = max(i for i, e in enumerate(edges) if e <= lengths.min())
    high = min(i for i, e in enumerate(edges) if e > lengths.max())
    return edges[low : high + 1]


# ----------------------------------------------------------------------------------------------- for people


def tell(counts: dict[str, Any], curriculum: CurriculumConfig | None, train: TrainConfig) -> None:
    """Prints the counts; `train` says at which steps the phases begin."""
    progress.say(
        f"  {counts['examples']:,} examples in {counts['rows']:,} rows of {counts['row_tokens']}: "
        f"{counts['packing_efficiency']:.1%} of the positions are real, {counts['trained_share']:.1%} of those trained"
        + "".join(
            f"; {counts[key]:,} {why} dropped"
            for key, why in (("overlong_dropped", "overlong"), ("early_eos_dropped", "with an eos inside"))
            if counts[key]
        )
    )
    shares = ", ".join(f"{name} {counts[f'{name}_tokens'] / counts['tokens']:.1%}" for name in NAMES)
    progress.say(f"  tokens: {shares}; the longest example has {counts['longest']:,}")
    for part, draw in (("domains", _draw_domains), ("sources", _draw_sources)):
        if part in counts:
            _show(draw(counts[part], counts))
    if curriculum is not None:
        _show(_draw_phases(counts["phases"], curriculum, train.batch_rows))
        planned = train.steps or math.ceil((train.epochs or 0) * counts["rows"] / train.batch_rows)
        if planned * train.batch_rows < counts["phases"][-1]["ends"]:
            progress.say(
                f"  train ends at step {planned:,}, before the last phase does; all of them take "
                f"{counts['phases'][-1]['ends'] / counts['rows']:.2f} epochs"
            )
    _show(_draw_histograms(counts["length_histograms"]))


def _show(table: Table) -> None:
    progress.console.print(table, soft_wrap=False)


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 1), header_style="bold")
    table.add_column("  " + columns[0], no_wrap=True)
    for name in columns[1:]:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _draw_domains(parts: list[dict[str, Any]], counts: dict[str, Any]) -> Table:
    table = _table("domain", "examples", "tokens", "of all")
    for p in parts:
        table.add_row(
            f"  {p['domain']}", f"{p['examples']:,}", f"{p['tokens']:,}", f"{p['tokens'] / counts['tokens']:.1%}"
        )
    return table


def _draw_sources(parts: list[dict[str, Any]], counts: dict[str, Any]) -> Table:
    table = _table("source", "examples", "rows", "share wanted", "of rows", "of trained tokens", "passes an epoch")
    for p in parts:
        shares = [f"{p[key]:.1%}" for key in ("wanted_share", "share", "trained_token_share")]
        table.add_row(
            f"  {p['source']}", f"{p['examples']:,}", f"{p['rows']:,}", *shares, f"{p['passes_per_epoch']:.2f}"
        )
    return table


def _draw_phases(parts: list[dict[str, Any]], curriculum: CurriculumConfig, batch_rows: int) -> Table:
    table = _table("phase", f"{curriculum.by} from", "to", "examples", "rows", "passes", "begins at step")
    for number, p in enumerate(parts, start=1):
        table.add_row(
            f"  {number}",
            f"{p['easiest']:g}",
            f"{p['hardest']:g}",
            f"{p['examples']:,}",
            f"{p['rows']:,}",
            f"{p['passes']}",
            f"{p['begins'] // batch_rows:,}",
        )
    last = parts[-1]
    table.add_row("  then all", "", "", "", "", "", f"{last['ends'] // batch_rows:,}")
    return table


def _draw_histograms(found: dict[str, list[int]]) -> Table:
    table = _table("tokens", *NAMES)
    for column in table.columns[1:]:
        column.justify = "left"
    widest = max(4, min(BAR, (progress.console.width - 20) // len(NAMES) - 10))  # a label, and a number behind each bar
    edges = found["edges"]
    for i, (low, high) in enumerate(itertools.pairwise(edges)):
        cells = [f"{'█' * _bar(n, max(found[name]), widest)} {n:,}" if (n := found[name][i]) else "" for name in NAMES]
        table.add_row(f"  {low:,}" + (f" to {high - 1:,}" if high - 1 > low else ""), *cells)
    return table


def _bar(n: int, most: int, widest: int) -> int:
    """Its length; a single one can be seen too."""
    return -(-n * widest // most)
