"""What a compiled program does: FLOPs, collectives, the compiler's own cycle counts.

XLA's `cost_analysis` counts the body of a loop once; here every loop counts as often as it runs (`loops`). One whose
length is known at run time only has to be named by the caller.
"""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Callable, Mapping

from jaxdistill.plan.hlo import Computations, Op, array_bytes, parse, replica_group
from jaxdistill.plan.loops import counted
from jaxdistill.plan.moved import COLLECTIVES, HOST, INSIDE, category_of, memory_spaces_apart, moved_bytes
from jaxdistill.plan.products import (
    MATRIX_CALLS,
    attention_flops,
    attention_kernel,
    convolution_flops,
    dot_flops,
    matrix_call_flops,
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind over groups of one shape: how many run in a step, and what one device moves."""

    kind: str
    group: tuple[int, ...]
    """The devices of one group, as indices into the mesh."""
    asynchronous: bool
    """Whether the device computes meanwhile."""


@dataclasses.dataclass
class Costs:
    """Of one device in one step."""

    flops: float = 0.0
    """Of matrix products."""
    kernel_flops: defaultdict[str, float] = dataclasses.field(default_factory=lambda: defaultdict(float))
    """Of attention kernels, which are opaque to the compiler: by their shapes, for whole rows of one segment."""
    cycles: float = 0.0
    """The compiler's own estimate for everything but kernels and collectives; 0 where it makes none."""
    kernels: defaultdict[str, float] = dataclasses.field(default_factory=lambda: defaultdict(float))
    """Calls of kernels and libraries by name."""
    collective_bytes: defaultdict[Collective, float] = dataclasses.field(default_factory=lambda: defaultdict(float))
    """Bytes that one device sends."""
    collective_calls: defaultdict[Collective, float] = dataclasses.field(default_factory=lambda: defaultdict(float))
    moved: defaultdict[str, float] = dataclasses.field(default_factory=lambda: defaultdict(float))
    """Bytes that are read from and written to memory, by category (`moved`)."""
    launches: float = 0.0
    """Instructions that move bytes: on GPUs about as many kernels are launched."""
    offloaded_bytes: float = 0.0
    """Bytes that go to or come from the host's memory (offloaded activations; GPUs)."""
    moved_by: defaultdict[tuple[str, str, str], float] = dataclasses.field(default_factory=lambda: defaultdict(float))
    """The same by category, instruction, and scope."""
    products: defaultdict[tuple[float, float], float] = dataclasses.field(default_factory=lambda: defaultdict(float))
    """Matrix products by (FLOPs, bytes moved) of one: how many there are."""
    unknown_loops: defaultdict[str, float] = dataclasses.field(default_factory=lambda: defaultdict(float))
    """Loops whose length nobody knew, by scope; counted as running once."""


def analyze(
    text: str, devices: int, loops: Callable[[str], float | None] = lambda scope: None, *, platform: str = "gpu"
) -> Costs:
    """
    Args:
      devices: of the mesh.
      loops: how often a loop runs whose end is not in the program, by its scope; None if it does not know either.
      platform: gpu, tpu or cpu: which memory is not HBM.
    """
    computations, entry = parse(text)
    walk = _Walk(computations, devices, loops, memory_spaces_apart(platform))
    walk.run(entry, 1.0, False, set())
    return walk.costs


def outside_bytes(moved: Mapping[str, float]) -> float:
    """Bytes moved by everything but matrix products, attention kernels and collectives."""
    return sum(size for category, size in moved.items() if category not in INSIDE)


class _Walk:
    def __init__(
        self,
        computations: Computations,
        devices: int,
        loops: Callable[[str], float | None],
        apart: tuple[int, ...],
    ):
        self.all, self.devices, self.loops, self.apart, self.costs = computations, devices, loops, apart, Costs()

    def run(self, name: str, times: float, fused: bool, seen: set[str]) -> None:
        """Adds a computation that runs so many times; `seen` holds the collectives of this run of the loop."""
        ops = self.all[name]
        for op in ops.values():
            before = self.costs.flops
            if op.opcode == "dot":
                self.costs.flops += times * dot_flops(op, ops)
            elif op.opcode == "convolution":
                self.costs.flops += times * convolution_flops(op, ops)
            elif op.opcode == "custom-call":
                self._call(op, ops, times)
            elif op.opcode.removesuffix("-start") in COLLECTIVES:
                self._collective(op, name, times, fused, seen)
            if not fused:
                self.costs.cycles += times * float(op.attribute(r'"estimated_cycles":"(\d+)"') or 0)
            self._inner(op, ops, times, fused, seen)
            if not fused:
                self._moved(op, ops, times, self.costs.flops - before)

    def _moved(self, op: Op, ops: Mapping[str, Op], times: float, flops: float) -> None:
        size = moved_bytes(op, ops, self.all, self.apart)
        if HOST in self.apart and f"S({HOST})" in op.type + "".join(ops[o].type for o in op.operands if o in ops):
            elsewhere = tuple(space for space in self.apart if space != HOST)
            self.costs.offloaded_bytes += times * (moved_bytes(op, ops, self.all, elsewhere) - size)
        if size:
            category = category_of(op, self.all)
            self.costs.launches += times
            self.costs.moved[category] += times * size
            self.costs.moved_by[category, op.name, op.scope] += times * size
            if category == "products" and times:
                self.costs.products[round(flops / times), size] += times

    def _inner(self, op: Op, ops: Mapping[str, Op], times: float, fused: bool, seen: set[str]) -> None:
        if op.opcode == "while":
            body, condition = op.attribute(r"body=%?([\w.\-]+)"), op.attribute(r"condition=%?([\w.\-]+)")
            assert body and condition, f"{op.name} is a loop without a body"
            self.run(body, times * self.trips(op, ops, body, condition), False, set())
        elif op.opcode == "conditional":
            # one of them runs: that of a true condition, which has the last number (`cudnn._packed_or_blocks`)
            branches = re.findall(r"%([\w.\-]+)", op.attribute(r"branch_computations=\{([^}]*)\}") or "")
            taken = op.attribute(r"true_computation=%?([\w.\-]+)") or branches[-1]
            self.run(taken, times, False, seen)
        elif op.opcode in ("fusion", "fusion-start", "call", "async-start"):
            called = op.attribute(r"(?:calls|to_apply)=%?([\w.\-]+)")
            if called:
                self.run(called, times, fused or op.opcode.startswith("fusion"), seen)

    def _call(self, op: Op, ops: Mapping[str, Op], times: float) -> None:
        target = op.attribute(r'custom_call_target="([^"]+)"') or "?"
        if target in MATRIX_CALLS:
            self.costs.flops += times * matrix_call_flops(op, ops)
        kernel = attention_kernel(op, target)
        if kernel:
            name, flops = kernel[0], attention_flops(kernel[0], op, ops) * kernel[1]
            self.costs.kernel_flops[name] += times * flops
            self.costs.kernels[name] += times
        elif target.startswith("__"):
            self.costs.kernels[target] += times

    def _collective(self, op: Op, computation: str, times: float, fused: bool, seen: set[str]) -> None:
        # a collective that runs beside several fusions stands in each of them, with one channel, and starts in one
        if "chain_id=" in op.rest and not self._starts(computation):
            return
        channel = op.attribute(r"channel_id=(\d+)") or op.name
        if channel in seen:
            return
        seen.add(channel)
        kind, started = op.opcode.removesuffix("-start"), op.opcode.endswith("-start")
        group = tuple(replica_group(op.rest, self.devices))
        n = len(group)
        if n <= 1:
            return
        # where TPUs form a reduce-scatter from an all-reduce, it moves half of that
        if kind == "all-reduce" and "all-reduce-scatter" in computation:
            kind = "reduce-scatter"
            sent = sum(array_bytes(op.type)) * (n - 1) / n
        else:
            sent = sent_bytes(kind, op, started, n)
        asynchronous = started or fused or "async_collective_name" in op.rest or '"is_sync":false' in op.rest
        key = Collective(kind, group, asynchronous and '"is_sync":true' not in op.rest)
        self.costs.collective_bytes[key] += times * sent
        self.costs.collective_calls[key] += times

    def _starts(self, computation: str) -> bool:
        return any('"AsyncCollectiveStart"' in op.rest for op in self.all[computation].values())

    def trips(self, op: Op, ops: Mapping[str, Op], body: str, condition: str) -> float:
        """How often a loop runs."""
        known = op.attribute(r'known_trip_count"?:\{"n":"(\d+)"')
        if known:
            return float(known)
        found = counted(op, ops, self.all, body, condition)
        if found is None:
            told = self.loops(op.scope)
            if told is None:
                self.costs.unknown_loops[op.scope] += 1
            return 1.0 if told is None else told
        return found


def sent_bytes(kind: str, op: Op, started: bool, n: int) -> float:
    """Bytes that each of n devices sends, by the ring algorithms."""
    arrays = array_bytes(op.type)
    if started and len(arrays) > 1:
        # (operands..., results..., and for permutes two words of context)
        arrays = [size for size in arrays if size > 4]
        half = len(arrays) // 2
        arrays = arrays[half : 2 * half] if half else arrays
    size = sum(arrays)
    return {
        "all-gather": size * (n - 1) / n,
        "all-reduce": 2 * size * (n - 1) / n,
        "reduce-scatter": size * (n - 1),
        "all-to-all": size * (n - 1) / n,
        "collective-permute": size,
    }[kind]
