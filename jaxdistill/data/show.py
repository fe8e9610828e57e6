"""`jaxdistill show`: one packed row, token by token, so that a person can see what is graded."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
from rich.text import Text

from jaxdistill import progress
from jaxdistill.config import RunConfig, with_baseline
from jaxdistill.data.examples import ANSWER, PROMPT, THINKING
from jaxdistill.data.packing import unpack
from jaxdistill.data.rows import Batches
from jaxdistill.records import RunDir
from jaxdistill.tokenization import load_tokenizer

STYLES = {PROMPT: "grey50", THINKING: "cyan", ANSWER: "bold green"}


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
    weights = {PROMPT: 0.0, THINKING: config.train.thinking_weight, ANSWER: config.train.answer_weight}
    legend = Text("prompt (never trained)", STYLES[PROMPT])
    for region, name in ((THINKING, "thinking"), (ANSWER, "answer")):
        legend.append(f"   {name} (weight {weights[region]:g})", STYLES[region])
    progress.console.print(legend)
    for origin, (tokens, regions) in zip(origins, unpack(arrays), strict=True):
        trained = sum(weights[r] > 0 for r in regions)
        progress.say(
            f"\n--- segment {origin['segment']}: {origin['trace_id']}, {len(tokens)} tokens, {trained} trained"
        )
        text = Text()
        for token, region in zip(tokens, regions, strict=True):
            text.append(
                str(tokenizer.decode([token], skip_special_tokens=False)),
                STYLES[region] if weights[region] else STYLES[PROMPT],
            )
        progress.console.print(text)
    padding = int((arrays["segment_ids"] == 0).sum())
    progress.say(f"\nrow {row} of {batches.rows:,}: {len(arrays['tokens'])} positions, {padding} of them padding")
