"""Plans of published students on TPUs and GPUs, as the table in README.

    python tools/plan_table.py results.jsonl --minutes 200     compiles what is missing, one after the other
    python tools/plan_table.py results.jsonl --quick           compiles with less effort, several times faster
    python tools/plan_table.py results.jsonl --print           the table of what is there

Results are kept in a file of JSON lines: the same command goes on after an interruption, and a case that is there
is not compiled again, unless it was compiled quickly and is now to be compiled in full. What was compiled quickly is
marked with ~: its memory is up to a tenth too low, and its time is that of the data sheet's rates, as for GPUs. Each
case tries its meshes until one fits. `--only TEXT` takes the cases whose name holds it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxdistill.config import build
from jaxdistill.models.published import PUBLISHED, QWEN3, R1_DISTILL
from jaxdistill.plan.estimate import FAST, SLOW, estimate
from jaxdistill.plan.job import Compiled
from jaxdistill.plan.planning import TooLarge, make_plan
from jaxdistill.plan.request import make_job, parse_mesh
from jaxdistill.plan.targets import GIB, Topology

# by parameters in billions, up to: the topology of each kind
TPUS = {
    "v5e": ((2, "4x4"), (10, "8x8"), (20, "8x16"), (80, "16x16")),
    "v5p": ((2, "2x2x1"), (10, "2x2x4"), (40, "2x4x4"), (80, "4x4x4")),
    "v6e": ((2, "2x4"), (10, "4x8"), (40, "8x8"), (80, "16x16")),
    "tpu7x": ((2, "2x2x1"), (10, "2x2x1"), (40, "2x4x4"), (80, "4x4x4")),
}
# hosts of eight
GPUS = {"h100": ((10, 1), (20, 2), (40, 4), (80, 8)), "h200": ((10, 1), (20, 1), (40, 2), (80, 4))}
ROWS = (16384, 32768)
TENSORS = (1, 4, 8)
CONTEXTS = (2, 4, 8, 16)


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    student: str
    topology: Topology
    row_tokens: int

    @property
    def name(self) -> str:
        return f"{self.student} {self.row_tokens} {self.topology}"


def cases() -> Iterator[Case]:
    """The smallest students first; every student on every kind before the next."""
    students = sorted({**R1_DISTILL, **QWEN3}, key=lambda name: PUBLISHED[name][1])
    for tokens in ROWS:
        for student in students:
            billions = PUBLISHED[student][1] / 1e9
            for generation, sizes in TPUS.items():
                shape = next(shape for most, shape in sizes if billions <= most)
                yield Case(student, Topology.of(f"{generation}:{shape}"), tokens)
            for generation, hosts in GPUS.items():
                count = next(n for most, n in hosts if billions <= most)
                yield Case(student, Topology.of(f"{generation}:8", count), tokens)


def config_of(case: Case, rows: int) -> Any:
    return build(
        {
            "name": "plan",
            "run_dir": "runs/plan",
            "problems": {"source": "jsonl", "path": "problems.jsonl"},
            "traces": {"engine": "vllm", "teacher": "Qwen/Qwen3-32B", "max_tokens": case.row_tokens},
            "data": {"row_tokens": case.row_tokens},
            "student": {"init": case.student},
            "train": {
                "batch_rows": rows,
                "steps": 1000,
                "remat": "full",
                "optimizer": {"name": "adamw", "learning_rate": 1e-5},
            },
        }
    )


def meshes(case: Case) -> Iterator[dict[str, int]]:
    """Sizes of the axes, the first choice first; what is left of the devices goes along `data`."""
    shape, devices, slices = PUBLISHED[case.student][0], case.topology.devices, case.topology.slices
    fitting = [n for n in TENSORS if shape["num_attention_heads"] % n == 0 and shape["num_key_value_heads"] % n == 0]
    inside = devices // slices
    tried = [(inside, tensor, 1) for tensor in fitting]
    # between hosts of GPUs parameters may be spread too, where one host cannot hold them
    between = slices > 1 and case.topology.chip.platform == "gpu"
    tried += [(devices, tensor, 1) for tensor in fitting] if between else []
    # rows that are too long for one device
    tried += [(inside, fitting[-1], context) for context in CONTEXTS]
    tried += [(devices, 1, context) for context in CONTEXTS] if between else []
    for over, tensor, context in tried:
        if over >= tensor * context:
            fsdp = over // (tensor * context)
            yield {"data": devices // over, "fsdp": fsdp, "tensor": tensor, "context": context}


def compile_case(case: Case, quick: bool) -> dict[str, Any]:
    """The first mesh that fits, with one row for every group of devices that shares rows; or why none does."""
    failed = []
    for sizes in meshes(case):
        mesh = ",".join(f"{axis}={size}" for axis, size in sizes.items())
        rows = sizes["data"] * sizes["fsdp"]
        try:
            job = make_job(config_of(case, rows), case.topology, mesh=parse_mesh(mesh), quick=quick)
            plan = make_plan(job, case.topology)
        except TooLarge as error:
            failed.append(f"{mesh}: {error.found.needed_bytes / GIB:.1f} GiB")
            continue
        except ValueError as error:
            failed.append(f"{mesh}: {error}")
            continue
        if plan.fits:
            return {"name": case.name, "quick": quick, "plan": plan.as_dict(), "failed": failed}
        failed.append(f"{mesh}: {plan.found.peak_bytes / GIB:.1f} GiB")
    return {"name": case.name, "quick": quick, "failed": failed}


def read(path: Path) -> dict[str, Any]:
    lines = path.read_text().splitlines() if path.exists() else []
    return {found["name"]: found for found in map(json.loads, lines)}


def table(results: dict[str, Any]) -> str:
    """Markdown: a line a student and row length, a column a kind of accelerator."""
    kinds = [*TPUS, *GPUS]
    chips = [next(case.topology.chip for case in cases() if case.topology.generation == kind) for kind in kinds]
    heads = [f"{kind} ({chip.hbm_gib:g} GiB)" for kind, chip in zip(kinds, chips, strict=True)]
    lines = [f"| student | {' | '.join(heads)} |", f"|---{'|---' * len(kinds)}|"]
    for tokens in ROWS:
        for student in dict.fromkeys(case.student for case in cases()):
            found = {c.topology.generation: c for c in cases() if (c.student, c.row_tokens) == (student, tokens)}
            cells = [cell(found[kind], results.get(found[kind].name)) for kind in kinds]
            lines.append(f"| {student}, {tokens // 1024}k | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(case: Case, found: dict[str, Any] | None) -> str:
    """Devices and mesh, peak GiB, MFU; what the smallest of the meshes would need, if none fits."""
    where = f"{case.topology.slices} x 8" if case.topology.slices > 1 else str(case.topology).partition(":")[2]
    if found is None:
        return "not compiled"
    if "plan" not in found:
        needed = [float(size) for size in re.findall(r": ([\d.]+) GiB$", "\n".join(found["failed"]), re.MULTILINE)]
        return f"{where}: none fits, at least {min(needed):.0f} GiB" if needed else f"{where}: not compiled"
    plan, quick = found["plan"], bool(found.get("quick"))
    compiled = Compiled.of(plan["compiled"])
    mesh = " ".join(f"{axis[0]}{size}" for axis, size in compiled.mesh.items() if size > 1)
    mfu = []
    for name, assumptions in (("slow", SLOW), ("fast", FAST)):
        seconds = estimate(compiled, case.topology, assumptions, quick=quick).seconds
        mfu.append(100 * plan[name]["mfu"] * plan[name]["seconds"] / seconds)
    start = f"{where}, {mesh}: {'~' if quick else ''}{compiled.peak_bytes / GIB:.1f}"
    return f"{start}; {'~' if quick else ''}{mfu[0]:.0f} to {mfu[1]:.0f}%"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--minutes", type=float, default=1e9, help="start no further compilation after so many")
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    parser.add_argument("--kinds", default=",".join([*TPUS, *GPUS]), help="accelerators, as v5p,h100; all if absent")
    parser.add_argument("--quick", action="store_true", help="compile with little effort: memory within 10%% or so")
    parser.add_argument("--print", action="store_true", help="print the table of what is there")
    arguments = parser.parse_args()
    results, begun = read(arguments.results), time.monotonic()
    for case in [] if arguments.print else cases():
        wanted = case.topology.generation in arguments.kinds.split(",") and arguments.only in case.name
        known = results.get(case.name)
        if not wanted or (known is not None and (arguments.quick or not known.get("quick"))):
            continue
        if time.monotonic() - begun > arguments.minutes * 60:
            break
        found = compile_case(case, arguments.quick)
        results[case.name] = found
        with arguments.results.open("a") as file:
            file.write(json.dumps(found) + "\n")
        said = found["plan"]["compiled"]["peak_bytes"] / GIB if "plan" in found else float("nan")
        print(f"{case.name}: {said:.1f} GiB, {time.monotonic() - begun:.0f} s {found['failed']}", flush=True)
    if arguments.print:
        print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
