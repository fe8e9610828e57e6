#!/usr/bin/env bash
# Adding workers to a Grain pipeline that batches an IterDataset with drop_remainder can leave it with no batch at all, without an error.
#
# Each worker reads its own slice and batches alone, so each drops its own remainder, up to workers * (batch - 1) examples
# instead of batch - 1. A small set (an evaluation split, the last shard) is then empty, and the loop over it just ends.
# Batching the MapDataset, one line earlier, drops what one process drops.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3.11 -m venv env
env/bin/pip install --quiet --quiet grain==0.2.18 absl-py==2.5.1

cat > program.py <<'PY'
import sys
from importlib.metadata import version

import grain
from absl import app

EXAMPLES, BATCH = 28, 8


def batches(workers, early):
    """How many batches come out, batched before (`early`) or after the MapDataset becomes an IterDataset."""
    data = grain.MapDataset.range(EXAMPLES)
    if early:
        data = data.batch(BATCH, drop_remainder=True).to_iter_dataset()
    else:
        data = data.to_iter_dataset().batch(BATCH, drop_remainder=True)
    iterator = iter(data.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers)))
    count = sum(1 for _ in iterator)
    iterator.close()
    return count


def main(_):
    print(f"grain {version('grain')}; {EXAMPLES} examples in batches of {BATCH}, drop_remainder=True; expected {EXAMPLES // BATCH} batches")
    late = {workers: batches(workers, early=False) for workers in (0, 2, 4)}
    for workers, count in late.items():
        print(f"  {workers} workers, to_iter_dataset().batch(): {count} batches")
    early = batches(4, early=True)
    print(f"  4 workers, batch().to_iter_dataset(): {early} batches")
    if late != {0: 3, 2: 2, 4: 0} or early != 3:
        sys.exit("CHANGED: the number of batches is not as described")
    print("as described: four workers leave nothing, and nothing is said")


if __name__ == "__main__":
    app.run(main)
PY
env/bin/python -I program.py
