"""Attention: one interface, the best kernel of each backend, and how it is spread over a mesh.

Dimension key: B rows, T tokens, S key tokens, H query heads, K key heads, D head_dim.

Rows are split over the mesh axes "data" and "fsdp", heads over "tensor", and tokens over "context". Each kernel sees
what one device holds. With a "context" axis, a device's heads and tokens are exchanged: every device gets all tokens of
some of the heads (DeepSpeed-Ulysses, arXiv:2309.14509), so each kernel works as it is and causal work is even. Where
heads cannot be shared out so, the keys and values of all tokens are gathered instead, and each device computes its own
queries with `triton`, `blocks` or `dense`; the device with the last tokens then has about twice the average work.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxdistill.models.attention import cudnn, pallas
from jaxdistill.models.attention.blocks import attend_blocks
from jaxdistill.models.attention.cudnn import attend_cudnn
from jaxdistill.models.attention.dense import attend_dense
from jaxdistill.models.attention.residuals import ATTENDED, STATISTICS, keep_attention
from jaxdistill.models.attention.splash import attend_splash
from jaxdistill.models.attention.triton import attend_triton
from jaxdistill.models.attention.warn import warn_once
from jaxdistill.parallel import mesh as meshes

__all__ = ["ATTENDED", "KERNELS", "STATISTICS", "attention", "choose", "keep_attention", "platform_of"]

KERNELS: Mapping[str, Callable[..., jax.Array]] = {
    "dense": attend_dense,
    "blocks": attend_blocks,
    "splash": attend_splash,
    "triton": attend_triton,
    "cudnn": attend_cudnn,
}
"""(q [B,T,H,D] already scaled, k and v [B,S,K,D], segment_ids [B,S], window=) -> [B,T,H,D], in the inputs' dtype, or in
fp32 from `dense` and `blocks`."""

DENSE_TOKENS = 1024
"""CPUs take rows of up to this many tokens densely: scores of 4 MiB a head. It depends on nothing else, so that the
same row gives the same numbers in every batch."""


def attention(
    q_BTHD: Float[Array, "B T H D"],
    k_BTKD: Float[Array, "B T K D"],
    v_BTKD: Float[Array, "B T K D"],
    segment_ids_BT: Int[Array, "B T"] | None,
    *,
    scale: float,
    window: int | None = None,
    dtype: DTypeLike,
    mesh: Mesh | None = None,
    kernel: str = "auto",
    out_dtype: DTypeLike = jnp.float32,
    max_segments: int | None = None,
    deterministic: bool = False,
) -> Float[Array, "B T HD"]:
    """Causal self-attention to earlier tokens of the same segment; returns [B, T, H * D].

    Query head h uses key head h // (H / K).

    Args:
      segment_ids_BT: tokens of one packed example share a number; 0 is padding, which sees and is seen by padding
        alone: its results are finite and mean nothing. None: one segment a row.
      scale: multiplies the scores; usually D ** -0.5.
      window: a query sees this many tokens, itself among them (Hugging Face's `sliding_window`); None: all before it.
      dtype: of the matrix products' inputs; scores, softmax and sums are fp32.
      mesh: if its axes are larger than 1, the work is spread over it; sizes that an axis does not divide are not split.
      kernel: one of `KERNELS`, or "auto", which chooses by backend, see `choose`.
      out_dtype: of the result.
      max_segments: the most segments of any row, for cuDNN, which is set up for as many.
      deterministic: the same inputs give the same gradients, to the bit.
    Raises:
      ValueError: an unknown kernel, a window below 1, key heads that do not divide the query heads, or cuDNN where
        `deterministic` is asked for.
    """
    H, K = q_BTHD.shape[2], k_BTKD.shape[2]
    if H % K:
        raise ValueError(f"{H} query heads are not a multiple of {K} key heads.")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; a query sees itself at least: set 1 or more, or None.")
    platform, device = platform_of(mesh), None if mesh is None else mesh.devices.flat[0]
    if kernel == "auto":
        kernel = choose(
            platform, q_BTHD.shape[1], q_BTHD.shape[3], dtype, packed=segment_ids_BT is not None, window=window,
            max_segments=max_segments, deterministic=deterministic, device=device,
        )  # fmt: skip
    elif kernel == "cudnn" and deterministic:
        raise ValueError(
            "attention kernel cudnn adds up gradients in any order, and deterministic is set; choose auto or triton."
        )
    elif kernel == "triton" and platform == "gpu" and (why := pallas.why_not(dtype, q_BTHD.shape[3], device)):
        warn_once(f"Attention in Triton is not used: {why}. The slower kernel 'blocks' takes its place.")
        kernel = "blocks"
    if kernel not in KERNELS:
        raise ValueError(f"attention kernel {kernel!r} is unknown; choose auto or one of {', '.join(KERNELS)}.")
    options: Mapping[str, Any] = {
        "splash": {"interpret": platform != "tpu"},
        "triton": {"interpret": platform != "gpu", "roomy": pallas.is_roomy(device)},
        "cudnn": {"max_segments": max_segments},
    }.get(kernel, {})
    compute = functools.partial(
        _local_attention, scale=scale, window=window, dtype=jnp.dtype(dtype), kernel=kernel, options=options
    )
    if mesh is None or mesh.size == 1:
        out = compute(q_BTHD, k_BTKD, v_BTKD, segment_ids_BT)
    else:
        out = _over_mesh(compute, mesh, q_BTHD, k_BTKD, v_BTKD, segment_ids_BT)
    return out.reshape(*out.shape[:2], -1).astype(out_dtype)


def platform_of(mesh: Mesh | None) -> str:
    """`cpu`, `tpu` or `gpu`: where the computation will run, which need not be where it is compiled."""
    platform = mesh.devices.flat[0].platform if mesh is not None else jax.default_backend()
    return "gpu" if platform in ("cuda", "rocm") else platform


def choose(
    platform: str,
    T: int,
    head_dim: int,
    dtype: DTypeLike,
    *,
    packed: bool = True,
    window: int | None = None,
    max_segments: int | None = None,
    deterministic: bool = False,
    device: Any | None = None,
) -> str:
    """The kernel for a backend, row length and dtype.

    On GPUs it is `triton` for packed rows, whose cost follows their segments, and cuDNN, the fastest there, for whole
    ones. What cannot be had is replaced by the other of the two, or else by `blocks`, with one warning.

    Args:
      packed: rows have segment ids.
      device: that the computation will run on, JAX's first if None.
    """
    if platform == "tpu":
        return "splash"
    # fp32 is for checks, which kernels of 16 bits would not pass
    if platform == "gpu" and jnp.dtype(dtype).itemsize == 2:
        q = jax.ShapeDtypeStruct((1, T, 1, head_dim), jnp.dtype(dtype))
        found = {
            "triton": pallas.why_not(dtype, head_dim, device),
            "cudnn": "its backward pass is not deterministic" if deterministic
            else cudnn.why_not(q, q, packed=packed, window=window, max_segments=max_segments),
        }  # fmt: skip
        return _first_of(("triton", "cudnn") if packed or deterministic else ("cudnn", "triton"), found)
    if platform == "cpu" and T <= DENSE_TOKENS:
        return "dense"
    return "blocks"


def _first_of(wanted: Sequence[str], why_not: Mapping[str, str | None]) -> str:
    """The first kernel that there is; loud, if it is not the first that was wanted."""
    name = next((name for name in wanted if why_not[name] is None), "blocks")
    missing = [f"{other}: {why_not[other]}" for other in wanted if why_not[other] is not None]
    if name == "blocks":
        warn_once(
            "Attention goes by the kernel 'blocks', which is several times slower than others on this GPU. "
            f"{'; '.join(missing)}. A GPU of compute capability {pallas.CAPABILITY} or newer (A100, RTX 30) "
            "with jax[cuda13] 0.10 to 0.12 has them."
        )
    elif name != wanted[0]:
        warn_once(f"Attention goes by the kernel {name!r} instead of {wanted[0]!r}. {missing[0]}.")
    return name


def _local_attention(q, k, v, segment_ids, *, scale, window, dtype, kernel, options, context=1):
    """What one device computes of its own shards; `context` > 1 says how many devices share the tokens."""
    q = q.astype(jnp.float32) * scale
    exchanged = context > 1 and q.shape[2] % context == 0
    run = functools.partial(KERNELS[kernel], window=window, **options)
    if exchanged:
        # as many key heads as there are devices to take them, at least
        times = math.lcm(k.shape[2], context) // k.shape[2]
        k, v = (jnp.repeat(x, times, axis=2) for x in (k, v))
        q, k, v = (jax.lax.all_to_all(x.astype(dtype), "context", 2, 1, tiled=True) for x in (q, k, v))
    elif context > 1:
        # gathered in full, for the sums over devices in the backward pass are fp32
        start = jax.lax.axis_index("context") * q.shape[1]
        k, v = (jax.lax.all_gather(x, "context", axis=1, tiled=True) for x in (k, v))
        if kernel == "triton":
            run = functools.partial(run, start=start)
        else:
            run = functools.partial(attend_dense if kernel == "dense" else attend_blocks, window=window, start=start)
            kernel = "blocks"
    if context > 1 and segment_ids is not None:
        segment_ids = jax.lax.all_gather(segment_ids, "context", axis=1, tiled=True)
    if segment_ids is None and kernel != "cudnn":
        segment_ids = jnp.ones(k.shape[:2], jnp.int32)
    out = run(q.astype(dtype), k.astype(dtype), v.astype(dtype), segment_ids)
    if exchanged:
        out = jax.lax.all_to_all(out, "context", 1, 2, tiled=True)
    return out


def _over_mesh(compute, mesh, q, k, v, segment_ids):
    rows = _axes("batch", q.shape[0], mesh)
    tokens = _axes("sequence", q.shape[1], mesh)
    heads = _axes("heads", q.shape[2], mesh)
    if heads:
        # every device needs a key head of its own
        times = math.lcm(k.shape[2], mesh.shape[heads]) // k.shape[2]
        k, v = (jnp.repeat(x, times, axis=2) for x in (k, v))
    if tokens:
        compute = functools.partial(compute, context=mesh.shape[tokens])
    spec = PartitionSpec(rows, tokens, heads, None)
    specs = (spec, spec, spec, None if segment_ids is None else PartitionSpec(rows, tokens))
    return jax.shard_map(compute, mesh=mesh, in_specs=specs, out_specs=spec, check_vma=False)(q, k, v, segment_ids)


def _axes(name: str, size: int, mesh: Mesh) -> Any:
    """The mesh axes that a logical axis of this size is split over; None if they do not divide it, or are of size 1."""
    axes = meshes.RULES[name]
    ways = meshes.ways(mesh, axes)
    return axes if ways > 1 and size % ways == 0 else None
