"""Options of the compiler for one step, by platform."""

from __future__ import annotations

from typing import Any


def step_options(platform: str, *, deterministic: bool = False) -> dict[str, Any] | None:
    """What `jax.jit` passes to XLA for the train step; None for XLA's own choices.

    Args:
      platform: `cpu`, `tpu` or `gpu`: where the step will run.
      deterministic: see `train.deterministic`; CPUs and TPUs need nothing for it.
    """
    if platform == "gpu":
        # products of one input are not joined to one: its result would be cut up again, in copies
        options: dict[str, Any] = {"xla_gpu_dot_merger_threshold_mb": 0}
        # it leaves out atomic additions and the timing of kernels, whose choice may differ from process to process
        return options | ({"xla_gpu_deterministic_ops": True} if deterministic else {})
    if platform == "tpu":
        # from this many MiB on, products are cut in pieces that follow a gathered matrix around the devices ("windowed
        # einsum"), and their fp32 partial sums are added in memory, permutation by permutation: never
        return {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 1 << 20}
    return None
