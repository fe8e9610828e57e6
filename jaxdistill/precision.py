"""The precision of matrix products: who asks for fp32 gets fp32, on every backend."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def precision_of(*dtypes: DTypeLike) -> jax.lax.Precision | None:
    """What a matrix product of inputs in these dtypes asks XLA for: `HIGHEST` if all are fp32, else nothing.

    Unless it is asked for, an fp32 product rounds its inputs to 10 bits on GPUs (TF32) and to 7 on TPUs (bf16): it is
    off by up to 1e-3 of the result where fp32 is off by 1e-6. CPUs compute the same program either way.
    """
    return jax.lax.Precision.HIGHEST if all(jnp.dtype(dtype) == jnp.float32 for dtype in dtypes) else None


def asking_for(dtype: DTypeLike):
    """A context in which products that ask for nothing themselves, as those of libraries, ask for that of `dtype`."""
    as_before = jax.config.jax_default_matmul_precision  # pyrefly: ignore
    return jax.default_matmul_precision(as_before if precision_of(dtype) is None else "highest")
