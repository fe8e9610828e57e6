"""How fast a trace set is brought in, and in how much memory: rows a second of processor time, and the peak.

    python tools/bench_imports.py [--rows 100000] [--source messages|r1] [--suffix .jsonl|.parquet]

The set is made up: questions of 30 words, responses of 150 words between tags (two a row for `r1`).
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jaxdistill import config as configs
from jaxdistill.records import RunDir
from jaxdistill.traces import collect
from jaxdistill.traces.problems import problems

WORDS = ["alpha", "beta", "sum", "therefore", "we", "get", "7", "12", "x", "="]


def rows(source: str, count: int) -> Iterator[dict[str, Any]]:
    rng = random.Random(0)
    for i in range(count):
        question = f"{i}: {' '.join(rng.choices(WORDS, k=30))}?"
        response = f"<think>\n{' '.join(rng.choices(WORDS, k=150))}\n</think>\nIt is \\boxed{{{i}}}."
        if source == "r1":
            yield {"problem": question, "generations": [response, response], "answer": str(i)}
        else:
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": response}]
            yield {"messages": turns, "answer": str(i)}


def write(path: Path, found: Iterator[dict[str, Any]]) -> None:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(found)), path)
    else:
        with open(path, "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--source", choices=["messages", "r1"], default="messages")
    parser.add_argument("--suffix", choices=[".jsonl", ".parquet"], default=".jsonl")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"set{options.suffix}"
        write(path, rows(options.source, options.rows))
        config = configs.build(
            {
                "name": "bench",
                "run_dir": folder,
                "problems": {"source": options.source, "path": str(path)},
                "traces": {"engine": "import"},
                "data": {"row_tokens": 64},
                "student": {"init": "demo"},
                "train": {"batch_rows": 1, "steps": 1, "optimizer": {"learning_rate": 0.1}},
            }
        )
        for name, stage in (("problems", problems), ("generate", collect.generate)):
            begun = time.process_time()
            stage(config, RunDir(Path(folder)))
            rate = options.rows / (time.process_time() - begun)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            print(f"{name}: {rate:,.0f} rows/s of {options.source}{options.suffix}, peak {peak} MB so far")


if __name__ == "__main__":
    main()
