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

    The result is fp32 if they are rotated or scaled, and otherwise has x's dtype; with `tables_on_tpu` it has x's, too,
    and everything before is fp32.

    Args:
      tables: of `layers.rope_tables` or `tables_on_tpu`; None: nothing is rotated.
      norm: scale of the norm over D, [D]; None: there is none.
      offset: see `layers.rms_norm`.
    """
    found = None if norm is None else layers.offset_scale(norm, offset)
    if tables is not None and tables[0].shape[-1] == x_BTHD.shape[-1]:
        return _turn_on_tpu(x_BTHD, *tables, found, eps, scale)
    return _turn(x_BTHD, tables, found, eps, scale)


def _turn(x, tables, norm, eps, scale):
    if norm is not None:
        x = layers.rms_norm(x, norm, eps, out_dtype=x.dtype)
    if tables is not None:
        x = layers.apply_rope(x, tables)
    return x if scale == 1.0 else x.astype(jnp.float32) * scale


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
