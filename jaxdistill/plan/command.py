"""`jaxdistill plan CONFIG --topology v5p:4x4x4`."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxdistill import progress
from jaxdistill.config import RunConfig
from jaxdistill.plan import environments
from jaxdistill.records import RunDir, write_json

if TYPE_CHECKING:
    from jaxdistill.plan.planning import Plan


def add_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--topology", help="such as v5p:4x4x4, v6e:4x8, tpu7x:2x2x2, h100:8, or cpu:8")
    sub.add_argument("--slices", type=int, default=1, metavar="N", help="so many of them (TPU slices, GPU hosts)")
    sub.add_argument("--mesh", metavar="SIZES", help="as fsdp=16,tensor=4; -1 takes the rest; the config's if absent")
    sub.add_argument("--batch", type=int, metavar="ROWS", help="rows of a step; the config's if absent")
    sub.add_argument("--micro-batches", type=int, metavar="N", help="the config's if absent")
    sub.add_argument("--remat", metavar="POLICY", help="such as full or attention; the config's if absent")
    sub.add_argument("--row-tokens", type=int, metavar="T", help="length of a packed row; the config's if absent")
    sub.add_argument("--segment-tokens", type=int, metavar="T", help="mean length of a packed example; a row if absent")
    sub.add_argument("--steps", type=int, metavar="N", help="of the whole run, for hours; the config's if it says")
    sub.add_argument("--search", action="store_true", help="try meshes, remat policies, micro-batches: a ranked table")
    sub.add_argument("--tries", type=int, default=12, metavar="N", help="compilations of a search (default 12)")
    sub.add_argument("--quick", action="store_true", help="compile several times faster, within about 10%% of memory")
    sub.add_argument("--json", action="store_true", help="print plain data")
    sub.add_argument(
        "--make-environment", choices=tuple(environments.COMPILERS), help="only install the compiler of this platform"
    )


def run(config: RunConfig, arguments: argparse.Namespace) -> int:
    """
    Returns:
      the exit code: 0, or 1 if the step does not fit.
    Raises:
      ValueError: bad input, or a step that the compiler cannot fit.
    """
    from jaxdistill.plan.planning import make_plan
    from jaxdistill.plan.request import make_job, parse_mesh, steps_of
    from jaxdistill.plan.show import show_plan
    from jaxdistill.plan.targets import Topology

    if arguments.make_environment:
        progress.say(f"  {environments.make(arguments.make_environment)}")
        return 0
    if not arguments.topology:
        raise ValueError("--topology is missing; name one, such as v5p:4x4x4, v6e:4x8, h100:8 or cpu:8.")
    topology = Topology.of(arguments.topology, arguments.slices)
    progress.console.quiet = arguments.json
    job = make_job(
        config,
        topology,
        mesh=parse_mesh(arguments.mesh) if arguments.mesh else None,
        batch_rows=arguments.batch,
        micro_batches=arguments.micro_batches,
        remat=arguments.remat,
        row_tokens=arguments.row_tokens,
        segment_tokens=arguments.segment_tokens,
        quick=arguments.quick,
    )
    steps = arguments.steps or steps_of(config)
    if arguments.search:
        return _search(config, job, topology, steps, arguments)
    plan = make_plan(job, topology, steps)
    keep(RunDir(Path(config.run_dir)), [plan])
    if arguments.json:
        print(json.dumps(plan.as_dict(), indent=1))
    else:
        show_plan(plan)
    return 0 if plan.fits else 1


def keep(run: RunDir, plans: Sequence[Plan]) -> None:
    """Writes the table of a topology's plans where the report finds it; the next one replaces it."""
    from jaxdistill.plan.estimate import said
    from jaxdistill.plan.show import COLUMNS, row_of

    topology = plans[0].topology
    table = {
        "topology": str(topology),
        "columns": [*COLUMNS[:-1], "fits"],
        "rows": [[*row_of(plan)[:-1], "yes" if plan.fits else "no"] for plan in plans],
        "assumptions": said(topology, quick=plans[0].job.quick),
    }
    run.plans.mkdir(parents=True, exist_ok=True)
    write_json(run.plans / f"{topology.slices}x{topology.name.replace(':', '-')}.json", table)


def _search(config: RunConfig, job: Any, topology: Any, steps: int | None, arguments: argparse.Namespace) -> int:
    from jaxdistill.plan.planning import make_plan
    from jaxdistill.plan.search import search
    from jaxdistill.plan.show import row_of, show_plan, show_table

    found = search(job, topology, steps, limit=arguments.tries, say=progress.say)
    if not found.plans:
        raise ValueError(f"nothing of {len(found.failed)} tried compiles; the first: {found.failed[0][1]}")
    best = found.plans[0]
    if not arguments.quick:
        best = make_plan(dataclasses.replace(best.job, quick=False), topology, steps)
    keep(RunDir(Path(config.run_dir)), [best, *found.plans[1:]])
    if arguments.json:
        failed = [{"train": job.train, "why": why} for job, why in found.failed]
        ranked = [plan.as_dict() for plan in found.plans]
        print(json.dumps({"best": best.as_dict(), "ranked": ranked, "failed": failed}, indent=1))
        return 0 if best.fits else 1
    show_table([row_of(plan) for plan in found.plans])
    for failed, why in found.failed:
        train = failed.train
        axes = ",".join(f"{a}={s}" for a, s in train["mesh"].items() if s and s > 1)
        progress.say(f"  {axes}, {train['micro_batches']} micro-batch(es), remat {train['remat']}: {why}")
    progress.say()
    show_plan(best)
    return 0 if best.fits else 1
