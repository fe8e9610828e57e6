"""Line charts and histograms as inline SVG, for the report.

Matplotlib draws them in stand-in colours, which are then replaced by the page's CSS variables: one chart follows the
page into dark mode. Text stays text, ids are unique on the page, and equal data gives equal bytes.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SERIES = 8
"""Number of `--series-N` colours in report.css; more series than that start again from the first baseline's."""

_INK, _MUTED, _LINE = "#010101", "#020202", "#030303"
_STAND_INS = {_INK: "--ink", _MUTED: "--muted", _LINE: "--line", "#040404": "--good", "#050505": "--bad"}
_STAND_INS |= {f"#0600{n:02x}": f"--series-{n}" for n in range(SERIES)}
_GOOD, _BAD = "#040404", "#050505"

_MOST_POINTS = 400
_INCHES = (5.5, 3.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
    """One line of a chart."""

    label: str
    colour: int
    """Number of its `--series-N` colour."""
    x: Sequence[float]
    y: Sequence[float]


def series_colour(n: int) -> int:
    """The colour number of the n-th series: 0 and 1 are the student's and the teacher's alone."""
    return n if n < SERIES else 2 + (n - 2) % (SERIES - 2)


def line_chart(
    name: str,
    title: str,
    curves: Sequence[Curve],
    *,
    x_label: str,
    y_label: str,
    smooth: bool = False,
    logarithmic: bool = True,
) -> str:
    """Curves over one pair of axes; the y axis is logarithmic where it may be and positive values span a factor of 20.

    Args:
      name: prefix of the SVG's ids, unique on the page.
      title: what a screen reader says.
      smooth: draw a running mean, with the values themselves faint behind it.
    """
    figure, axes = _axes()
    for above, curve in enumerate(reversed(curves), start=2):  # the first curve, the student's, lies on top
        x, y = _thin(curve.x, curve.y)
        colour = f"#0600{curve.colour:02x}"
        if smooth and len(y) >= 30:
            axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.35, zorder=above)
            y = _running_mean(y, max(3, len(y) // 25))
        axes.plot(
            x, y, color=colour, linewidth=1.8, solid_capstyle="round", marker="o" if len(x) == 1 else "", zorder=above
        )
    values = [v for c in curves for v in c.y if math.isfinite(v)]
    if logarithmic and values and min(values) > 0 and max(values) / min(values) > 20:
        _log_axis(axes)
    elif values and min(values) >= 0:
        axes.set_ylim(bottom=0)
    if any(len(c.x) > 1 for c in curves):
        axes.set_xlim(min(min(c.x) for c in curves if c.x), max(max(c.x) for c in curves if c.x))
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    return _svg(figure, name, title)


def histogram(name: str, title: str, kept: Sequence[int], rejected: Sequence[int], *, x_label: str) -> str:
    """Stacked counts of kept and rejected lengths; the last bar also holds what is longer than nearly all."""
    figure, axes = _axes()
    ordered = sorted([*kept, *rejected])
    top = max(ordered[min(len(ordered) - 1, int(len(ordered) * 0.995))], ordered[0] + 1)
    width = max(1, math.ceil((top - ordered[0]) / 40))
    edges = [ordered[0] + width * i for i in range(math.ceil((top + 1 - ordered[0]) / width) + 1)]
    clipped = [[min(v, edges[-1] - 1) for v in values] for values in (kept, rejected)]
    axes.hist(clipped, bins=edges, stacked=True, color=[_GOOD, _BAD], rwidth=0.86, linewidth=0)
    median = statistics.median(kept or rejected)
    axes.axvline(median, color=_INK, linewidth=1, linestyle=(0, (3, 3)))
    axes.annotate(
        f"median {median:,.0f}",
        (median, 1),
        xycoords=("data", "axes fraction"),
        xytext=(5, -9),
        textcoords="offset points",
        color=_INK,
    )
    axes.set_xlabel(x_label)
    axes.set_ylabel("traces")
    return _svg(figure, name, title)


def bar_chart(
    name: str,
    title: str,
    labels: Sequence[str],
    series: Sequence[tuple[int, Sequence[float]]],
    *,
    x_label: str,
    y_label: str,
) -> str:
    """Groups of bars side by side, one group a label.

    Args:
      series: a `--series-N` colour and as many values as there are labels.
    """
    figure, axes = _axes()
    width = 0.86 / len(series)
    for n, (colour, values) in enumerate(series):
        places = [i - 0.43 + width * (n + 0.5) for i in range(len(labels))]
        axes.bar(places, values, width=width * 0.92, color=f"#0600{colour:02x}", linewidth=0)
    shown = [i for i in range(len(labels)) if i % math.ceil(len(labels) / 8) == 0]
    axes.set_xticks(shown, [labels[i] for i in shown])
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    return _svg(figure, name, title)


def _axes() -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    # drawn at the size at which the page shows it, so that its text is as large as the page's
    figure = Figure(figsize=_INCHES, dpi=72, layout="constrained")
    axes = figure.add_subplot()
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_LINE)
    axes.grid(axis="y", color=_LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=11, labelcolor=_MUTED, pad=5)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set_color(_MUTED)
        axis.label.set_fontsize(11)
        axis.set_major_formatter(FuncFormatter(_tick))
    axes.locator_params(nbins=6)
    return figure, axes


def _tick(value: float, _: int | None = None) -> str:
    if value == 0:
        return "0"
    if abs(value) >= 1_000_000:
        return f"{value / 1e6:g}M"
    if abs(value) >= 10_000:
        return f"{value / 1e3:g}k"
    if abs(value) < 0.01:
        digits, exponent = f"{value:.2e}".split("e")
        return f"{float(digits):g}e{int(exponent)}"
    return f"{value:,.6g}"


def _log_axis(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5), numticks=12))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(_tick))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _thin(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """Means of neighbouring points, so that a long run does not make a large page."""
    each = math.ceil(len(x) / _MOST_POINTS) or 1
    starts = range(0, len(x), each)
    return [statistics.fmean(x[i : i + each]) for i in starts], [statistics.fmean(y[i : i + each]) for i in starts]


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean over up to `window` points on either side."""
    sums = [0.0, *itertools.accumulate(values)]
    bounds = [(max(0, i - window), min(len(values), i + window + 1)) for i in range(len(values))]
    return [(sums[high] - sums[low]) / (high - low) for low, high in bounds]


def _svg(figure: Figure, name: str, title: str) -> str:
    import io
    from html import escape

    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif", "font.size": 11}
    ):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    # a style rule in an inline SVG would rule the whole page
    svg = re.sub(r"<!--.*?-->|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s(xmlns(:xlink)?|version)="[^"]*"', "", svg)  # HTML knows what an <svg> is
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-").replace('xlink:href="#', f'href="#{name}-')
    svg = re.sub(r"font(-family)?:([^;\"]*?)(['\"]?DejaVu[^;\"]*)", _font, svg)
    for colour, variable in _STAND_INS.items():
        svg = svg.replace(colour, f"var({variable})")
    opening = f'<svg viewBox="0 0 {72 * _INCHES[0]:.0f} {72 * _INCHES[1]:.0f}" role="img" aria-label="{escape(title)}">'
    svg = opening + svg[svg.index(">") + 1 :]
    return re.sub(r"\n\s*", "\n", svg)


def _font(match: re.Match[str]) -> str:
    """Keeps a text's size and leaves its family to the page."""
    size = re.search(r"([\d.]+)px", match[2])
    return f"font-size: {size[1]}px" if size else "font-family: inherit"
