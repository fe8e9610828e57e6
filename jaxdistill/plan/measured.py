"""What a step on virtual CPU devices really takes, to hold plans against: a `Job` from stdin, a `Measured` to stdout.

    python -m jaxdistill.plan.measured < job.json

Memory is what the process has resident at its peak, above what it had before the state was made. FLOPs are those of the
matrix products that were executed, each as often as the profiler saw it run; loops whose length depends on the data
count as they went.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from jaxdistill.plan import environments
from jaxdistill.plan.hlo import Computations, Op, parse
from jaxdistill.plan.job import Job
from jaxdistill.plan.products import convolution_flops, dot_flops
from jaxdistill.plan.targets import Topology

ANSWER = "jaxdistill-measured: "


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """Of one step, over all devices together."""

    bytes: float
    flops: float
    seconds: float
    loss: float


def measure(job: Job) -> Measured:
    """Runs the step of a job for `cpu:N` in a process of its own.

    Raises:
      ValueError: it ended without an answer.
    """
    topology = Topology.of(job.topology, job.slices)
    assert topology.chip.platform == "cpu", "other devices are not here"
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
    environment = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={topology.devices}".strip(),
        # what is freed goes back to the system, so that what is resident is in use
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }
    ran = subprocess.run(
        [sys.executable, "-m", "jaxdistill.plan.measured"],
        input=json.dumps(dataclasses.asdict(job)),
        env=environments.variables() | environment,
        capture_output=True,
        text=True,
    )
    lines = [line for line in ran.stdout.splitlines() if line.startswith(ANSWER)]
    if not lines:
        raise ValueError(f"{topology}: the step was not measured: {ran.stderr.strip()[-600:]}")
    return Measured(**json.loads(lines[-1].removeprefix(ANSWER)))


def main() -> int:
    job = Job(**json.load(sys.stdin))
    print(ANSWER + json.dumps(dataclasses.asdict(_run(job, Topology.of(job.topology, job.slices)))))
    return 0


def _run(job: Job, topology: Topology) -> Measured:
    import jax
    import jax.numpy as jnp

    from jaxdistill.plan.worker import make_described
    from jaxdistill.train.program import abstract_inputs

    made, dtypes = make_described(job, topology)
    inputs = abstract_inputs(made, **dtypes)
    compiled = made.step.lower(*inputs).compile()
    text = compiled.as_text()
    assert text is not None

    def fill(path: Any, x: jax.ShapeDtypeStruct) -> jax.Array:
        if path[-1] == jax.tree_util.DictKey("positions"):
            return jnp.broadcast_to(jnp.arange(x.shape[1], dtype=x.dtype)[None], x.shape)
        # the guard and the optimizer's counts start at 0; every token is trained, in one segment a row
        known: dict[Any, float] = {"regions": 2, "segment_ids": 1, "tokens": 1}
        return jnp.full(x.shape, known.get(getattr(path[-1], "key", None), 0.01 if x.ndim else 0), x.dtype)

    def make() -> Any:
        return jax.tree.map_with_path(fill, inputs)

    ready = jax.jit(make, out_shardings=jax.tree.map(lambda x: x.sharding, inputs)).lower().compile()
    ctypes.CDLL(None).malloc_trim(0)
    before = _resident("VmRSS")
    state, *others = jax.block_until_ready(ready())
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    state, _ = jax.block_until_ready(compiled(state, *others))
    peak = _resident("VmHWM") - before
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            state, metrics = jax.block_until_ready(compiled(state, *others))
        seconds = time.monotonic() - begun
        flops = executed_flops(text, Path(folder))
    return Measured(bytes=peak, flops=flops, seconds=seconds, loss=float(metrics["loss"]))


def _resident(name: str) -> float:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found, f"Linux tells {name}"
    return int(found.group(1)) * 1024.0


def executed_flops(text: str, folder: Path) -> float:
    """FLOPs of all matrix products in a trace of jax.profiler, of the program with this text."""
    import jax

    costs = flops_by_op(parse(text)[0])
    total = 0.0
    for file in folder.rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            for line in plane.lines:
                for event in line.events:
                    if event.name in costs and any(key == "hlo_op" for key, _ in event.stats):
                        total += costs[event.name]
    return total


def flops_by_op(computations: Computations) -> dict[str, float]:
    """FLOPs of one run of every instruction that holds matrix products, loops aside."""

    def inside(op: Op) -> dict[str, Op]:
        return computations[op.attribute(r"calls=%?([\w.\-]+)") or ""]

    def cost(op: Op, ops: dict[str, Op]) -> float:
        if op.opcode == "dot":
            return dot_flops(op, ops)
        if op.opcode == "convolution":
            return convolution_flops(op, ops)
        return sum(cost(inner, inside(op)) for inner in inside(op).values()) if op.opcode == "fusion" else 0.0

    found = {op.name: cost(op, ops) for ops in computations.values() for op in ops.values()}
    return {name: flops for name, flops in found.items() if flops}


if __name__ == "__main__":
    sys.exit(main())
