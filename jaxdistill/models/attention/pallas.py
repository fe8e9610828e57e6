"""The door to Pallas' Triton backend: all of it that is used, and why it cannot be.

JAX 0.10 to 0.12 have it. It is to be removed at some time: since 0.11 lowering for it gives a DeprecationWarning, which
this module silences, and when it is gone, `why_not` says so. Interpret mode needs no GPU.
"""

from __future__ import annotations

import functools
import importlib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from jaxdistill.precision import precision_of

LOG2E = math.log2(math.e)
HEAD_DIM = 256
"""The widest head that the kernels were made for."""
CAPABILITY = 8.0
"""Of the oldest GPUs with units for bf16 products (A100, 2020)."""
ROOMY = (9, 10)
"""Major compute capabilities of GPUs with 227 KiB of shared memory a block."""


def why_not(dtype: DTypeLike, head_dim: int, device: Any | None = None) -> str | None:
    """Why kernels in Triton cannot take such inputs on this device (or JAX's first); None if they can."""
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"it takes bf16 and fp16, not {jnp.dtype(dtype)}"
    if head_dim > HEAD_DIM:
        return f"heads of {head_dim} are wider than {HEAD_DIM}"
    capability = capability_of(device)
    if capability.startswith("gfx"):
        return f"it was never tried on AMD's GPUs ({capability})"
    if capability and float(capability) < CAPABILITY:
        return f"a GPU of compute capability {capability} is too old, it takes {CAPABILITY} or newer"
    return _missing()


def capability_of(device: Any | None) -> str:
    """The compute capability of a GPU ("9.0"; AMD's begin with "gfx"), of JAX's first device if None; "" if unknown."""
    device = jax.devices()[0] if device is None else device
    return str(getattr(device, "compute_capability", "") or "")


def is_roomy(device: Any | None) -> bool:
    """Whether a GPU has as much shared memory as an H100."""
    return capability_of(device).split(".")[0] in map(str, ROOMY)


@functools.cache
def _missing() -> str | None:
    """What this JAX lacks."""
    try:
        backend = _backend()
        importlib.import_module("jax._src.pallas.triton.pallas_call_registration")
        missing = [
            name for name in ("CompilerParams", "elementwise_inline_asm", "load", "store") if not hasattr(backend, name)
        ]
    except ImportError as error:
        return f"this JAX ({jax.__version__}) has no Triton backend for Pallas: {error}"
    return f"this JAX's ({jax.__version__}) Triton backend lacks {', '.join(missing)}" if missing else None


@functools.cache
def _backend() -> Any:
    return importlib.import_module("jax.experimental.pallas.triton")


def kernel_call(
    kernel: Callable[..., None],
    out: Sequence[jax.ShapeDtypeStruct],
    *,
    grid: tuple[int, ...],
    in_specs: Sequence[pl.BlockSpec] | None = None,
    out_specs: Sequence[pl.BlockSpec] | None = None,
    warps: int,
    stages: int,
    interpret: bool,
    name: str,
    aliases: Mapping[int, int] | None = None,
) -> Callable[..., Sequence[jax.Array]]:
    """`pl.pallas_call` for Triton.

    Args:
      in_specs, out_specs: blocks of the arrays that a program is given; whole arrays if None.
      warps: of 32 threads, that share one program's work.
      stages: loads from memory under way at a time.
      interpret: runs the kernel's steps as plain JAX, on any backend, slowly.
      name: of a scope around the call: `plan` and profiles go by it.
      aliases: which argument's memory becomes which result's.
    """
    # again at each call, for tests put the filters back
    warnings.filterwarnings("ignore", message="The Pallas Triton backend is deprecated", category=DeprecationWarning)
    specs: dict[str, Any] = {"in_specs": in_specs, "out_specs": out_specs} if in_specs is not None else {}
    return pl.pallas_call(
        kernel, out, grid=grid, interpret=interpret, name=name, input_output_aliases=dict(aliases or {}), **specs,
        compiler_params=None if interpret else _backend().CompilerParams(num_warps=warps, num_stages=stages),
    )  # fmt: skip


def load(ref: Any, width: int, keep: jax.Array | None = None) -> jax.Array:
    """ref [n, W]; as 0 where columns lie outside of the array, from `width` on, and in lines that `keep` leaves out."""
    mask = None if ref.shape[-1] == width else (jnp.arange(ref.shape[-1]) < width)[None, :]
    if keep is not None:
        mask = jnp.broadcast_to(keep[:, None], ref.shape) & (True if mask is None else mask)
    return ref[...] if mask is None else _backend().load(ref, mask=mask, other=0.0)


def store(ref: Any, x: jax.Array, width: int) -> None:
    """ref[:, :width] = x[:, :width]."""
    if ref.shape[-1] == width:
        ref[...] = x
    else:
        _backend().store(ref, x, mask=(jnp.arange(ref.shape[-1]) < width)[None, :])


def dot(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    """a [n, m] with axis `axis` of b, summed in fp32."""
    precision = precision_of(a.dtype, b.dtype) or jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(
        a, b, (((1,), (axis,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def exp(x: jax.Array, shift: jax.Array, interpret: bool) -> jax.Array:
    """2 ** (x * LOG2E - shift), of arrays that broadcast: e ** x over 2 ** shift. GPUs know powers of 2 alone.

    Written out, it is two instructions; XLA has Triton compile it to six, for it keeps products and sums apart, and
    denormal results, which are 0 here.
    """
    if interpret:
        return jnp.exp2(x * LOG2E - shift)
    assembly = f"fma.rn.f32 $0, $1, {_as_ptx(LOG2E)}, $2; ex2.approx.ftz.f32 $0, $0;"
    [result] = _backend().elementwise_inline_asm(
        assembly, args=[x, jnp.broadcast_to(-shift, x.shape)], constraints="=f,f,f", pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.float32)],
    )  # fmt: skip
    return result


def _as_ptx(number: float) -> str:
    """The nearest fp32, as PTX writes it."""
    return f"0f{np.float32(number).view(np.uint32):08X}"
