"""The TPU's attention: the Pallas kernel "splash" that comes with JAX.

It never visits key blocks of the future or beyond the window. Segments are masked inside the blocks it visits, so
packed rows cost as much as whole ones. In interpret mode it runs on any backend, for tests.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxdistill.models.attention.residuals import ATTENDED
from jaxdistill.precision import precision_of

LANES = 128
"""Blocks hold a multiple of this many tokens."""
BLOCK = 512
HEAD_DIM_STEP = 64
"""Heads are widened with zeros to a multiple of this."""


def padded_length(T: int) -> int:
    """T rounded up to what the kernel takes: a multiple of 128, or of 512 beyond that."""
    step = BLOCK if T > BLOCK else LANES
    return -(-T // step) * step


def attend_splash(
    q_BTHD: Float[Array, "B T H D"],
    k_BTKD: Float[Array, "B T K D"],
    v_BTKD: Float[Array, "B T K D"],
    segment_ids_BT: Int[Array, "B T"],
    *,
    window: int | None = None,
    interpret: bool = False,
) -> Float[Array, "B T H D"]:
    """Splash attention; scores and sums in fp32, the result rounded once to the inputs' dtype.

    Args:
      q_BTHD: already scaled; like the keys and values, in the dtype of the matrix products.
      interpret: runs the kernel's steps as plain JAX, on any backend, slowly.
    """
    _, T, _, D = q_BTHD.shape
    length, width = padded_length(T), -(-D // HEAD_DIM_STEP) * HEAD_DIM_STEP
    fill = [(0, 0), (0, length - T), (0, 0), (0, width - D)]
    # tokens that fill up the length come after all others, and are padding
    q, k, v = (jnp.pad(x, fill).transpose(0, 2, 1, 3) for x in (q_BTHD, k_BTKD, v_BTKD))
    ids = jnp.pad(segment_ids_BT, fill[:2]).astype(jnp.int32)
    run = functools.partial(_run, window=None if window is None or window >= T else window, interpret=interpret)
    exact = precision_of(q.dtype) is not None
    out = _exactly(run, q, k, v, ids) if exact else run(q, k, v, ids)
    return out.transpose(0, 2, 1, 3)[:, :T, :, :D]


def _run(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array, *, window: int | None, interpret: bool) -> jax.Array:
    """The kernel on what it takes as it is: q [B, H, T, D], k and v [B, K, T, D], ids [B, T]."""
    # heavy, and of use on TPUs alone
    from jax.experimental.pallas.ops.tpu import splash_attention as sa

    _, H, length, _ = q.shape
    shape = (length, length)
    mask = sa.CausalMask(shape) if window is None else sa.LocalMask(shape, (window - 1, 0), 0)
    size = min(BLOCK, length) if length % BLOCK == 0 else LANES
    # the fused backward kernel writes a copy of the queries' gradient for every key block: T² / 512 numbers
    sizes = sa.BlockSizes(
        block_q=size, block_kv=size, block_kv_compute=size,
        block_q_dkv=size, block_kv_dkv=size, block_kv_dkv_compute=size,
        block_q_dq=size, block_kv_dq=size,
    )  # fmt: skip
    kernel = sa.make_splash_mha_single_device(
        sa.MultiHeadMask([mask] * H),
        block_sizes=sizes,
        interpret=interpret,
        # of the result and of the softmax's statistics
        residual_checkpoint_name=ATTENDED,
    )
    return jax.vmap(kernel)(q, k, v, sa.SegmentIds(ids, ids))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _exactly(run: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """`run` with full precision in products that do not say theirs, backwards too: those of a library's kernel."""
    with jax.default_matmul_precision("highest"):
        return run(*arrays)


def _exactly_forward(run: Callable[..., jax.Array], *arrays: jax.Array) -> tuple[jax.Array, Any]:
    with jax.default_matmul_precision("highest"):
        return jax.vjp(run, *arrays)


def _exactly_backward(_run: Callable[..., jax.Array], pull: Any, g: jax.Array) -> Any:
    with jax.default_matmul_precision("highest"):  # the kernel's own backward pass is traced here
        return pull(g)


_exactly.defvjp(_exactly_forward, _exactly_backward)
