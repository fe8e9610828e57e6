"""Which mesh, remat policy and number of micro-batches does best: a few are compiled quickly, the best one fully."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from jaxdistill.plan.job import Job
from jaxdistill.plan.planning import Plan, TooLarge, make_plan
from jaxdistill.plan.targets import Topology

REMATS = ("full", "attention", "none")
LIMIT = 12
"""Compilations of a search."""


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search came to: plans by the middle of their range, and what did not fit or compile."""

    plans: list[Plan]
    failed: list[tuple[Job, str]]


def candidates(job: Job, topology: Topology) -> Iterator[Job]:
    """Jobs that differ in mesh, remat and micro-batches; the likely ones first.

    Meshes divide heads and rows; tensor stays within 8, context is for rows that are fewer than devices.
    """
    heads = job.student["num_attention_heads"]
    kv_heads = job.student.get("num_key_value_heads") or heads
    rows, devices = job.train["batch_rows"], topology.devices // topology.slices
    for remat in REMATS:
        for tensor, context in ((1, 1), (2, 1), (4, 1), (8, 1), (1, 2), (1, 4), (2, 2)):
            if heads % tensor or kv_heads % tensor or devices % (tensor * context) or job.row_tokens % context:
                continue
            fsdp = devices // tensor // context
            if rows % (fsdp * topology.slices):
                continue
            share = rows // (fsdp * topology.slices)
            for micro in sorted({1, share}, reverse=True):
                mesh = {"data": topology.slices, "fsdp": fsdp, "tensor": tensor, "context": context, "slices": None}
                train = job.train | {"mesh": mesh, "remat": remat, "micro_batches": micro}
                yield dataclasses.replace(job, train=train, quick=True)


def search(
    job: Job,
    topology: Topology,
    steps: int | None,
    *,
    limit: int = LIMIT,
    say: Callable[[str], Any] = lambda text: None,
    plan: Callable[[Job, Topology, int | None], Plan] = make_plan,
) -> Found:
    """
    Args:
      plan: what compiles a job.
    Raises:
      ValueError: nothing at all can be tried: no mesh divides rows and heads.
    """
    tried: list[Plan] = []
    failed: list[tuple[Job, str]] = []
    hopeless: set[tuple] = set()
    jobs = list(candidates(job, topology))
    if not jobs:
        raise ValueError(
            f"no mesh of {topology.devices} devices divides {job.train['batch_rows']} rows and the heads; set --batch "
            "to a multiple of the devices."
        )
    for candidate in jobs:
        if len(tried) + len(failed) >= limit:
            break
        mesh, train = candidate.train["mesh"], candidate.train
        kind = (mesh["tensor"], mesh["context"], train["micro_batches"])
        if kind in hopeless:  # more is kept under the other policies
            continue
        try:
            tried.append(plan(candidate, topology, steps))
        except TooLarge as error:
            hopeless.add(kind)
            failed.append((candidate, str(error)))
        except ValueError as error:
            failed.append((candidate, str(error)))
        say(f"  {len(tried) + len(failed)} of at most {min(limit, len(jobs))} compiled, {len(failed)} of them failed")
    return Found(sorted(tried, key=_rank), failed)


def _rank(plan: Plan) -> tuple:
    """What fits first, then the fastest; on CPUs the smallest."""
    if plan.fast is None or plan.slow is None:
        return not plan.fits, plan.found.peak_bytes
    return not plan.fits, (plan.fast.seconds * plan.slow.seconds) ** 0.5 / plan.found.tokens
