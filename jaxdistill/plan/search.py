"""Which mesh, remat policy and number of micro-batches does best: a few are compiled quickly, the best one fully.

Meshes and micro-batches are tried with everything recomputed, which takes the least memory; then those that do best,
with the policies that keep more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from jaxdistill.models.decoder import REMAT
from jaxdistill.plan.job import Job
from jaxdistill.plan.planning import Plan, TooLarge, make_plan
from jaxdistill.plan.targets import Topology

LEAST, MOST = "full", "none"
"""The policies that keep nothing but a layer's input, and everything."""
LIMIT = 12
"""Compilations of a search."""
MESHES = 0.5
"""Of them, for meshes and micro-batches."""


def policies() -> list[str]:
    """The model's remat policies; the first keeps least, the last most."""
    return [LEAST, *(name for name in reversed(REMAT) if name not in (LEAST, MOST)), MOST]


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search came to: plans by the middle of their range, and what did not fit or compile."""

    plans: list[Plan]
    failed: list[tuple[Job, str]]


def candidates(job: Job, topology: Topology) -> Iterator[Job]:
    """Jobs that differ in mesh and micro-batches; the likely ones first.

    Meshes divide heads and rows; tensor stays within 8, context is for rows that are fewer than devices.
    """
    heads = job.student["num_attention_heads"]
    kv_heads = job.student.get("num_key_value_heads") or heads
    rows, devices = job.train["batch_rows"], topology.devices // topology.slices
    for tensor, context in ((1, 1), (2, 1), (4, 1), (8, 1), (1, 2), (1, 4), (2, 2)):
        if heads % tensor or kv_heads % tensor or devices % (tensor * context) or job.row_tokens % context:
            continue
        fsdp = devices // tensor // context
        if rows % (fsdp * topology.slices):
            continue
        share = rows // (fsdp * topology.slices)
        for micro in sorted({1, share}, reverse=True):
            mesh = {"data": topology.slices, "fsdp": fsdp, "tensor": tensor, "context": context, "slices": None}
            train = job.train | {"mesh": mesh, "remat": LEAST, "micro_batches": micro}
            yield dataclasses.replace(job, train=train, quick=True)


def with_remat(job: Job, remat: str) -> Job:
    return dataclasses.replace(job, train=job.train | {"remat": remat})


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
    jobs = list(candidates(job, topology))
    if not jobs:
        raise ValueError(
            f"no mesh of {topology.devices} devices divides {job.train['batch_rows']} rows and the heads; set --batch "
            "to a multiple of the devices."
        )

    def fits(candidate: Job) -> bool | None:
        """Compiles one; None if that failed for another reason than memory."""
        found: bool | None = None
        try:
            made = plan(candidate, topology, steps)
            tried.append(made)
            found = made.fits
        except TooLarge as error:
            failed.append((candidate, str(error)))
            found = False
        except ValueError as error:
            failed.append((candidate, str(error)))
        say(f"  {len(tried) + len(failed)} of at most {limit} compiled, {len(failed)} of them failed")
        return found

    fitting = 0
    for at, candidate in enumerate(jobs):
        # other policies have their share of the tries, once there is a mesh to try them with
        if at >= limit or (fitting and at >= MESHES * limit):
            break
        fitting += bool(fits(candidate))
    for best in sorted((p for p in tried if p.fits), key=_rank):
        tight = False
        for remat in policies()[1:]:
            # where a policy that keeps less does not fit, keeping everything does not
            if len(tried) + len(failed) >= limit or (tight and remat == MOST):
                break
            tight |= fits(with_remat(best.job, remat)) is False
    return Found(sorted(tried, key=_rank), failed)


def _rank(plan: Plan) -> tuple:
    """What fits first, then the fastest; on CPUs the smallest."""
    if plan.fast is None or plan.slow is None:
        return not plan.fits, plan.found.peak_bytes
    return not plan.fits, (plan.fast.seconds * plan.slow.seconds) ** 0.5 / plan.found.tokens
