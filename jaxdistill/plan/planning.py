"""Plans: what the train step of a config needs on a topology, and which meshes do best.

The compiler runs in a process of its own (`worker`), one at a time: it needs gigabytes of memory, and its environment.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
from typing import Any

from jaxdistill.plan import environments
from jaxdistill.plan.costs import outside_bytes
from jaxdistill.plan.estimate import FAST, SLOW, Estimate, estimate, said
from jaxdistill.plan.job import Compiled, Job, OutOfMemory
from jaxdistill.plan.request import resolve
from jaxdistill.plan.targets import GIB, Topology
from jaxdistill.plan.worker import ANSWER


class TooLarge(ValueError):
    """A step that does not fit; `found` is what the compiler says."""

    def __init__(self, message: str, found: OutOfMemory):
        super().__init__(message)
        self.found = found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A compiled step, and what follows from it."""

    topology: Topology
    job: Job
    found: Compiled
    fast: Estimate | None
    """None on CPUs."""
    slow: Estimate | None
    steps: int | None
    """Of the whole run, where the config or the packed rows tell."""

    @property
    def fits(self) -> bool:
        hbm = self.topology.chip.hbm_gib
        return not hbm or self.found.peak_bytes <= hbm * GIB

    def tokens_per_second(self, of: Estimate) -> float:
        return self.found.tokens / of.seconds

    def mfu(self, of: Estimate) -> float:
        return self.found.model_flops / of.seconds / (self.topology.chip.tflops * 1e12 * self.topology.devices)

    def hours(self, of: Estimate) -> float | None:
        return None if self.steps is None else self.steps * of.seconds / 3600

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        chip = self.topology.chip
        result = {
            "topology": self.topology.name,
            "slices": self.topology.slices,
            "devices": self.topology.devices,
            "chips": self.topology.chips,
            "fits": self.fits,
            "hbm_bytes": chip.hbm_gib * GIB,
            "remat": self.job.train["remat"],
            "batch_rows": self.job.train["batch_rows"],
            "micro_batches": self.job.train["micro_batches"],
            "row_tokens": self.job.row_tokens,
            "steps": self.steps,
            "quick": self.job.quick,
            "compiled": dataclasses.asdict(self.found),
            "outside_bytes": outside_bytes(self.found.moved),
            "assumptions": said(self.topology, quick=self.job.quick),
        }
        for name, of in (("fast", self.fast), ("slow", self.slow)):
            if of is not None:
                hours = self.hours(of)
                result[name] = dataclasses.asdict(of) | {
                    "seconds": of.seconds,
                    "tokens_per_second": self.tokens_per_second(of),
                    "mfu": self.mfu(of),
                    "hours": hours,
                    "chip_hours": None if hours is None else hours * self.topology.chips,
                }
        return result


def make_plan(job: Job, topology: Topology, steps: int | None = None) -> Plan:
    """
    Raises:
      TooLarge: it does not fit.
      ValueError: a mesh that does not fit devices, model or batch.
    """
    found = compile_job(job, topology)
    timed = bool(topology.chip.tflops)
    return Plan(
        topology=topology,
        job=job,
        found=found,
        fast=estimate(found, topology, FAST, quick=job.quick) if timed else None,
        slow=estimate(found, topology, SLOW, quick=job.quick) if timed else None,
        steps=steps,
    )


def compile_job(job: Job, topology: Topology) -> Compiled:
    """What the target's compiler says of the step; it works in a process of its own.

    Raises:
      TooLarge: it does not fit.
      ValueError: bad input, or a compiler that died.
    """
    python = environments.make(topology.chip.platform)
    ran = subprocess.run(
        [str(python), "-m", "jaxdistill.plan.worker"],
        input=json.dumps(dataclasses.asdict(job)),
        env=environments.variables(),
        capture_output=True,
        text=True,
    )
    lines = [line for line in ran.stdout.splitlines() if line.startswith(ANSWER)]
    if ran.returncode or not lines:
        why = reason_of(ran.stderr) or f"exit code {ran.returncode}"
        raise ValueError(f"{topology}: the compiler ended without an answer: {why}")
    answer = json.loads(lines[-1].removeprefix(ANSWER))
    if "refused" in answer:
        raise ValueError(answer["refused"])
    if "out_of_memory" in answer:
        found = OutOfMemory(**answer["out_of_memory"])
        raise TooLarge(_too_large(found, job, topology), found)
    return Compiled.of(answer["compiled"])


def reason_of(stderr: str) -> str:
    """The line that says why a compiler died: that of a failed check, which stack traces follow, or else the last."""
    lines = [line for line in stderr.splitlines() if line.strip()]
    return next((line for line in lines if "Check failed" in line), lines[-1] if lines else "")[:600]


def _too_large(found: OutOfMemory, job: Job, topology: Topology) -> str:
    have = found.available_bytes or topology.chip.hbm_gib * GIB
    over = f"{(found.needed_bytes - have) / GIB:.2f} GiB too much" if found.needed_bytes else "too much"
    return (
        f"{topology}: does not fit: {found.needed_bytes / GIB:.2f} GiB a device where {have / GIB:.2f} are, {over}; "
        f"{advice(job, found.needed_bytes)}"
    )


def advice(job: Job, needed_bytes: float) -> str:
    """What makes a step smaller that needs so much on every device, the cheapest first."""
    ways = []
    train = job.train
    if train["remat"] != "full":
        ways.append("train.remat: full")
    sizes = resolve(train["mesh"], Topology.of(job.topology, job.slices).devices)
    ways_of_rows = sizes["data"] * sizes["fsdp"]
    if train["batch_rows"] // train["micro_batches"] > ways_of_rows:
        ways.append(f"train.micro_batches: {train['batch_rows'] // ways_of_rows}")
    larger = Topology.of(job.topology, job.slices).with_room(needed_bytes) if needed_bytes else None
    size = f" (by memory alone {larger})" if larger else ""
    ways += ["a larger `tensor` or `context` axis", "shorter rows", f"a larger topology{size}"]
    return f"try {', '.join(ways)}, or let --search look."
