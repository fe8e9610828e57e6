"""How an array lies in memory, where XLA's own choice is a slow one."""

from __future__ import annotations

import jax
from jax.experimental.layout import Layout, with_layout_constraint


def rows_first(x: jax.Array) -> jax.Array:
    """x, written with its last axis contiguous: a transpose before it is carried out, not folded into what follows.

    It is not partitioned: for programs of one device.
    """
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))
