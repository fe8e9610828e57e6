"""Plans for eight virtual CPU devices against what the same step then really takes.

    python tools/check_plan.py [--only TEXT] [--repeat 3]

A line a configuration: peak memory of all devices together, planned and resident (the median of some runs), and FLOPs,
planned and counted by the profiler. Needs the machine for itself: where devices wait for each other longer than usual,
more of them hold their memory at once.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from typing import Any

from jaxdistill.config import build
from jaxdistill.plan.job import Compiled
from jaxdistill.plan.measured import Measured, measure
from jaxdistill.plan.planning import make_plan
from jaxdistill.plan.request import make_job, parse_mesh
from jaxdistill.plan.targets import Topology

MIB = 2**20
SMALL = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 32}
WIDE = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4, "head_dim": 64}
DEEP = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "head_dim": 64, "num_attention_heads": 8,
        "num_key_value_heads": 4}  # fmt: skip
CASES: dict[str, tuple[str, int, dict[str, int], dict[str, Any]]] = {
    "fsdp 4, tensor 2, two parts, remat": (
        "fsdp=4,tensor=2", 1536, SMALL, {"batch_rows": 8, "micro_batches": 2, "remat": "full"},
    ),
    "data 8, no remat": ("data=8", 512, SMALL, {"batch_rows": 16, "remat": "none"}),
    "fsdp 8, wide": ("fsdp=8", 512, WIDE, {"batch_rows": 8, "remat": "none"}),
    "fsdp 2, tensor 2, context 2, wide": ("fsdp=2,tensor=2,context=2", 1024, WIDE, {"batch_rows": 4, "remat": "full"}),
    "fsdp 8, wide, bf16": (
        "fsdp=8", 1024, WIDE, {"batch_rows": 16, "micro_batches": 2, "remat": "full", "compute_dtype": "bfloat16"},
    ),
    "fsdp 8, deep, no remat": ("fsdp=8", 512, DEEP, {"batch_rows": 16, "remat": "none"}),
    "fsdp 4, tensor 2, deep, long rows": (
        "fsdp=4,tensor=2", 2048, DEEP, {"batch_rows": 8, "micro_batches": 2, "remat": "full"},
    ),
}  # fmt: skip


def job_of(name: str) -> Any:
    mesh, row_tokens, shape, train = CASES[name]
    config = build(
        {
            "name": "p",
            "run_dir": "runs/check_plan",
            "problems": {"source": "demo", "count": 8},
            "traces": {"engine": "vllm", "teacher": "demo", "max_tokens": 96},
            "data": {"row_tokens": row_tokens},
            "student": {
                "tokenizer": "train",
                "tokenizer_vocab": 8192,
                "architecture": {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048}
                | shape,
            },
            "train": {"steps": 5, "micro_batches": 1, "optimizer": {"learning_rate": 1e-3}} | train,
        }
    )
    return make_job(config, Topology.of("cpu:8"), mesh=parse_mesh(mesh))


def compare(name: str, repeat: int) -> tuple[Compiled, list[Measured]]:
    """(what was planned, a device; what some runs took, all devices)."""
    job = job_of(name)
    found = make_plan(job, Topology.of("cpu:8")).found
    assert isinstance(found, Compiled), "CPUs page before they refuse"
    return found, [measure(job) for _ in range(repeat)]


def main(arguments: list[str] | None = None) -> int:
    """0 if every configuration's memory is within 10% of the plan's, and its FLOPs within 1%."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="configurations whose name holds this text")
    parser.add_argument("--repeat", type=int, default=3, help="measured runs of each (%(default)s)")
    given = parser.parse_args(arguments)
    heads = f"{'planned MiB':>12}{'resident':>10}{'ratio':>7}   {'from':>6}{'to':>6}{'GFLOP':>9}{'ran':>9}{'ratio':>8}"
    print(f"{'':36}{heads}")
    outside = 0
    for name in CASES:
        if given.only not in name:
            continue
        found, runs = compare(name, given.repeat)
        planned, really = 8 * found.peak_bytes, statistics.median(run.bytes for run in runs)
        flops, ran = 8 * found.flops, statistics.median(run.flops for run in runs)
        ratios = sorted(planned / run.bytes for run in runs)
        outside += abs(planned / really - 1) > 0.1 or abs(flops / ran - 1) > 0.01
        print(
            f"{name:36}{planned / MIB:12,.0f}{really / MIB:10,.0f}{planned / really:7.3f}   {ratios[0]:6.3f}"
            f"{ratios[-1]:6.3f}{flops / 1e9:9.2f}{ran / 1e9:9.2f}{flops / ran:8.4f}",
            flush=True,
        )
    return int(outside > 0)


if __name__ == "__main__":
    sys.exit(main())
