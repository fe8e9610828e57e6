"""From a compiled step to a range of seconds: data sheets, the compiler's cycle counts, and assumptions that are said.

TPUs: the compiler counts cycles. GPUs: a roofline; a matrix product takes as long as its FLOPs or its bytes, whichever
takes longer, and everything else but attention as long as its bytes. The shares for GPUs come from one NVIDIA H200. The
fast ones are what a large bf16 product (790 TFLOP/s) and a copy (4.3 TB/s) reach there. The slow ones are so far below
that what a profile of one step showed lies in the middle (Qwen3-0.6B, 4 rows of 8,192 tokens, everything recomputed):
products took 197 ms where the fast shares give 176, and what moves bytes 169 ms where they give 156. Nothing was
checked against a TPU or another GPU. The range is between two sets of assumptions, not a confidence interval.
"""

from __future__ import annotations

import dataclasses

from jaxdistill.plan.costs import outside_bytes
from jaxdistill.plan.job import Compiled, Traffic
from jaxdistill.plan.targets import Topology

LAUNCH_SECONDS = 2.4e-6
"""From one kernel's start to the next one's on a GPU, at least: fits the token step of a decoder on an H200, of 714
kernels (tools/RESULTS.md)."""
HOST_GBPS = 64
"""Between a GPU and its host's memory, one way: PCIe of the fifth generation, 16 lanes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assumptions:
    """Shares of what the data sheet promises."""

    cycles: float
    """Seconds of other work for each second that the compiler counts (TPUs)."""
    matrix: float
    """Of the peak, for matrix products (GPUs)."""
    memory: float
    """Of the memory's bandwidth (GPUs)."""
    whole: float
    """Of the peak, for all but attention where neither cycles nor bytes are of use: code made with little effort."""
    kernels: float
    """Of the peak, for attention kernels."""
    links: float
    """Of the links' bandwidth."""
    hidden: float
    """Of asynchronous communication that computation hides, at most."""


FAST = Assumptions(cycles=1.0, matrix=0.8, memory=0.9, whole=0.75, kernels=0.6, links=0.9, hidden=1.0)
SLOW = Assumptions(cycles=1.3, matrix=0.62, memory=0.75, whole=0.45, kernels=0.3, links=0.6, hidden=0.5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """Of one step, under one set of assumptions; seconds."""

    compute: float
    kernels: float
    exposed: float
    """Communication that nothing hides."""
    memory: float = 0.0
    """Of what only moves bytes (GPUs; among the compute of TPUs)."""
    launches: float = 0.0
    """What launching the kernels takes beyond the work in them (GPUs): it bounds small steps."""

    @property
    def seconds(self) -> float:
        return self.compute + self.memory + self.kernels + self.launches + self.exposed


def estimate(found: Compiled, topology: Topology, given: Assumptions, *, quick: bool = False) -> Estimate:
    """Seconds of a step on devices of this topology; meaningless for CPUs.

    Args:
      quick: it was compiled with little effort. Such code is several times slower than what runs in the end, so its
        cycles are not looked at.
    """
    chip = topology.chip
    peak = chip.tflops * 1e12
    compute, memory = found.flops / (peak * given.whole), 0.0
    if found.cycles and chip.clock_ghz and not quick:
        # never faster than the peak, whatever the compiler counts
        compute = max(found.cycles * given.cycles / (chip.clock_ghz * 1e9), found.flops / peak)
    elif chip.platform == "gpu" and found.products:
        bandwidth = chip.hbm_gbps * 1e9 * given.memory
        compute = sum(n * max(flops / (peak * given.matrix), size / bandwidth) for flops, size, n in found.products)
        memory = outside_bytes(found.moved) / bandwidth
    kernels = sum(found.kernel_flops.values()) / (peak * given.kernels)
    background = sum(seconds_of(t, topology) for t in found.traffic if t.asynchronous) / given.links
    waited = sum(seconds_of(t, topology) for t in found.traffic if not t.asynchronous) / given.links
    # to the host and back, beside computation
    background += found.offloaded_bytes / (HOST_GBPS * 1e9 * given.links)
    hidden = min(background * given.hidden, compute + memory + kernels)
    launches = 0.0
    if chip.platform == "gpu":
        launches = max(0.0, found.launches * LAUNCH_SECONDS - compute - memory - kernels)
    exposed = waited + background - hidden
    return Estimate(compute=compute, memory=memory, kernels=kernels, launches=launches, exposed=exposed)


def seconds_of(traffic: Traffic, topology: Topology) -> float:
    """Seconds of one step's collectives at the links' full bandwidth."""
    chip = topology.chip
    if traffic.network in ("DCN", "network"):
        bandwidth = chip.outside_gbps
    else:
        # a ring sends both ways at once, a line one way
        bandwidth = chip.link_gbps * (2 * traffic.axes if chip.platform == "tpu" else 1.0)
    return traffic.bytes / (bandwidth * 1e9) if bandwidth else 0.0


def said(topology: Topology, *, quick: bool = False) -> list[str]:
    """The assumptions behind a range, for people."""
    chip, (f, s) = topology.chip, (FAST, SLOW)
    if not chip.tflops:
        return ["no step time is estimated for CPUs"]
    peak = f"{chip.tflops:g} TFLOP/s"
    if chip.platform == "gpu":
        work = (
            f"matrix products at {f.matrix:.0%} to {s.matrix:.0%} of {peak}, what moves bytes at {f.memory:.0%} to "
            f"{s.memory:.0%} of {chip.hbm_gbps:g} GB/s"
        )
        rows, checked = "segments as long as --segment-tokens says", "these shares come from one H200"
    else:
        work = (
            f"the compiler's cycle counts at {chip.clock_ghz:g} GHz, times {f.cycles:g} to {s.cycles:g}"
            if chip.clock_ghz and not quick
            else f"all but attention at {f.whole:.0%} to {s.whole:.0%} of {peak}"
        )
        rows, checked = "whole rows", "nothing here was measured on this hardware"
    inside = "both ways along each ring of the torus" if chip.platform == "tpu" else "NVLink, one way"
    outside = f", {chip.outside_gbps:g} GB/s a device between {'slices' if chip.platform == 'tpu' else 'hosts'}"
    return [
        work,
        f"attention kernels at {f.kernels:.0%} to {s.kernels:.0%} of {peak}, {rows}",
        f"links at {f.links:.0%} to {s.links:.0%} of {chip.link_gbps:g} GB/s ({inside})"
        + (outside if topology.slices > 1 else ""),
        f"asynchronous collectives hidden behind computation by {f.hidden:.0%} to {s.hidden:.0%}",
        f"no input, checkpoint or evaluation time; {checked}",
    ]
