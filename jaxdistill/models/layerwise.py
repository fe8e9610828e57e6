"""A forward pass layer by layer, in fp32 at full precision: from a model's arrays where they lie, or from files.

Beside the parameters, memory holds one layer in fp32 and the activations of a few tokens. From files, not even the
parameters are held: a layer is read, computed, and let go.

Dimension key: B rows, T tokens, N kept positions, L layers, E width, V vocabulary.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdistill import hub
from jaxdistill.models import layers
from jaxdistill.models.attention import attention
from jaxdistill.models.config import LayerKind, ModelConfig
from jaxdistill.models.decoder import Decoder
from jaxdistill.models.layer import run_layer
from jaxdistill.models.load import param_shapes
from jaxdistill.models.lora import Lora
from jaxdistill.models.names import Entry, entries
from jaxdistill.models.quantize import dense
from jaxdistill.models.tensor_checks import check_tensors
from jaxdistill.models.tensor_files import open_tensors

KEPT = 8
"""The last positions of every row whose hidden states are kept."""
HEAD_ROWS = 1 << 14
"""Rows of the vocabulary projection that are computed with at once."""


class Outputs(NamedTuple):
    """Of one forward pass, fp32."""

    hidden: list[np.ndarray]
    """[B, N, E] each: the embedding, then what every layer gives."""
    logits: np.ndarray
    """[B, T, V]."""


class How(NamedTuple):
    """What of a forward pass is compiled."""

    config: ModelConfig
    lora: Lora | None = None
    mesh: Mesh | None = None
    bf16: bool = False
    """Weights are rounded to bf16 before they are used, as an export in bf16 has them."""

    def weight(self, x: Any) -> jax.Array:
        # not by casts there and back, which XLA may leave out
        x = dense(x).astype(jnp.float32)
        return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7) if self.bf16 else x

    def whole(self, x: jax.Array) -> jax.Array:
        """An activation as every device holds it: all of it, for it is small."""
        if self.mesh is None:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, PartitionSpec()))


class Source(abc.ABC):
    """Where parameters come from."""

    how: How

    @abc.abstractmethod
    def embedding(self, ids_BT: np.ndarray) -> jax.Array:
        """Rows of the embedding, [B, T, E]."""

    @abc.abstractmethod
    def layer(self, number: int) -> tuple[Mapping[str, Any], int]:
        """Stacked parameters by name, and at which place of the stack this layer's are."""

    @abc.abstractmethod
    def norm(self) -> jax.Array:
        """The final norm's, [E]."""

    @abc.abstractmethod
    def projection(self) -> Iterator[jax.Array]:
        """The vocabulary projection in blocks of rows, [up to V, E]."""


def forward(source: Source, ids_BT: np.ndarray) -> Outputs:
    """Runs all layers. Where several processes share the arrays, all of them call this, and all get the result."""
    how = source.how
    x, kept = _start(how, source.embedding(ids_BT))
    hidden = [to_host(kept)]
    for number, kind in enumerate(how.config.kinds):
        stacked, at = source.layer(number)
        x, kept = _layer(how, kind, x, stacked, at)
        hidden.append(to_host(kept))  # which waits, so that no layer is read before the one before it is let go
        del stacked
    norm, start = source.norm(), 0
    logits = np.empty((*ids_BT.shape, how.config.vocab_size), np.float32)
    for block in source.projection():
        logits[..., start : start + block.shape[0]] = to_host(_logits(how, x, norm, block))
        start += block.shape[0]
    return Outputs(hidden, logits)


def to_host(x: jax.Array) -> np.ndarray:
    """An array that every device holds whole."""
    return np.asarray(x.addressable_data(0))


def host_layers(stacked: Mapping[str, jax.Array]) -> dict[str, np.ndarray]:
    """Stacked parameters in every process's memory, brought there layer by layer; all of their processes call this."""

    def take(x: jax.Array) -> np.ndarray:
        lies = x.sharding
        where = NamedSharding(lies.mesh, PartitionSpec()) if isinstance(lies, NamedSharding) else lies
        one = jax.jit(lambda x, at: jax.lax.dynamic_index_in_dim(x, at, keepdims=False), out_shardings=where)
        return np.stack([to_host(one(x, at)) for at in range(x.shape[0])])

    return {name: take(x) for name, x in stacked.items()}


@functools.partial(jax.jit, static_argnums=0)
def _start(how: How, rows_BTE: jax.Array) -> tuple[jax.Array, jax.Array]:
    x = how.whole(how.weight(rows_BTE))
    x = x * how.config.hidden_size**0.5 if how.config.family.scaled_embedding else x
    return x, x[:, -KEPT:]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _layer(
    how: How, kind: LayerKind, x_BTE: jax.Array, stacked: Mapping[str, Any], at: jax.Array
) -> tuple[jax.Array, jax.Array]:
    def take(x: jax.Array) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(x, at, keepdims=False)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        scale, window = how.config.query_scale, kind.window
        return attention(q, k, v, None, scale=scale, window=window, dtype=jnp.float32, mesh=how.mesh)

    p = {name: how.weight(jax.tree.map(take, x)) for name, x in stacked.items()}
    B, T, _ = x_BTE.shape
    tables = None
    if kind.rope is not None:
        positions_BT = jnp.broadcast_to(jnp.arange(T)[None], (B, T))
        tables = layers.rope_tables(positions_BT, *kind.rope.frequencies(how.config.head_dim))
    x = how.whole(run_layer(p, how.config, x_BTE, tables, attend, jnp.float32, how.lora))
    return x, x[:, -KEPT:]


@functools.partial(jax.jit, static_argnums=0)
def _logits(how: How, x_BTE: jax.Array, norm: jax.Array, rows: jax.Array) -> jax.Array:
    c = how.config
    x = layers.rms_norm(x_BTE, how.weight(norm), c.rms_norm_eps, offset=c.family.norm_offset)
    return how.whole(layers.softcap(layers.matmul(x, how.weight(rows).T, jnp.float32), c.final_softcap))


# -------------------------------------------------------------------------------------------------- from a model


class FromModel(Source):
    """The parameters of a model where they lie, on the mesh that they lie on."""

    def __init__(self, model: Decoder, *, bf16: bool = False):
        """
        Args:
          bf16: see `How`.
        """
        self._model, self._stacked = model, model.layer_params()
        lies = model.embed[...].sharding
        mesh = model.mesh or (lies.mesh if isinstance(lies, NamedSharding) else None)
        assert mesh is None or isinstance(mesh, Mesh)
        self.how = How(model.config, model.lora, mesh, bf16)

    def embedding(self, ids_BT: np.ndarray) -> jax.Array:
        return _rows(self.how, self._model.embed[...], ids_BT)

    def embedding_blocks(self) -> Iterator[np.ndarray]:
        """Rows of the embedding as they are kept, [up to HEAD_ROWS, E] each; all processes of the mesh call this."""
        V = self.how.config.vocab_size
        for start in range(0, V, HEAD_ROWS):
            yield to_host(self.embedding(np.arange(start, min(start + HEAD_ROWS, V))[None]))[0]

    def layer(self, number: int) -> tuple[Mapping[str, Any], int]:
        return self._stacked, number

    def norm(self) -> jax.Array:
        return self._model.norm[...]

    def projection(self) -> Iterator[jax.Array]:
        rows, mesh = self._model.projection(), self.how.mesh
        if mesh is not None and mesh.shape["tensor"] > 1:  # the rows are split, and every device has few
            yield rows
            return
        for start in range(0, rows.shape[0], HEAD_ROWS):
            yield _cut(rows, start, min(HEAD_ROWS, rows.shape[0] - start))


@functools.partial(jax.jit, static_argnums=0)
def _rows(how: How, embed_VE: jax.Array, ids_BT: jax.Array) -> jax.Array:
    return how.whole(embed_VE[ids_BT])


@functools.partial(jax.jit, static_argnums=2)
def _cut(x: jax.Array, start: jax.Array, size: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, start, size)


# ---------------------------------------------------------------------------------------------------- from files


class FromFiles(Source):
    """The parameters of a checkpoint's files, read when they are needed, onto this process's first device."""

    def __init__(self, folder: Path, lora: Lora | None = None, adapters: Mapping[str, np.ndarray] | None = None):
        """
        Args:
          folder: a whole model.
          lora, adapters: what is trained beside it, by our names, stacked over layers.
        Raises:
          ValueError: as `load_hf`.
        """
        config = ModelConfig.from_hf(hub.read_config(folder), f"{folder}/config.json")
        self._tensors, self._adapters = open_tensors(folder), adapters or {}
        check_tensors(self._tensors, param_shapes(config), config, folder)
        self.how = How(config, lora)
        self._entries = {entry.path: entry for entry in entries(config)}

    def _read(self, entry: Entry, number: int = 0, rows: slice | None = None) -> jax.Array:
        tensor = self._tensors[entry.hf_names(self.how.config)[number]]
        value = tensor.read(None if rows is None else (rows, slice(None)))
        # exact, also for subnormal numbers, which accelerators may flush to 0
        value = value.astype(np.float32) if value.dtype == np.float16 else value
        return jnp.asarray(value.T if entry.transposed else value)

    def embedding(self, ids_BT: np.ndarray) -> jax.Array:
        unique, at = np.unique(ids_BT, return_inverse=True)
        rows = [self._read(self._entries["embed",], rows=slice(int(i), int(i) + 1)) for i in unique]
        return jnp.concatenate(rows)[at.reshape(ids_BT.shape)]

    def layer(self, number: int) -> tuple[Mapping[str, Any], int]:
        read = {e.path[-1]: self._read(e, number)[None] for e in self._entries.values() if e.stacked}
        return read | {name: jnp.asarray(x[number : number + 1]) for name, x in self._adapters.items()}, 0

    def norm(self) -> jax.Array:
        return self._read(self._entries["norm",])

    def projection(self) -> Iterator[jax.Array]:
        entry, V = self._entries["embed" if self.how.config.tie_embeddings else "head",], self.how.config.vocab_size
        for start in range(0, V, HEAD_ROWS):
            yield self._read(entry, rows=slice(start, min(start + HEAD_ROWS, V)))
