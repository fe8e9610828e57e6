"""Options of the compiler, by platform: for the train step, and for what a training computes beside it."""

from __future__ import annotations

from typing import Any

VMEM_KIB = {"TPU v5": 48 << 10, "TPU v5p": 48 << 10}
"""By kind of device: the memory beside the multipliers that one operation may use. XLA's own limit of 16 MiB makes
products of a 7B layer read their inputs so often that they take 1.3 times their ideal on v5p, by its cycle counts."""
DETERMINISTIC: dict[str, dict[str, Any]] = {"gpu": {"xla_gpu_deterministic_ops": True}}
"""By platform: leaves out atomic additions and the timing of kernels, whose choice may differ from process to process.
CPUs and TPUs need nothing."""


def deterministic_options(platform: str) -> dict[str, Any] | None:
    """What `jax.jit` passes to XLA for programs beside the step, of a training that is `train.deterministic`."""
    return dict(DETERMINISTIC.get(platform, {})) or None


def step_options(platform: str, *, device_kind: str = "", deterministic: bool = False) -> dict[str, Any] | None:
    """What `jax.jit` passes to XLA for the train step; None for XLA's own choices.

    Args:
      platform: `cpu`, `tpu` or `gpu`: where the step will run.
      device_kind: what JAX calls the devices, which need not be those of this machine.
      deterministic: see `train.deterministic`.
    """
    if platform == "gpu":
        # products of one input are not joined to one: its result would be cut up again, in copies
        options: dict[str, Any] = {"xla_gpu_dot_merger_threshold_mb": 0}
        return options | (DETERMINISTIC["gpu"] if deterministic else {})
    if platform == "tpu":
        # from this many MiB on, products are cut in pieces that follow a gathered matrix around the devices ("windowed
        # einsum"), and their fp32 partial sums are added in memory, permutation by permutation: never
        limit = VMEM_KIB.get(device_kind)
        options = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 1 << 20}
        return options | ({} if limit is None else {"xla_tpu_scoped_vmem_limit_kib": limit})
    return None
