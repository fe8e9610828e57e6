"""Where a training step's time goes on this CPU, against the peak of its matrix products.

    python tools/bench_train.py --gsm8k ... --only ours      writes the configuration and the packed rows
    python tools/profile_train.py [--work runs/bench_train] [--dtype bfloat16]

First the peak: the products of the model's own shapes, alone, one after the other, over as many tokens as a step has
(forward, and both of backward); the median of five runs each, all work over all time. Then `train` with
`train.profile`: what every thread of XLA did, by kind of operation. XLA's own names: `ynn_fusion` and `dot`
are matrix products with what was fused into them. One that is computed by two threads is seen in one of them; the rest
of the step, in which no operation is seen, is that and waiting.
"""

from __future__ import annotations

import argparse
import collections
import gzip
import itertools
import json
import re
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
STEPS = 3
"""Steps that are profiled, after the first three, and as many more that are timed undisturbed."""
PRODUCTS = ("ynn_fusion", "dot", "__onednn", "custom-call")
MOVES = ("copy", "transpose", "bitcast_dynamic", "dynamic-slice", "slice", "concatenate", "wrapped_broadcast", "pad")
SHOWN = 12


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/bench_train"), help="of bench_train (%(default)s)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    arguments = parser.parse_args()
    if not (arguments.work / "config.yaml").is_file():
        raise SystemExit(f"{arguments.work} has no config.yaml; run tools/bench_train.py --only ours first.")
    shape = json.loads((arguments.work / "config.yaml").read_text())
    rows, tokens = shape["train"]["batch_rows"], shape["data"]["row_tokens"]
    peak = measure_peak(shape["student"]["architecture"], rows * tokens, arguments.dtype)
    print(f"{arguments.dtype}, peak of the products of these shapes: {peak:.0f} GFLOP/s", flush=True)
    lines, trace = profile(arguments.work, arguments.dtype, peak)
    seconds = statistics.median(b["seconds"] - a["seconds"] for a, b in itertools.pairwise(lines[-1 - STEPS :]))
    share = statistics.median(line["mfu"] for line in lines[-STEPS:])
    print(f"a step: {seconds:.2f} s, {share:.1%} of that peak in model FLOPs (`mfu`); while profiled:")
    for thread, kinds in by_thread(trace).items():
        print(f"{thread}: busy {sum(kinds.values()) / STEPS:.2f} s a step")
        groups = collections.Counter[str]()
        for kind, spent in kinds.items():
            groups[group_of(kind)] += spent
        print("  " + ", ".join(f"{group} {spent / STEPS:.2f} s" for group, spent in groups.most_common()))
        for kind, spent in kinds.most_common(SHOWN):
            print(f"  {spent / STEPS:8.3f} s  {kind}")
    return 0


def measure_peak(shape: dict[str, Any], tokens: int, dtype: str) -> float:
    """GFLOP/s of the shapes' products alone, weighted by their work."""
    import jax
    import jax.numpy as jnp

    E, F = shape["hidden_size"], shape["intermediate_size"]
    D = shape["head_dim"]
    shapes = [(E, shape["num_attention_heads"] * D), (E, shape["num_key_value_heads"] * D), (E, F), (F, E)]

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.dot(a, b, preferred_element_type=jnp.float32)

    work = spent = 0.0
    for k, n in shapes:
        for left, right in (((tokens, k), (k, n)), ((tokens, n), (n, k)), ((k, tokens), (tokens, n))):
            a, b = jnp.ones(left, dtype), jnp.ones(right, dtype)
            run = jax.jit(product)
            run(a, b).block_until_ready()
            times = []
            for _ in range(5):
                begin = time.perf_counter()
                run(a, b).block_until_ready()
                times.append(time.perf_counter() - begin)
            work, spent = work + 2 * tokens * k * n, spent + statistics.median(times)
    return work / spent / 1e9


def profile(work: Path, dtype: str, peak: float) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Trains some steps; gives the lines of metrics and the events of the profile."""
    from jaxdistill import pipeline
    from jaxdistill.config import load
    from jaxdistill.records import RunDir

    run = RunDir(work / "run")
    shutil.rmtree(run.checkpoints, ignore_errors=True)
    settings = [f"train.steps={4 + 2 * STEPS}", f"train.compute_dtype={dtype}", "train.log_every=1"]
    settings += [f"train.profile={{start: 3, steps: {STEPS}}}", f"train.peak_tflops={peak / 1e3}"]
    pipeline.run_command("train", load(str(work / "config.yaml"), settings))
    lines = [json.loads(line) for line in (run.checkpoints / "metrics.jsonl").read_text().splitlines()]
    (file,) = (run.checkpoints / "profile").rglob("*.trace.json.gz")
    with gzip.open(file) as stream:
        return lines, json.load(stream)["traceEvents"]


def by_thread(events: list[dict[str, Any]]) -> dict[str, collections.Counter[str]]:
    """Seconds by operation, for each of XLA's compute threads."""
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e.get("name") == "thread_name"}
    found: dict[str, collections.Counter[str]] = {}
    for event in events:
        thread = names.get((event.get("pid"), event.get("tid")), "")
        if event.get("ph") != "X" or "XLAEigen" not in thread or event["name"].startswith("ThunkExecutor"):
            continue
        name = re.sub(r"[.]\d+$", "", event["name"].removesuffix(".clone"))
        found.setdefault(thread.partition("/")[0], collections.Counter())[name] += event["dur"] / 1e6
    return found


def group_of(kind: str) -> str:
    if kind.startswith(PRODUCTS):
        return "products"
    return "moves" if kind.startswith(MOVES) else "elementwise and sums"


if __name__ == "__main__":
    sys.exit(main())
