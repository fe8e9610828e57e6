"""The figures by which train steps on accelerators are compared ahead of time: memory, bytes moved, kernels, cycles.

    python tools/accelerator_plans.py out.json                               this checkout, all cases
    python tools/accelerator_plans.py out.json --baseline before.json        with ratios against an earlier file
    python tools/accelerator_plans.py before.json --source ../older          the step of another checkout
    python tools/accelerator_plans.py out.json --only h100                   cases whose name holds a text
    python tools/accelerator_plans.py out.json --print --largest 20          what is there, and where the bytes are

Each case is compiled in a process of its own, from the code of `--source`; the program's text is then taken apart by
the code beside this file, so that two checkouts are measured alike. Results are kept in the file, one case after the
other: a case that is there is not compiled again, unless `--again` is given. TPU cases take minutes each.

Peaks of GPUs hold what libraries take beside XLA's buffers. Bytes outside are those of everything but matrix products,
attention kernels and collectives. Forward kernels are attention's, a layer and step: 1 is the least.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LARGEST = 60
"""Instructions that move most, that are kept by name."""
STAGE = "JAXDISTILL_PLANS_STAGE"
HERE = Path(__file__).resolve()


@dataclass(frozen=True, kw_only=True)
class Case:
    """One train step: AdamW, bf16 compute."""

    topology: str
    student: str
    rows: int
    row_tokens: int
    remat: str
    lora: bool = False
    """Rank 16 on a bf16 base."""

    @property
    def name(self) -> str:
        lora = " LoRA" if self.lora else ""
        return f"{self.topology} {self.student}{lora} {self.rows}x{self.row_tokens} {self.remat}"


CASES = (
    Case(topology="h100:1", student="Qwen3-0.6B", rows=4, row_tokens=8192, remat="full"),
    Case(topology="h100:1", student="Qwen3-0.6B", rows=4, row_tokens=8192, remat="attention"),
    Case(topology="h100:1", student="Qwen3-0.6B", rows=4, row_tokens=8192, remat="dots"),
    Case(topology="h100:1", student="Qwen3-0.6B", rows=4, row_tokens=8192, remat="offload"),
    Case(topology="h100:1", student="Qwen3-1.7B", rows=4, row_tokens=8192, remat="full"),
    Case(topology="h100:1", student="Qwen3-8B", rows=1, row_tokens=8192, remat="full", lora=True),
    Case(topology="v6e:2x4", student="Qwen3-1.7B", rows=8, row_tokens=8192, remat="full"),
    Case(topology="v5p:2x2x4", student="DeepSeek-R1-Distill-Qwen-7B", rows=16, row_tokens=16384, remat="full"),
)


def job_of(case: Case) -> dict[str, Any]:
    """What the checkout on the path asks its compiler, as plain data."""
    from jaxdistill.config import build
    from jaxdistill.plan.request import make_job
    from jaxdistill.plan.targets import Topology

    student: dict[str, Any] = {"init": case.student}
    if case.lora:
        student["lora"] = {"rank": 16, "alpha": 32.0, "base_dtype": "bfloat16"}
    config = build(
        {
            "name": "plans",
            "run_dir": "runs/plans",
            "problems": {"source": "jsonl", "path": "problems.jsonl"},
            "traces": {"engine": "vllm", "teacher": "Qwen/Qwen3-32B", "max_tokens": case.row_tokens},
            "data": {"row_tokens": case.row_tokens},
            "student": student,
            "train": {
                "batch_rows": case.rows,
                "micro_batches": 1,
                "steps": 1000,
                "remat": case.remat,
                "optimizer": {"name": "adamw", "learning_rate": 1e-5},
            },
        }
    )
    return dataclasses.asdict(make_job(config, Topology.of(case.topology)))


def compile_here(folder: Path) -> None:
    """Compiles the job in a folder with the checkout on the path, and writes the program's text and sizes beside it."""
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    from jaxdistill.plan.job import Job
    from jaxdistill.plan.shapes import Sizes
    from jaxdistill.plan.targets import Topology
    from jaxdistill.plan.worker import make_described
    from jaxdistill.train.program import abstract_inputs

    job = Job(**json.loads((folder / "job.json").read_text()))
    made, dtypes = make_described(job, Topology.of(job.topology, job.slices))
    sizes = Sizes(made, job.train["micro_batches"], job.trained_share, job.segment_tokens)
    compiled = made.step.lower(*abstract_inputs(made, **dtypes)).compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text is not None and memory is not None, "these compilers tell both"
    (folder / "program.txt").write_text(text)
    scopes = {re.sub(r'.*op_name="([^"]*)".*', r"\1", line) for line in text.splitlines() if " while(" in line}
    found = {
        "peak_bytes": memory.peak_memory_in_bytes,
        "layers": made.student.num_layers,
        "devices": made.mesh.size,
        # loops whose end depends on the data
        "loops": {scope: sizes.loop_length(scope) for scope in scopes},
    }
    (folder / "found.json").write_text(json.dumps(found))


def plan(case: Case, source: Path) -> dict[str, Any]:
    """
    Raises:
      subprocess.CalledProcessError: the checkout or its compiler ended without an answer; its output is on stderr.
    """
    from jaxdistill.plan import environments
    from jaxdistill.plan.targets import Topology

    platform = Topology.of(case.topology).chip.platform
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "case.json").write_text(json.dumps(dataclasses.asdict(case)))
        for stage, python in (("job", sys.executable), ("compile", str(environments.make(platform)))):
            given = environments.variables() | {"PYTHONPATH": str(source), STAGE: stage, "JAX_PLATFORMS": "cpu"}
            subprocess.run([python, str(HERE), name], env=given, check=True)
        return figures((folder / "program.txt").read_text(), json.loads((folder / "found.json").read_text()), platform)


def figures(text: str, found: dict[str, Any], platform: str) -> dict[str, Any]:
    """What a program's text tells; all of one device and step."""
    from jaxdistill.plan.costs import analyze, outside_bytes
    from jaxdistill.plan.hlo import parse
    from jaxdistill.plan.products import forward_kernels
    from jaxdistill.plan.workspaces import workspace_bytes

    costs = analyze(text, found["devices"], found["loops"].get, platform=platform)
    workspace = workspace_bytes(parse(text)[0]) if platform == "gpu" else 0.0
    return {
        "compiler_peak_bytes": found["peak_bytes"],
        "workspace_bytes": workspace,
        "peak_bytes": found["peak_bytes"] + workspace,
        "moved": dict(costs.moved),
        "offloaded_bytes": costs.offloaded_bytes,
        "outside_bytes": outside_bytes(costs.moved),
        "kernels": dict(costs.kernels),
        "forward_kernels": forward_kernels(costs.kernels) / found["layers"],
        "flops": costs.flops,
        "cycles": costs.cycles,
        "permutes": sum(n for key, n in costs.collective_calls.items() if key.kind == "collective-permute"),
        "unknown_loops": dict(costs.unknown_loops),
        "largest": sorted(((size, *of) for of, size in costs.moved_by.items()), reverse=True)[:LARGEST],
    }


COLUMNS = ("case", "peak GB", "peak GiB", "of it workspace", "bytes outside, GB", "forward kernels", "M cycles")


def table(results: dict[str, Any], baseline: dict[str, Any]) -> str:
    """Markdown; in brackets, how many times that is what it was."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"|---{'|---:' * (len(COLUMNS) - 1)}|"]
    for name, found in results.items():
        before = baseline.get(name, {})

        def cell(key: str, unit: float, form: str, found: dict = found, before: dict = before) -> str:
            if not found[key]:
                return "-"
            ratio = f" ({found[key] / before[key]:.2f}x)" if before.get(key) else ""
            return f"{found[key] / unit:{form}}{ratio}"

        cells = [
            cell("peak_bytes", 1e9, ".2f"), f"{found['peak_bytes'] / 2**30:.2f}",
            cell("workspace_bytes", 2**30, ".2f"), cell("outside_bytes", 1e9, ".1f"),
            cell("forward_kernels", 1, ".1f"), cell("cycles", 1e6, ".0f"),
        ]  # fmt: skip
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def details(results: dict[str, Any], largest: int) -> str:
    """GB moved by category, and by the instructions that move most."""
    lines = []
    for name, found in results.items():
        moved = sorted(found["moved"].items(), key=lambda item: -item[1])
        lines.append(f"{name}: " + ", ".join(f"{kind} {size / 1e9:.1f}" for kind, size in moved) + " GB moved")
        if found.get("offloaded_bytes"):
            lines.append(f"    {found['offloaded_bytes'] / 1e9:.1f} GB to the host's memory and back")
        if found["kernels"]:
            lines.append("    " + ", ".join(f"{kernel} x{count:,.0f}" for kernel, count in found["kernels"].items()))
        lines += [f"    counted once: loop {scope}" for scope in found["unknown_loops"]]
        for size, category, name, scope in found.get("largest", ())[:largest]:
            lines.append(f"    {size / 1e9:7.2f} {category:<11} {name:<36} {scope[-90:]}")
    return "\n".join(lines)


def main(given: list[str] | None = None) -> int:
    stage = os.environ.get(STAGE)
    if stage is not None:
        folder = Path(sys.argv[1])
        if stage == "compile":
            compile_here(folder)
        else:
            case = Case(**json.loads((folder / "case.json").read_text()))
            (folder / "job.json").write_text(json.dumps(job_of(case)))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--source", type=Path, default=HERE.parents[1], help="the checkout whose step is compiled")
    parser.add_argument("--baseline", type=Path, help="results of an earlier run")
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    parser.add_argument("--again", action="store_true", help="compile what is there, too")
    parser.add_argument("--largest", type=int, default=0, metavar="N", help="name the instructions that move most")
    parser.add_argument("--print", action="store_true", help="compile nothing")
    arguments = parser.parse_args(given)
    file: Path = arguments.results
    for needed in filter(None, (file if arguments.print else None, arguments.baseline)):
        if not needed.is_file():
            raise SystemExit(f"{needed}: no such file; make it with: python tools/accelerator_plans.py {needed}")
    results = json.loads(file.read_text()) if file.exists() else {}
    for case in () if arguments.print else CASES:
        if arguments.only in case.name and (arguments.again or case.name not in results):
            results[case.name] = plan(case, arguments.source.resolve())
            file.write_text(json.dumps(results, indent=1))
            print(f"{case.name}: compiled", file=sys.stderr, flush=True)
    baseline = json.loads(arguments.baseline.read_text()) if arguments.baseline else {}
    shown = {name: found for name, found in results.items() if arguments.only in name}
    print(table(shown, baseline))
    print()
    print(details(shown, arguments.largest))
    return 0


if __name__ == "__main__":
    sys.exit(main())
