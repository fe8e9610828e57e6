"""NVIDIA's attention: cuDNN's flash kernels, for bf16 and fp16.

Rows of one segment go through the public `jax.nn.dot_product_attention`. Packed rows need cuDNN's packed layout (each
segment by its offset and length), which JAX 0.10 offers only inside `jax._src`; all use of it is in `_packed_kernel`.

Each segment costs the memory of a whole row there: their number is an argument.

Executed on an H200 (JAX 0.11.2, cuDNN 9.19), whole rows and up to 31 segments a row: outputs and gradients were within
0.0035 of fp32. Tested without a GPU: the offsets and lengths, what is done with tokens outside of them, against a
stand-in that reads the same offsets; and that both forms lower for CUDA, and compile for an H100 up to the calls.
"""

from __future__ import annotations

import importlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxdistill.models.attention.blocks import attend_blocks
from jaxdistill.models.attention.warn import warn_once


def attend_cudnn(
    q_BTHD: Float[Array, "B T H D"],
    k_BTKD: Float[Array, "B T K D"],
    v_BTKD: Float[Array, "B T K D"],
    segment_ids_BT: Int[Array, "B T"] | None,
    *,
    window: int | None = None,
    max_segments: int | None = None,
) -> Float[Array, "B T H D"]:
    """cuDNN flash attention, or `blocks` with a warning where cuDNN does not take these inputs.

    Args:
      q_BTHD: already scaled; like the keys and values, in the dtype of the matrix products.
      segment_ids_BT: None for one segment a row, which is the fastest. Padding gives zeros.
      max_segments: the most segments of any row. cuDNN sets aside a row's fp32 gradient for each of them, used or not.
        If a row has more, or one that is torn apart, all results are NaN.
    """
    packed = segment_ids_BT is not None
    why = why_not(q_BTHD, k_BTKD, packed=packed, window=window, max_segments=max_segments)
    if why:
        warn_once(f"cuDNN attention is not used: {why}. The slower kernel 'blocks' takes its place.")
        ids = segment_ids_BT if packed else jnp.ones(q_BTHD.shape[:2], jnp.int32)
        return attend_blocks(q_BTHD, k_BTKD, v_BTKD, ids, window=window)
    if segment_ids_BT is None:
        near = (window - 1, 0) if window is not None and window < q_BTHD.shape[1] else None
        return jax.nn.dot_product_attention(
            q_BTHD, k_BTKD, v_BTKD, scale=1.0, is_causal=True, local_window_size=near, implementation="cudnn"
        )
    return _attend_packed(q_BTHD, k_BTKD, v_BTKD, segment_ids_BT, max_segments)


def why_not(
    q_BTHD: jax.Array | jax.ShapeDtypeStruct,
    k_BTKD: jax.Array | jax.ShapeDtypeStruct,
    *,
    packed: bool,
    window: int | None,
    max_segments: int | None = None,
) -> str | None:
    """Why cuDNN cannot take these inputs on this machine; None if it can."""
    if q_BTHD.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes bf16 and fp16, not {q_BTHD.dtype}"
    if packed and _limits(window, q_BTHD.shape[1]):
        # JAX tests windows and packing apart, never together
        return "a sliding window over packed rows is not known to work"
    if packed and max_segments is None:
        return "it is set up for a number of segments a row, and nothing says how many there are (max_segments)"
    try:
        private = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
        version = private.check_cudnn_version()
        if packed and version < 90600:
            return f"packed rows need cuDNN 9.6, this is {version}"
        private.check_is_flash_attention(
            q_BTHD, k_BTKD, k_BTKD, private.AttentionLayout.BTNH.value, version, False, True, packed
        )
    except (ImportError, AttributeError, TypeError) as error:
        return f"this JAX ({jax.__version__}) has moved it: {error}"
    except (NotImplementedError, RuntimeError) as error:
        return str(error)
    return None


def _limits(window: int | None, T: int) -> bool:
    return window is not None and window < T


def segment_spans(
    segment_ids_BT: Int[Array, "B T"], limit: int
) -> tuple[Int[Array, "B M1"], Int[Array, "B M"], Bool[Array, ""]]:
    """Where each segment of a row starts and how long it is, as cuDNN reads them; padding belongs to none.

    Returns:
      (starts [B, limit + 1] and lengths [B, limit], filled up with -1, and whether they say all there is to say: no row
      has more than `limit` segments, and the ids rise along every row, so that none is torn apart.)
    """
    B, T = segment_ids_BT.shape
    real = segment_ids_BT != 0
    before = jnp.pad(segment_ids_BT[:, :-1], ((0, 0), (1, 0)))
    opens = real & (segment_ids_BT != before)
    # the largest id so far, 0 before the first
    so_far = jax.lax.cummax(jnp.pad(segment_ids_BT[:, :-1], ((0, 0), (1, 0))), axis=1)
    whole = ~jnp.any(opens & (segment_ids_BT <= so_far)) & jnp.all(segment_ids_BT >= 0)
    count_B = opens.sum(axis=1)
    # segments are numbered from 0 along the row; what belongs to none, or goes beyond the limit, to a last, dropped one
    number = jnp.where(real, jnp.minimum(jnp.cumsum(opens, axis=1) - 1, limit), limit)
    rows = jnp.broadcast_to(jnp.arange(B)[:, None], (B, T))
    index = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
    starts = jnp.full((B, limit + 1), T, jnp.int32).at[rows, number].min(index)
    lengths = jnp.zeros((B, limit + 1), jnp.int32).at[rows, number].add(1)
    exists = jnp.arange(limit + 1)[None] < jnp.minimum(count_B, limit)[:, None]
    starts, lengths = jnp.where(exists, starts, -1), jnp.where(exists, lengths, -1)
    return starts, lengths[:, :limit], whole & jnp.all(count_B <= limit)


def _attend_packed(q_BTHD, k_BTKD, v_BTKD, segment_ids_BT, max_segments):
    # of one segment a row the private function would take the offsets for absent
    starts, lengths, fits = segment_spans(segment_ids_BT, max(max_segments, 2))
    # cuDNN neither reads nor writes what lies outside of every segment: it may be NaN, in the gradients too
    real = (segment_ids_BT != 0)[:, :, None, None]
    # the private function counts the keys' offsets in query heads: as many of both keeps them right
    times = q_BTHD.shape[2] // k_BTKD.shape[2]
    k, v = (jnp.repeat(x, times, axis=2) for x in (k_BTKD, v_BTKD))
    out = _packed_kernel(*(jnp.where(real, x, 0) for x in (q_BTHD, k, v)), starts, lengths)
    # what would be wrong must not be taken for right
    return jnp.where(fits, jnp.where(real, out, 0), jnp.nan)


def _packed_kernel(q, k, v, starts, lengths):
    """Causal attention within each span; all of JAX's private interface that is used."""
    private = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    return private.dot_product_attention(
        q, k, v, q_seqlen=lengths, kv_seqlen=lengths, q_offsets=starts, kv_offsets=starts,
        scale=1.0, mask_type=private.MaskType.PADDING_CAUSAL, qkv_layout="BTNH",
    )  # fmt: skip
