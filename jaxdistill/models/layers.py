"""The pure functions a decoder is made of.

Dimension key: B rows, T tokens, H heads, D head_dim, E width.
Sums, norms, softmax and the residual stream are fp32; `dtype` is that of the matrix products' inputs.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxdistill.layouts import rows_first
from jaxdistill.precision import precision_of

ACTIVATIONS = {"silu": jax.nn.silu, "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True)}


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(x: jax.Array, w: jax.Array, dtype: DTypeLike) -> jax.Array:
    """x [..., E] @ w [E, F] -> fp32 [..., F]: inputs rounded to `dtype`, products summed in fp32, backwards too.

    Asking for an fp32 result is what makes bf16 inputs exact in their sums, and on CPUs with bf16 units fast.
    """
    return _dot(x, w, ((x.ndim - 1,), (0,)), dtype)


def _matmul_forward(x, w, dtype):
    return matmul(x, w, dtype), (x, w)


def _matmul_backward(dtype, saved, g):
    x, w = saved
    dx = _dot(g, w, ((g.ndim - 1,), (1,)), dtype)
    rows = tuple(range(g.ndim - 1))
    dw = jax.lax.platform_dependent(
        x, g,
        cpu=lambda x, g: _over_tokens_on_cpu(x, g, dtype),
        default=lambda x, g: _dot(x, g, (rows, rows), dtype),
    )  # fmt: skip
    return dx.astype(x.dtype), dw.astype(w.dtype)


matmul.defvjp(_matmul_forward, _matmul_backward)


def _over_tokens_on_cpu(x, g, dtype):
    """The sum over all tokens of x [..., E] and g [..., F], [E, F], as fast as CPUs do it.

    XLA hands such a product to a kernel that reads x against its grain, in bf16 slower than in fp32. A transposed copy
    is what it needs (8,192 tokens, 384 x 1,152, two cores with AVX-512: 120 GFLOP/s, in fp32 176, of the copy 281 to
    352). A layout is not partitioned, though: several devices stay with fp32.
    """
    rows = tuple(range(g.ndim - 1))
    if jnp.dtype(dtype) != jnp.bfloat16 or jax.device_count() > 1:
        return _dot(x, g, (rows, rows), jnp.float32)
    x, g = x.reshape(-1, x.shape[-1]).astype(dtype), g.reshape(-1, g.shape[-1]).astype(dtype)
    # the kernel writes row after row, too; who wants the sum transposed must not have it written so
    return rows_first(_dot(rows_first(x.T), rows_first(g), ((1,), (0,)), dtype))


def _dot(a, b, contract, dtype):
    return jax.lax.dot_general(
        a.astype(dtype),
        b.astype(dtype),
        (contract, ((), ())),
        precision=precision_of(dtype),
        preferred_element_type=jnp.float32,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def gated(activation: str, gate: jax.Array, up: jax.Array) -> jax.Array:
    """activation(gate) * up, one of `ACTIVATIONS`; the backward pass keeps the two alone, and activates again."""
    return ACTIVATIONS[activation](gate) * up


def _gated_forward(activation, gate, up):
    return gated(activation, gate, up), (gate, up)


def _gated_backward(activation, saved, g):
    gate, up = saved
    if activation == "silu":
        # by tanh: the sigmoid as it was computed before, XLA would recognise, and keep
        sigmoid = 0.5 + 0.5 * jnp.tanh(0.5 * gate)
        activated = gate * sigmoid
        return g * up * (sigmoid + activated * (1.0 - sigmoid)), g * activated
    activated, pull = jax.vjp(ACTIVATIONS[activation], gate)
    return *pull(g * up), g * activated


gated.defvjp(_gated_forward, _gated_backward)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float, *, offset: bool = False) -> jax.Array:
    """Root-mean-square norm over the last axis, in fp32.

    Args:
      offset: `scale` is stored as its distance from 1; a bf16 one must not be rounded again by adding 1 to it.
    """
    x, scale = x.astype(jnp.float32), scale.astype(jnp.float32)
    scale = scale + 1.0 if offset else scale
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * last_axis(scale, x.ndim)


def last_axis(vector: jax.Array, ndim: int) -> jax.Array:
    """A vector as an array of `ndim` axes that lies along the last: ranks are never promoted silently."""
    return vector.reshape((1,) * (ndim - 1) + vector.shape)


def dropout(x: jax.Array, share: float, key: jax.Array) -> jax.Array:
    """Zeroes a share of the numbers and scales the others up, so that the mean stays."""
    return jnp.where(jax.random.bernoulli(key, 1.0 - share, x.shape), x / (1.0 - share), 0.0)


def softcap(logits: jax.Array, cap: float | None) -> jax.Array:
    """cap * tanh(logits / cap), which keeps logits within +-cap; nothing if `cap` is None."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def rope_tables(positions_BT: jax.Array, frequencies: np.ndarray, scale: float) -> tuple[jax.Array, jax.Array]:
    """cos and sin of the rotary angles, each times `scale`, fp32 [B, T, 1, D / 2]."""

    def tables(positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        angles = positions.astype(jnp.float32)[..., None, None] * last_axis(
            jnp.asarray(frequencies), positions.ndim + 2
        )
        return jnp.cos(angles) * scale, jnp.sin(angles) * scale

    if jax.device_count() > 1 or positions_BT.shape[1] == 1:
        return tables(positions_BT)
    # XLA for CPUs would compute the sines again in every layer and for every head; what a loop gives it has to keep
    # (gradients of 8 layers, 6 heads of 64: 7% less time). One token at a time would not pay for the loop
    return jax.lax.platform_dependent(positions_BT, cpu=lambda p: jax.lax.map(tables, p), default=tables)


def apply_rope(x_BTHD: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the pairs (i, i + D/2) of every head, as Hugging Face lays them out."""
    cos, sin = tables
    a, b = jnp.split(x_BTHD, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
