"""The door to Pallas' Triton backend: all of it that is used, and why it cannot be.

JAX 0.10 to 0.12 have it. Since 0.11 lowering for it gives a DeprecationWarning (it is to be removed at some time), which
this module silences: `why_not` speaks when it is gone. Interpret mode needs no GPU.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

HEAD_DIM = 256
"""The widest head that the kernels were made for."""
CAPABILITY = 8.0
"""Of the oldest GPUs with units for bf16 products (A100, 2020)."""


def why_not(dtype: DTypeLike, head_dim: int, device: Any | None = None) -> str | None:
    """Why kernels in Triton cannot take such inputs on this device (or JAX's first); None if they can."""
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"it takes bf16 and fp16, not {jnp.dtype(dtype)}"
    if head_dim > HEAD_DIM:
        return f"heads of {head_dim} are wider than {HEAD_DIM}"
    device = jax.devices()[0] if device is None else device
    # devices that are only described may not say it
    capability = str(getattr(device, "compute_capability", "") or "")
    if capability.startswith("gfx"):
        return f"it was never tried on AMD's GPUs ({capability})"
    if capability and float(capability) < CAPABILITY:
        return f"a GPU of compute capability {capability} is too old, it takes {CAPABILITY} or newer"
    return _missing()


@functools.cache
def _missing() -> str | None:
    """What this JAX lacks."""
    try:
        backend = _backend()
        importlib.import_module("jax._src.pallas.triton.pallas_call_registration")
        missing = [name for name in ("CompilerParams", "load", "store") if not hasattr(backend, name)]
    except ImportError as error:
        return f"this JAX ({jax.__version__}) has no Triton backend for Pallas: {error}"
    return f"this JAX's ({jax.__version__}) Triton backend lacks {', '.join(missing)}" if missing else None


@functools.cache
def _backend() -> Any:
    warnings.filterwarnings("ignore", message="The Pallas Triton backend is deprecated", category=DeprecationWarning)
    return importlib.import_module("jax.experimental.pallas.triton")


def kernel_call(
    kernel: Callable[..., None],
    out: Sequence[jax.ShapeDtypeStruct],
    *,
    grid: tuple[int, ...],
    in_specs: Sequence[pl.BlockSpec],
    out_specs: Sequence[pl.BlockSpec],
    warps: int,
    stages: int,
    interpret: bool,
) -> Callable[..., Sequence[jax.Array]]:
    """`pl.pallas_call` for Triton; `interpret` runs the kernel's steps as plain JAX, on any backend, slowly."""
    return pl.pallas_call(
        kernel, out, grid=grid, in_specs=in_specs, out_specs=out_specs, interpret=interpret,
        compiler_params=None if interpret else _backend().CompilerParams(num_warps=warps, num_stages=stages),
    )  # fmt: skip


def load(ref: Any, width: int) -> jax.Array:
    """ref [n, W] with columns from `width` on read as 0: they lie outside of the array."""
    if ref.shape[-1] == width:
        return ref[...]
    return _backend().load(ref, mask=(jnp.arange(ref.shape[-1]) < width)[None, :], other=0.0)


def store(ref: Any, x: jax.Array, width: int) -> None:
    """ref[:, :width] = x[:, :width]."""
    if ref.shape[-1] == width:
        ref[...] = x
    else:
        _backend().store(ref, x, mask=(jnp.arange(ref.shape[-1]) < width)[None, :])


def dot(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    """a [n, m] with axis `axis` of b, summed in fp32."""
    return jax.lax.dot_general(
        a, b, (((1,), (axis,)), ((), ())), precision=jax.lax.Precision.DEFAULT, preferred_element_type=jnp.float32
    )
