"""Options of the compiler for one step, by platform."""

from __future__ import annotations

from typing import Any


def step_options(platform: str, *, deterministic: bool = False) -> dict[str, Any] | None:
    """What `jax.jit` passes to XLA for the train step; None for XLA's own choices.

    Args:
      platform: `cpu`, `tpu` or `gpu`: where the step will run.
      deterministic: see `train.deterministic`; CPUs and TPUs need nothing for it.
    """
    if platform == "gpu" and deterministic:
        # it leaves out atomic additions and the timing of kernels, whose choice may differ from process to process
        return {"xla_gpu_deterministic_ops": True}
    return None
