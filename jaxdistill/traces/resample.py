"""More samples for problems of which too few were kept: until `until_kept` are, or `max_samples` are drawn.

Stages meet through files. `verify` leaves its verdicts; `plan` counts them and writes `samples.json` among the traces:
how many samples of a problem and style there are to be. The stage `generate` is then run again, and draws what its
journal lacks. The numbers only grow, and a sample's seed follows from its number, so that a run that was killed between
the two ends like one that was not.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from jaxdistill.config import RunConfig
from jaxdistill.progress import say
from jaxdistill.records import MANIFEST, Problem, RunDir, Verdict, read_manifest, read_records, write_json

FILE = "samples.json"


def read_counts(folder: Path) -> dict[tuple[str, str], int]:
    """Samples of a (problem id, style), where they are more than `traces.samples`; empty before the first round."""
    try:
        rows = json.loads((folder / FILE).read_text())
    except FileNotFoundError:
        return {}
    return {(problem, style): count for problem, style, count in rows}


def plan(config: RunConfig, run: RunDir) -> int:
    """After `verify`: decides what to draw again, and marks both stages as unfinished if there is anything.

    Returns:
      how many samples the next round draws; 0 if every problem has enough, or its budget is spent.
    Raises:
      ValueError: `generate` or `verify` has not been run.
    """
    traces = config.traces
    if not traces.until_kept or traces.max_samples is None or traces.engine == "import":
        return 0
    if read_manifest(run.traces) is None or read_manifest(run.verdicts) is None:
        raise ValueError(f"{run.verdicts}: resampling goes by verdicts; run generate and verify first.")
    kept: Counter[tuple[str, str]] = Counter()
    drawn: Counter[tuple[str, str]] = Counter()
    for verdict in read_records(run.verdicts, Verdict):
        problem, style, _ = verdict.trace_id.rsplit("/", 2)
        drawn[problem, style] += 1
        kept[problem, style] += verdict.kept
    counts = read_counts(run.traces)
    more = 0
    for problem in read_records(run.problems, Problem):
        for style in traces.styles:
            pair = (problem.id, style)
            if kept[pair] < traces.until_kept and drawn[pair] < traces.max_samples:
                counts[pair] = min(drawn[pair] + traces.samples, traces.max_samples)
                more += counts[pair] - drawn[pair]
    _tell(run, kept, drawn, traces.until_kept, more)
    if more:
        write_json(run.traces / FILE, [[*pair, count] for pair, count in counts.items()])
        # the verdicts' first: between the two, both are to be made anew
        (run.verdicts / MANIFEST).unlink()
        (run.traces / MANIFEST).unlink()
    return more


def _tell(run: RunDir, kept: Counter, drawn: Counter, wanted: int, more: int) -> None:
    manifest = read_manifest(run.traces)
    assert manifest is not None
    total, tokens = sum(kept.values()), manifest["counts"].get("output_tokens", 0)
    cost = f", {tokens / total:,.0f} tokens spent for each" if total else ""
    enough = sum(kept[pair] >= wanted for pair in drawn)
    say(
        f"  {total:,} of {sum(drawn.values()):,} traces kept ({total / max(1, sum(drawn.values())):.1%}){cost}; "
        f"{enough:,} of {len(drawn):,} problems have {wanted}"
        + (f"; {more:,} more samples are drawn of the others" if more else "")
    )
