"""What happens to queries and keys between their product and attention: the norm of each head, and rotary positions.

Dimension key: B rows, T tokens, H heads, D head_dim.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxdistill.models import layers
from jaxdistill.precision import precision_of


def tables_on_tpu(tables: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """`layers.rope_tables` in the form that says `turn` is to work as is best on TPUs: fp32 [B, T, 1, D]."""
    # behind a barrier, or the sines are computed again in every layer
    return jax.lax.optimization_barrier(tuple(jnp.concatenate([t, t], axis=-1) for t in tables))


def turn(
    x_BTHD: jax.Array,
    tables: tuple[jax.Array, jax.Array] | None,
    norm: jax.Array | None,
    *,
    eps: float,
    offset: bool,
    scale: float,
) -> jax.Array:
    """Queries or keys, normed, rotated and multiplied by `scale`.

    What is less than fp32 is rounded once: here, if it is normed and rotated, or with `tables_on_tpu`; otherwise the
    result is fp32 if it is rotated or scaled, and attention rounds it.

    Args:
      tables: of `layers.rope_tables` or `tables_on_tpu`; None: nothing is rotated.
      norm: scale of the norm over D, [D]; None: there is none.
      offset: see `layers.rms_norm`.
    """
    found = None if norm is None else layers.offset_scale(norm, offset)
    if tables is not None and tables[0].shape[-1] == x_BTHD.shape[-1]:
        return _turn_on_tpu(x_BTHD, *tables, found, eps, scale)
    if tables is not None and found is not None and x_BTHD.dtype != jnp.float32:
        return turn_in_halves(x_BTHD, found, tables, eps, scale)
    return _turn(x_BTHD, tables, found, eps, scale)


def _turn(x, tables, norm, eps, scale):
    if norm is not None:
        x = layers.rms_norm(x, norm, eps, out_dtype=x.dtype)
    if tables is not None:
        x = layers.apply_rope(x, tables)
    return x if scale == 1.0 else x.astype(jnp.float32) * scale


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def turn_in_halves(
    x_BTHD: jax.Array, scale: jax.Array, tables: tuple[jax.Array, jax.Array], eps: float, factor: float = 1.0
) -> jax.Array:
    """apply_rope(rms_norm(x, scale, eps), tables) * factor, for x in less than fp32; rounded once, to x's dtype.

    No fp32 array of its size lies in between, forwards or backwards.

    Args:
      scale: fp32 [D], as it multiplies.
    """
    return _turn_in_halves_forward(x_BTHD, scale, tables, eps, factor)[0]


def _turn_in_halves_forward(x_BTHD, scale, tables, eps, factor):
    # the rotation does not change a length, so the norm may come last: two passes, a reduction and this
    x = x_BTHD.astype(jnp.float32)
    inverse = layers.inverse_rms(x, eps)
    turned = layers.apply_rope(x * layers.last_axis(scale, x.ndim), tables) * (inverse * factor)
    return turned.astype(x_BTHD.dtype), (x_BTHD, scale, tables, inverse)


def _turn_in_halves_backward(eps, factor, saved, g):
    x, scale, (cos, sin), inverse = saved

    def halves(g):
        """By half of a head: the gradient by what was rotated, x, and the scale."""
        g_a, g_b = jnp.split(g.astype(jnp.float32) * factor, 2, axis=-1)
        by_y = g_a * cos + g_b * sin, g_b * cos - g_a * sin
        parts = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        return zip(by_y, parts, jnp.split(layers.last_axis(scale, x.ndim), 2, axis=-1), strict=True)

    # three passes, each from g and x: behind barriers XLA does not see that they share work, which it would write in
    # fp32 and read again
    along = sum(jnp.sum(by_y * part * half, axis=-1, keepdims=True) for by_y, part, half in halves(g))
    along = along * jnp.square(inverse) / x.shape[-1]
    leading = tuple(range(x.ndim - 1))
    by_scale = [jnp.sum(by_y * part * inverse, axis=leading) for by_y, part, _ in halves(_apart(g))]
    dx = [(inverse * (by_y * half - along * part)).astype(x.dtype) for by_y, part, half in halves(_apart(g))]
    return jnp.concatenate(dx, axis=-1), jnp.concatenate(by_scale), None


def _apart(x: jax.Array) -> jax.Array:
    return jax.lax.optimization_barrier(x)


turn_in_halves.defvjp(_turn_in_halves_forward, _turn_in_halves_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _turn_on_tpu(x, cos, sin, norm, eps, scale):
    """`_turn` in one pass forward and one backward.

    Half a head is half a register there, and cutting heads in halves and joining them again costs several passes over
    padded arrays. A product with a matrix of ones and minus ones exchanges the halves of bf16 numbers exactly.
    """
    return _turn_forward(x, cos, sin, norm, eps, scale)[0]


def _turn_forward(x, cos, sin, norm, eps, scale):
    a, b = x.astype(jnp.float32), _quarter_turn(x).astype(jnp.float32)
    inverse = None
    if norm is not None:
        inverse = layers.inverse_rms(a, eps)
        a, b = a * inverse * layers.last_axis(norm, 4), b * inverse * layers.last_axis(_swapped(norm), 4)
    turned = (a * cos + b * sin) * scale
    return turned.astype(x.dtype), (x, cos, sin, norm, inverse)


def _turn_backward(eps, scale, saved, g):
    x, cos, sin, norm, inverse = saved
    # the inverse of a quarter turn is its negative
    back = (g.astype(jnp.float32) * cos - _quarter_turn(g).astype(jnp.float32) * sin) * scale
    if norm is None:
        return back.astype(x.dtype), None, None, None
    normed, by_normed = x.astype(jnp.float32) * inverse, back * layers.last_axis(norm, 4)
    along = jnp.mean(by_normed * normed, axis=-1, keepdims=True)
    dx = (inverse * (by_normed - along * normed)).astype(x.dtype)
    return dx, None, None, jnp.sum(back * normed, axis=(0, 1, 2))


_turn_on_tpu.defvjp(_turn_forward, _turn_backward)


def _quarter_turn(x: jax.Array) -> jax.Array:
    """(a, b) -> (-b, a) of the halves of the last axis, by a product, of one term each."""
    D = x.shape[-1]
    half = jnp.eye(D // 2, dtype=x.dtype)
    none = jnp.zeros_like(half)
    return jax.lax.dot_general(
        x, jnp.block([[none, half], [-half, none]]), (((x.ndim - 1,), (0,)), ((), ())),
        precision=precision_of(x.dtype), preferred_element_type=x.dtype,
    )  # fmt: skip


def _swapped(x: jax.Array) -> jax.Array:
    return jnp.roll(x, x.shape[-1] // 2, axis=-1)
