"""The rows of a batch in parts, one after the other: what a layer works with is as many times smaller."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxdistill.parallel import mesh as meshes


def cut(rows: Any, parts: int, mesh: Mesh | None) -> Any:
    """Arrays [B, T, ...] of a tree as [parts, B / parts, T, ...].

    Every device gives an equal share of its own rows to each part, so that none of them has to move.
    """
    alone = mesh is None or mesh.size == 1

    def cut_one(x: jax.Array) -> jax.Array:
        x = x.reshape(*((parts, -1) if alone else (-1, parts)), *x.shape[1:])
        x = x if alone else x.swapaxes(0, 1)
        return meshes.constrain(x, (None, "batch", "sequence", *[None] * (x.ndim - 3)), mesh)

    return jax.tree.map(cut_one, rows)


def joined(x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """`cut` undone, of one array."""
    x = x if mesh is None or mesh.size == 1 else x.swapaxes(0, 1)
    return x.reshape(-1, *x.shape[2:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def in_parts(run: Callable[..., jax.Array], x: jax.Array, beside: Any, p: Any) -> jax.Array:
    """run(x[i], beside[i], p) for every part i, [parts, ...] -> [parts, ...]: one after the other, in x's own memory.

    The backward pass keeps x alone and runs each part again, as `jax.checkpoint` does with `nothing_saveable`; what a
    part works with is gone before the next one begins. `beside` is a constant to it.
    """

    def body(i: jax.Array, x: jax.Array) -> jax.Array:
        part, others = _part((x, beside), i)
        return jax.lax.dynamic_update_index_in_dim(x, run(part, others, p), i, 0)

    return jax.lax.fori_loop(0, x.shape[0], body, x)


def _in_parts_forward(run, x, beside, p):
    return in_parts(run, x, beside, p), (x, beside, p)


def _in_parts_backward(run, saved, g):
    x, beside, p = saved

    def body(i, carry):
        g, by_p = carry
        part, others, g_part = _part((x, beside, g), i)
        _, pull = jax.vjp(lambda x, p: run(x, others, p), part, p)
        by_x, more = pull(g_part)
        return jax.lax.dynamic_update_index_in_dim(g, by_x, i, 0), jax.tree.map(jnp.add, by_p, more)

    by_x, by_p = jax.lax.fori_loop(0, x.shape[0], body, (g, jax.tree.map(jnp.zeros_like, p)))
    return by_x, None, by_p


in_parts.defvjp(_in_parts_forward, _in_parts_backward)


def _part(tree: Any, i: jax.Array) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, 0, keepdims=False), tree)
