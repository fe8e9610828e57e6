"""`jaxdistill show`: one packed row, so that a person can see what is graded.

Each segment is printed region by region, with the weight of its tokens in the loss beside it. Colours say the same:
grey is not trained, cyan is thinking, green is the answer, and dim is a weight below the highest. A terminal without
colours has a mark at every line instead.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.parquet as pq
from rich.console import Group
from rich.table import Table
from rich.text import Text

from jaxdistill import progress
from jaxdistill.config import RunConfig, with_baseline
from jaxdistill.data.examples import ANSWER, NAMES, PROMPT, THINKING
from jaxdistill.data.packing import unpack
from jaxdistill.data.rows import Batches
from jaxdistill.records import RunDir
from jaxdistill.tokenization import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COLOURS = {PROMPT: "grey50", THINKING: "cyan", ANSWER: "bold green"}
MARKS = {PROMPT: "  ", THINKING: "~ ", ANSWER: "= "}
LINE_END = "↵"
BESIDE = 26
"""Characters of a line that names, numbers and mark take."""


def show(config: RunConfig, row: int, baseline: str | None = None) -> None:
    """Prints row `row` of the packed tokens, as they lie on disk.

    Raises:
      ValueError: nothing prepared yet, an unknown baseline, or no such row.
    """
    run = RunDir(Path(config.run_dir))
    if baseline is not None:
        if baseline not in config.baselines:
            raise ValueError(
                f"--baseline {baseline}: known are {', '.join(config.baselines) or 'none in this config'}."
            )
        config, run = with_baseline(config, baseline), run.baseline(baseline)
    if not (run.tokens / "manifest.json").is_file():
        raise ValueError(f"{run.tokens}: nothing prepared yet; run `jaxdistill prepare` first.")
    tokenizer = load_tokenizer(str(run.tokenizer))
    batches = Batches(run.tokens, batch_rows=1, seed=config.seed)
    if not 0 <= row < batches.rows:
        raise ValueError(f"--row {row}: there are rows 0 to {batches.rows - 1}.")
    origins = pq.read_table(run.tokens / "origins.parquet", filters=[("row", "==", row)]).to_pylist()
    arrays = batches.stored_row(row)
    weights = (0.0, config.train.thinking_weight, config.train.answer_weight)
    progress.console.print(_legend(weights))
    for origin, (tokens, regions) in zip(origins, unpack(arrays), strict=True):
        progress.say(f"\n{_heading(origin, regions, weights, several=len(batches.layout.sources) > 1)}")
        progress.console.print(draw_segment(tokenizer, tokens, regions, weights), soft_wrap=False)
    padding = int((arrays["segment_ids"] == 0).sum())
    group = next(g for g in batches.layout.groups if g.first <= row < g.first + g.rows)
    phase = f", phase {group.phase + 1} of the curriculum" if batches.layout.passes else ""
    progress.say(
        f"\nrow {row} of {batches.rows:,}{phase}: {len(arrays['tokens'])} positions, {len(origins)} segments, "
        f"{padding} positions of padding"
    )


def draw_segment(
    tokenizer: PreTrainedTokenizerBase,
    tokens: Sequence[int],
    regions: Sequence[int],
    weights: Sequence[float],
    *,
    marks: bool | None = None,
) -> Table:
    """One segment: for each region its name, its weight, its number of tokens and its text.

    Args:
      weights: of the regions prompt, thinking and answer.
      marks: put a mark at every line of the text; if None, where the terminal shows no colours.
    """
    marks = _colourless() if marks is None else marks
    table = Table.grid(padding=(0, 1))
    for justify in ("left", "right", "right"):
        table.add_column(justify=justify, no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("", "weight", "tokens", "", style="dim")
    for region, ids in regions_of(tokens, regions):
        style = style_of(region, weights)
        # all ids of a region at once: characters may go over several tokens
        text = str(tokenizer.decode(ids, skip_special_tokens=False)).replace("\n", f"{LINE_END}\n")
        lines = [Text(line, style) for line in text.removesuffix("\n").split("\n")]
        if marks:
            mark = Text(MARKS[region if weights[region] else PROMPT])
            width = max(20, progress.console.width - BESIDE)
            lines = [mark + part for line in lines for part in line.wrap(progress.console, width) or [Text()]]
        table.add_row(Text(NAMES[region], style), f"{weights[region]:g}", f"{len(ids):,}", Group(*lines))
    return table


def regions_of(tokens: Sequence[int], regions: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
    """(region, its tokens) for every stretch of one region, in order."""
    for region, pairs in itertools.groupby(zip(regions, tokens, strict=True), key=lambda pair: pair[0]):
        yield int(region), [token for _, token in pairs]


def style_of(region: int, weights: Sequence[float]) -> str:
    """The colour of a region's text: grey without weight, dim below the highest."""
    if not weights[region]:
        return COLOURS[PROMPT]
    return COLOURS[region] + (" dim" if weights[region] < max(weights) else "")


def _legend(weights: Sequence[float]) -> Text:
    legend = Text()
    for region, name in enumerate(NAMES):
        mark = f"{MARKS[region].strip() or 'no mark'}: " if _colourless() else ""
        trained = f"weight {weights[region]:g}" if weights[region] else "never trained" if not region else "not trained"
        legend.append(f"{mark}{name} ({trained})   ", style_of(region, weights))
    legend.append(f"{LINE_END} is a line break", "dim")
    return legend


def _heading(origin: dict, regions: Sequence[int], weights: Sequence[float], *, several: bool) -> str:
    trained = sum(weights[r] > 0 for r in regions)
    source = f"{origin['source']}, " if several else ""
    return f"--- segment {origin['segment']}: {source}{origin['trace_id']}, {len(regions)} tokens, {trained} trained"


def _colourless() -> bool:
    return progress.console.color_system is None or progress.console.no_color
