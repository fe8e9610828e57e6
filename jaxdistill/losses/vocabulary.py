"""Sums, maxima and picks along the vocabulary, whose columns may be spread over the devices of one mesh axis.

Dimension key: C tokens of a chunk, W columns that this device holds, k picked columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

LOWEST = -1e30
"""The logit of a column that is not there: its probability is exactly 0, and unlike -inf it never makes a NaN."""


@dataclass(frozen=True)
class Layout:
    """Which mesh axes split hidden states [B, T, E] (or [N, E]) and a vocabulary projection [V, E].

    The defaults are those of the project's table of sharding rules.

    Attributes:
      rows: axes that split B (or N); every device compacts the trained tokens of its own rows.
      positions: the axis that splits T.
      columns: the axis that splits V: it is never gathered; log-sum-exps are summed over it.
      embed: axes that split the projection's E, the outer one first: it is gathered, as FSDP does with every weight.
    """

    mesh: Mesh
    rows: tuple[str, ...] = ("data", "fsdp")
    positions: str = "context"
    columns: str = "tensor"
    embed: tuple[str, ...] = ("fsdp", "context")

    @classmethod
    def of(cls, mesh: Mesh | None) -> Layout | None:
        """That of a mesh; one device needs none, unless it is only described, and belongs to another machine."""
        if mesh is None or (mesh.size == 1 and mesh.devices.flat[0].platform == jax.default_backend()):
            return None
        return cls(mesh)

    def tokens(self, shape: tuple[int, ...], lead: int) -> PartitionSpec:
        """How an array is split whose first `lead` axes (1 or 2) count tokens."""
        return PartitionSpec(*(self.rows, self.positions)[:lead], *(None,) * (len(shape) - lead))

    def token_axes(self, lead: int) -> tuple[str, ...]:
        return (*self.rows, self.positions)[: len(self.rows) + lead - 1]

    def check(self, shape: tuple[int, ...], spec: PartitionSpec, name: str) -> None:
        """Raises ValueError where the mesh does not divide the shape."""
        for size, axes in zip(shape, spec, strict=True):
            ways = int(np.prod([self.mesh.shape[a] for a in ((axes,) if isinstance(axes, str) else axes or ())]))
            if size % ways:
                raise ValueError(
                    f"{name} {shape}: an axis of size {size} does not divide over {axes}={ways} devices; "
                    "choose a mesh that divides it."
                )


@dataclass(frozen=True)
class Vocabulary:
    """The columns of a chunk of logits [C, W] that this device holds.

    Attributes:
      first: token id of column 0.
      size: number of real tokens; columns beyond are padding.
      padded: whether there are any.
      axis: the mesh axis over which the columns are spread; None if all are here.
    """

    first: jax.Array
    size: int
    padded: bool
    axis: str | None

    def columns(self, logits: jax.Array) -> jax.Array:
        """Token ids of the columns, int32 [1, W]."""
        return self.first + jax.lax.broadcasted_iota(jnp.int32, (1, logits.shape[-1]), 1)

    def drop_padding(self, x: jax.Array, fill: float) -> jax.Array:
        """`fill` instead of what padded columns hold."""
        return jnp.where(self.columns(x) < self.size, x, fill) if self.padded else x

    def total(self, x: jax.Array) -> jax.Array:
        """[C, W] -> sums over the vocabulary, [C]."""
        local = jnp.sum(x, axis=-1)
        return local if self.axis is None else jax.lax.psum(local, self.axis)

    def max(self, x: jax.Array) -> jax.Array:
        local = jnp.max(x, axis=-1)
        return local if self.axis is None else jax.lax.pmax(local, self.axis)

    def logsumexp(self, x: jax.Array) -> jax.Array:
        top = self.max(x)
        return top + jnp.log(self.total(jnp.exp(x - top[:, None])))

    def pick(self, x: jax.Array, ids: jax.Array) -> jax.Array:
        """x [C, W] at token ids [C, k] -> [C, k]; 0 where an id is not a token."""
        local = ids - self.first
        inside = (local >= 0) & (local < x.shape[-1]) & (ids < self.size)
        found = jnp.take_along_axis(x, jnp.clip(local, 0, x.shape[-1] - 1), axis=-1)
        found = jnp.where(inside, found, 0.0)
        return found if self.axis is None else jax.lax.psum(found, self.axis)

    def top(self, x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
        """The k highest of x [C, W], over the whole vocabulary, highest first, and their token ids: [C, k] each."""
        values, at = jax.lax.top_k(x, min(k, x.shape[-1]))
        ids = self.first + at
        if self.axis is None:
            return values, ids
        values, ids = (jax.lax.all_gather(v, self.axis, axis=1, tiled=True) for v in (values, ids))
        values, at = jax.lax.top_k(values, k)
        return values, jnp.take_along_axis(ids, at, axis=1)

    def normalizer(self, x: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(log-sum-exp of x [C, W], whether `ids` [C] is the first of its highest columns), as the two methods give it.

        A GPU reads the logits once for all of it, where each maximum and each sum would be a pass of its own.
        """
        if self.axis is None:
            return jax.lax.platform_dependent(x, ids, cuda=self._in_one_pass, default=self._in_passes)
        return self._in_passes(x, ids)

    def _in_passes(self, x: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self.logsumexp(x), self.is_argmax(x, ids)

    def _in_one_pass(self, x: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        before = jnp.where(self.columns(x) < ids[:, None], x, 2 * LOWEST)

        def join(a: Sequence[jax.Array], b: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
            """Of two sets of columns: the highest, the sum of exp(x - highest), the highest before the id."""
            top = jnp.maximum(a[0], b[0])
            total = a[1] * jnp.exp(a[0] - top) + b[1] * jnp.exp(b[0] - top)
            return top, total, jnp.maximum(a[2], b[2])

        nothing = jnp.float32(2 * LOWEST), jnp.float32(0), jnp.float32(2 * LOWEST)
        top, total, highest_before = jax.lax.reduce((x, jnp.ones_like(x), before), nothing, join, (1,))
        own = self.pick(x, ids[:, None])[:, 0]
        return top + jnp.log(total), (own == top) & (highest_before < own)

    def is_argmax(self, x: jax.Array, ids: jax.Array) -> jax.Array:
        """Whether `ids` [C] is the first of the highest columns of x [C, W]; bool [C]."""
        # two maxima over floats: CPUs find them twenty times faster than the place of one (jnp.argmax)
        before = self.max(jnp.where(self.columns(x) < ids[:, None], x, 2 * LOWEST))
        own = self.pick(x, ids[:, None])[:, 0]
        return (own == self.max(x)) & (before < own)

    def slots(self, x: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Where to scatter into x [C, W] for token ids [C, k]; ids that are not here land outside (mode="drop")."""
        local = ids - self.first
        inside = (local >= 0) & (local < x.shape[-1])
        rows = jax.lax.broadcasted_iota(jnp.int32, ids.shape, 0)
        return rows, jnp.where(inside, local, x.shape[-1])
