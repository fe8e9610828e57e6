"""What a finished collection leaves: `traces.parquet`, written few traces at a time, and what it came to."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from jaxdistill.progress import say
from jaxdistill.records import Trace, atomic_file, schema_of, table_of

TRACES = "traces.parquet"
ROWS = 1024
"""Traces held in memory at once."""


def write_traces(folder: Path, traces: Iterable[Trace], **more: Any) -> dict[str, Any]:
    """Writes `traces.parquet`; gives the counts of a finished stage, and says them."""
    ended: Counter[str] = Counter()
    failures: Counter[str] = Counter()
    lengths = array("q")
    prompt_tokens = 0
    schema = schema_of(Trace)
    # statistics are the least and the greatest text of each batch: nobody asks for them, and the writer holds them all
    options: dict[str, Any] = {"compression": "zstd", "write_statistics": False}
    with atomic_file(folder / TRACES) as temporary, pq.ParquetWriter(temporary, schema, **options) as writer:
        rows: list[Trace] = []
        for trace in traces:
            rows.append(trace)
            ended[trace.finish_reason] += 1
            lengths.append(len(trace.output_ids))
            prompt_tokens += len(trace.prompt_ids)
            if trace.error is not None:
                failures[trace.error] += 1
            if len(rows) == ROWS:
                writer.write_table(table_of(rows, schema))
                rows = []
        writer.write_table(table_of(rows, schema))
    finished = dict(sorted(ended.items()))
    counts = {"samples": len(lengths), "finished": finished, "output_tokens": sum(lengths), **more}
    say(f"  {len(lengths):,} traces ({', '.join(f'{count:,} {reason}' for reason, count in finished.items())})")
    if counts["output_tokens"]:
        counts |= {"prompt_tokens": prompt_tokens} | _lengths(np.frombuffer(lengths, np.int64), ended)
        say(_tell_lengths(counts))
    if failures:
        counts["failures"] = dict(failures.most_common(8))
        reason, times = failures.most_common(1)[0]
        say(f"  {ended['error']:,} failed; most often ({times:,}): {reason}")
    return counts


def _lengths(lengths: np.ndarray, ended: Counter[str]) -> dict[str, Any]:
    """How long traces are, how many were cut off, and what one that ended by itself costs."""
    quantiles = np.percentile(lengths, [10, 50, 90])
    total, drawn = int(lengths.sum()), len(lengths)
    return {
        "output_length": {
            "mean": round(total / drawn, 1),
            **{f"p{p}": round(float(q)) for p, q in zip((10, 50, 90), quantiles, strict=True)},
            "max": int(lengths.max()),
        },
        "truncated_share": round(ended["length"] / drawn, 4),
        "tokens_per_finished_trace": round(total / ended["stop"], 1) if ended["stop"] else None,
    }


def _tell_lengths(counts: dict[str, Any]) -> str:
    length, cost = counts["output_length"], counts["tokens_per_finished_trace"]
    return (
        f"  {counts['output_tokens']:,} tokens; a trace has {length['p10']:,} / {length['p50']:,} / {length['p90']:,} "
        f"(10 / 50 / 90%), at most {length['max']:,}; {counts['truncated_share']:.1%} were cut off"
        + (f"; {cost:,.0f} tokens spent for each that ended by itself" if cost else "")
    )
