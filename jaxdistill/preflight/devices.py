"""Whether `train.mesh` fits the devices of this machine, as far as they can be counted without JAX taking them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

from jaxdistill.config import RunConfig, to_dict
from jaxdistill.preflight.finding import Finding

AXES = ("data", "fsdp", "tensor", "context")
_CPU_FLAG = re.compile(r"--xla_force_host_platform_device_count=(\d+)")


def check(config: RunConfig) -> Iterator[Finding]:
    """A warning and no error, as the training may run elsewhere, or in several processes."""
    counted = count_devices()
    if counted is None:
        return
    number, kind = counted
    sizes = {axis: size for axis, size in to_dict(config.train.mesh).items() if axis in AXES}
    known = math.prod(size for size in sizes.values() if size != -1)
    if number % known == 0 and (-1 in sizes.values() or number == known):
        return
    written = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    wanted = f"a multiple of {known}" if -1 in sizes.values() else f"{known}"
    yield Finding(
        "train.mesh",
        "warning",
        f"{written} takes {wanted} devices, and this machine has {number} ({kind}): train would refuse it here; change "
        "it, unless the training runs elsewhere or in several processes.",
    )


def count_devices(root: Path = Path("/dev")) -> tuple[int, str] | None:
    """How many devices JAX would find here, and of which kind; None where only JAX itself could tell.

    Args:
      root: where the devices' files are.
    """
    wanted = os.environ.get("JAX_PLATFORMS", "").lower().split(",")[0]
    plugins = {point.name for point in importlib.metadata.entry_points(group="jax_plugins")}
    tpus = importlib.util.find_spec("libtpu") is not None and (
        any(root.glob("accel*")) or any(root.glob("vfio/[0-9]*"))
    )
    if wanted not in ("", "cpu", "cuda", "gpu") or (wanted == "" and (tpus or not all("cuda" in p for p in plugins))):
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = len([name for name in root.glob("nvidia*") if name.name.removeprefix("nvidia").isdigit()])
    if wanted != "cpu" and plugins and gpus:
        if visible is None:
            return gpus, "gpu"
        named = [name for name in visible.split(",") if name.strip()]
        if named:
            return None if any("MIG" in name or "-1" in name for name in named) else (len(named), "gpu")
    if wanted in ("cuda", "gpu"):  # JAX says itself that there are none
        return None
    flag = _CPU_FLAG.search(os.environ.get("XLA_FLAGS", ""))
    number = os.environ.get("JAX_NUM_CPU_DEVICES", "")
    return (int(number) if number.isdigit() else int(flag[1]) if flag else 1), "cpu"
