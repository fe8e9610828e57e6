"""The pure functions a decoder is made of.

Dimension key: B rows, T tokens, H heads, D head_dim, E width.
Sums, norms and softmax are computed in fp32; `dtype` is that of the matrix products' inputs. What a layer hands on, the
residual stream and every product's result, has the dtype of the activations (`Decoder.activations`).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxdistill.layouts import rows_first
from jaxdistill.models.quantize import dense
from jaxdistill.parallel.mesh import WeightShardings
from jaxdistill.precision import precision_of

ACTIVATIONS = {"silu": jax.nn.silu, "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True)}


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def matmul(
    x: jax.Array,
    w: Any,
    dtype: DTypeLike,
    out_dtype: DTypeLike = jnp.float32,
    shardings: WeightShardings | None = None,
    heads: tuple[int, int] = (1, 1),
) -> jax.Array:
    """x [..., E] @ w [E, F] -> [..., F]: inputs rounded to `dtype`, products summed in fp32, backwards too.

    Args:
      w: an array; or a quantized matrix, which is a constant: it has no gradient.
      out_dtype: of the result, to which the fp32 sums are rounded once; the gradient by x has x's dtype, that by w is
        fp32 until it is rounded to w's. An fp32 result is what makes bf16 inputs fast on CPUs with bf16 units; on
        accelerators it would double the bytes that every elementwise pass and the backward pass read.
      shardings: of a matrix that several devices share; each gathers it, forward and backward, and their gradients by
        it are summed to where it is stored. Left to itself XLA may cut the product in pieces that follow the matrix
        around the devices, whose partial sums it adds in memory.
      heads: how many heads the inputs and the outputs consist of, see `_in_heads`.
    """
    return _product(x, _whole(w, dtype, shardings), 0, heads, dtype, out_dtype)


def _matmul_forward(x, w, dtype, out_dtype, shardings, heads):
    # not by calling `matmul`: a remat policy would see that call, and not the product inside, and keep nothing
    return _product(x, _whole(w, dtype, shardings), 0, heads, dtype, out_dtype), (x, w)


def _matmul_backward(dtype, out_dtype, shardings, heads, saved, g):
    x, w = saved
    dx = _product(g, _whole(w, dtype, shardings), 1, heads, dtype, x.dtype)
    return dx, _by_matrix(x, g, w, dtype, shardings, heads)


def _by_matrix(x, g, w, dtype, shardings=None, heads=(1, 1)):
    """The gradient by w of what x @ w became: fp32 sums over all tokens, in w's dtype. None if w is quantized."""
    if not isinstance(w, (jax.Array, np.ndarray)):
        return None
    dw = jax.lax.platform_dependent(
        x, g,
        cpu=lambda x, g: _over_tokens_on_cpu(x, g, dtype),
        tpu=lambda x, g: _over_tokens(x, g, heads, dtype),
        default=lambda x, g: _over_tokens(x, g, (1, 1), dtype),
    )  # fmt: skip
    return (dw if shardings is None else shardings.scatter(dw)).astype(w.dtype)


matmul.defvjp(_matmul_forward, _matmul_backward)


def _product(x, w, side, heads, dtype, out_dtype):
    """x [..., I] @ w [I, O] if `side` is 0, x [..., O] @ w.T if it is 1."""

    def plain(x, w):
        return _dot(x, w, ((x.ndim - 1,), (side,)), dtype, out_dtype)

    if heads == (1, 1):
        return plain(x, w)
    return jax.lax.platform_dependent(
        x, w, tpu=lambda x, w: _product_in_heads(x, w, side, heads, dtype, out_dtype), default=plain
    )


def _product_in_heads(x, w, side, heads, dtype, out_dtype):
    lead = x.shape[:-1]
    w = _in_heads(_in_heads(w, 1, heads[1]), 0, heads[0])
    inputs = 1 + (heads[0] > 1)
    over = range(inputs) if side == 0 else range(inputs, w.ndim)
    x = _in_heads(x, -1, heads[side])
    return _dot(x, w, (tuple(range(len(lead), x.ndim)), tuple(over)), dtype, out_dtype).reshape(*lead, -1)


def _over_tokens(x, g, heads, dtype):
    """The sum over all tokens of x [..., I] and g [..., O], fp32 [I, O]."""
    rows = tuple(range(g.ndim - 1))
    product = _dot(_in_heads(x, -1, heads[0]), _in_heads(g, -1, heads[1]), (rows, rows), dtype)
    return product.reshape(x.shape[-1], g.shape[-1])


def _in_heads(x, axis, heads):
    """[..., H * D, ...] -> [..., H, D, ...].

    TPUs' attention keeps a head's tokens together. Were activations [..., T, H * D] in between, they would be copied,
    forward and backward; of a product over heads it is the weights that are rearranged.
    """
    axis %= x.ndim
    return x if heads == 1 else x.reshape(*x.shape[:axis], heads, -1, *x.shape[axis + 1 :])


def _whole(w, dtype, shardings):
    """w as an array in the products' dtype, gathered over the devices that share it, in as few bytes as it has.

    This stands inside of `matmul`, so that what is kept for the backward pass is a device's own part.
    """
    if isinstance(w, (jax.Array, np.ndarray)):
        w = w.astype(dtype)
        return w if shardings is None else shardings.gather(w)
    return dense(w if shardings is None else jax.tree.map(shardings.gather, w)).astype(dtype)


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


def _dot(a, b, contract, dtype, out_dtype=jnp.float32):
    return jax.lax.dot_general(
        a.astype(dtype),
        b.astype(dtype),
        (contract, ((), ())),
        precision=precision_of(dtype),
        preferred_element_type=jnp.dtype(out_dtype),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def gated(activation: str, gate: jax.Array, up: jax.Array) -> jax.Array:
    """activation(gate) * up, one of `ACTIVATIONS`, computed in fp32 and rounded to gate's dtype.

    The backward pass keeps the two inputs alone, and activates again.
    """
    return (ACTIVATIONS[activation](_fp32(gate)) * _fp32(up)).astype(gate.dtype)


def _gated_forward(activation, gate, up):
    return gated(activation, gate, up), (gate, up)


def _gated_backward(activation, saved, g):
    return _through_gate(activation, *saved, g)[:2]


def _through_gate(activation, gate, up, g):
    """(gradients by gate and up, what the gate gave), rounded to gate's dtype."""
    dtype, gate, up, g = gate.dtype, _fp32(gate), _fp32(up), _fp32(g)
    if activation == "silu":
        # by tanh: the sigmoid as it was computed before, XLA would recognise, and keep
        sigmoid = 0.5 + 0.5 * jnp.tanh(0.5 * gate)
        activated = gate * sigmoid
        by_gate = g * up * (sigmoid + activated * (1.0 - sigmoid))
    else:
        activated, pull = jax.vjp(ACTIVATIONS[activation], gate)
        (by_gate,) = pull(g * up)
    return by_gate.astype(dtype), (g * activated).astype(dtype), (activated * up).astype(dtype)


gated.defvjp(_gated_forward, _gated_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 4, 5, 6))
def gated_matmul(
    activation: str,
    gate: jax.Array,
    up: jax.Array,
    w: Any,
    dtype: DTypeLike,
    out_dtype: DTypeLike = jnp.float32,
    shardings: WeightShardings | None = None,
) -> jax.Array:
    """matmul(gated(activation, gate, up), w, ...), whose backward pass gates once for all of its gradients.

    Its two inputs are kept, and of them one pass makes the gradients by both and the other operand of that by w.
    """
    return matmul(gated(activation, gate, up), w, dtype, out_dtype, shardings)


def _gated_matmul_forward(activation, gate, up, w, dtype, out_dtype, shardings):
    h = ACTIVATIONS[activation](_fp32(gate)) * _fp32(up)
    return _matmul_forward(h.astype(gate.dtype), w, dtype, out_dtype, shardings, (1, 1))[0], (gate, up, w)


def _gated_matmul_backward(activation, dtype, out_dtype, shardings, saved, g):
    gate, up, w = saved
    by_gated = _dot(g, _whole(w, dtype, shardings), ((g.ndim - 1,), (1,)), dtype, gate.dtype)
    by_gate, by_up, h = _through_gate(activation, gate, up, by_gated)
    return by_gate, by_up, _by_matrix(h, g, w, dtype, shardings)


gated_matmul.defvjp(_gated_matmul_forward, _gated_matmul_backward)


def rms_norm(
    x: jax.Array, scale: jax.Array, eps: float, *, offset: bool = False, out_dtype: DTypeLike = jnp.float32
) -> jax.Array:
    """Root-mean-square norm over the last axis, computed in fp32 and rounded once to `out_dtype`.

    Args:
      offset: `scale` is stored as its distance from 1; a bf16 one must not be rounded again by adding 1 to it.
    """
    scale = offset_scale(scale, offset)
    if x.dtype == jnp.float32:
        return (x * inverse_rms(x, eps) * last_axis(scale, x.ndim)).astype(out_dtype)
    return _norm(x, scale, eps, jnp.dtype(out_dtype))


def offset_scale(scale: jax.Array, offset: bool) -> jax.Array:
    """A norm's scale in fp32, see `rms_norm`."""
    return _fp32(scale) + 1.0 if offset else _fp32(scale)


def inverse_rms(x: jax.Array, eps: float) -> jax.Array:
    """1 / root mean square of fp32 [..., D], [..., 1]."""
    return jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _norm(x, scale, eps, out_dtype):
    """`rms_norm` of inputs in less than fp32: the backward pass keeps them as they are, and no fp32 copy of them."""
    return _norm_forward(x, scale, eps, out_dtype)[0]


def _norm_forward(x, scale, eps, out_dtype):
    inverse = inverse_rms(_fp32(x), eps)
    return (_fp32(x) * inverse * last_axis(scale, x.ndim)).astype(out_dtype), (x, scale, inverse)


def _norm_backward(eps, out_dtype, saved, g):
    x, scale, inverse = saved
    normed, g = _fp32(x) * inverse, _fp32(g)
    by_normed = g * last_axis(scale, x.ndim)
    along = jnp.mean(by_normed * normed, axis=-1, keepdims=True)
    dx = (inverse * (by_normed - along * normed)).astype(x.dtype)
    return dx, jnp.sum(g * normed, axis=tuple(range(x.ndim - 1)))


_norm.defvjp(_norm_forward, _norm_backward)


def _fp32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def last_axis(vector: jax.Array, ndim: int) -> jax.Array:
    """A vector as an array of `ndim` axes that lies along the last: ranks are never promoted silently."""
    return vector.reshape((1,) * (ndim - 1) + vector.shape)


def dropout(x: jax.Array, share: float, key: jax.Array) -> jax.Array:
    """Zeroes a share of the numbers and scales the others up, so that the mean stays."""
    # divided in fp32: 1 - share is no number of bf16, whose nearest one would be off by up to 0.2%, always the same way
    scaled = (_fp32(x) / (1.0 - share)).astype(x.dtype)
    return jnp.where(jax.random.bernoulli(key, 1.0 - share, x.shape), scaled, 0.0)


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
    """Rotates the pairs (i, i + D/2) of every head, as Hugging Face lays them out; the result is fp32."""
    cos, sin = tables
    a, b = jnp.split(_fp32(x_BTHD), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
