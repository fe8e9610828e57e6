"""Safetensors files, written tensor by tensor from arrays that any number of processes may hold together.

Every process takes part in gathering; the first one writes. What fails there is raised in all of them, and none waits
for one that has given up.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxdistill.models import Decoder, params_of
from jaxdistill.models.load import get
from jaxdistill.models.names import Entry, entries
from jaxdistill.models.tensor_files import BITS, FLOATS, SINGLE, encode_header
from jaxdistill.parallel import processes

T = TypeVar("T")

DTYPES = {"float32": "F32", "bfloat16": "BF16"}
"""What can be exported, and safetensors' names for it."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """One tensor of the checkpoint, and the part of a parameter that it is."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    array: jax.Array
    layer: int | None
    """None: the whole parameter."""
    transposed: bool

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * BITS[self.dtype] // 8


def plan_files(model: Decoder, dtype: str, max_shard_bytes: int) -> dict[str, list[Piece]]:
    """File name -> its tensors, in the order in which they lie in it."""
    shards: list[list[Piece]] = [[]]
    size = 0
    for piece in pieces_of(model, entries(model.config), dtype):
        if size and size + piece.bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(piece)
        size += piece.bytes
    # by name within a file, as the safetensors library has it
    ordered = [sorted(shard, key=lambda piece: piece.name) for shard in shards]
    if len(ordered) == 1:
        return {SINGLE: ordered[0]}
    return {f"model-{n:05d}-of-{len(ordered):05d}.safetensors": shard for n, shard in enumerate(ordered, start=1)}


def pieces_of(model: Decoder, wanted: Iterable[Entry], dtype: str) -> Iterator[Piece]:
    """The tensors of these parameters, layer by layer, so that a layer's tensors share a file."""
    params, config = params_of(model), model.config

    def piece(entry: Entry, layer: int | None) -> Piece:
        array, names = get(params, entry.path), entry.hf_names(config)
        shape = array.shape if layer is None else array.shape[1:]
        shape = shape[::-1] if entry.transposed else shape
        return Piece(names[layer or 0], shape, dtype, array, layer, entry.transposed)

    for stacked, group in itertools.groupby(wanted, lambda entry: entry.stacked):
        members = list(group)
        if not stacked:
            yield from (piece(entry, None) for entry in members)
            continue
        for layer in range(max(len(entry.hf_names(config)) for entry in members)):
            yield from (piece(entry, layer) for entry in members if layer < len(entry.hf_names(config)))


def write_file(path: Path | None, pieces: list[Piece]) -> None:
    """Writes one safetensors file, tensor after tensor; returns once it is on disk, in every process.

    Args:
      path: None in processes that do not write: they take part in the gathering.
    Raises:
      ValueError: the disk is full, or whatever else kept the first process from writing.
    """
    error: Exception | None = None
    with contextlib.ExitStack() as stack:
        file: Any = None
        try:
            if path is not None:
                file = stack.enter_context(open(path, "wb", buffering=0))
                _write_all(file, encode_header({piece.name: (piece.dtype, piece.shape) for piece in pieces}))
        except Exception as failed:
            error = failed
        for piece in pieces:
            # a writer that has failed goes on gathering up to the end of the file, where the others are told
            value = gather(piece)
            if file is None or error is not None:
                # in step with the writer, or gathered tensors would pile up
                value.block_until_ready()
                continue
            try:
                _write_all(file, to_host(value).reshape(-1).view(np.uint8))
            except Exception as failed:
                error = failed
        try:
            if file is not None and error is None:
                os.fsync(file.fileno())
        except OSError as failed:
            error = failed
    if isinstance(error, OSError) and error.filename is None:  # writing, unlike opening, does not say where
        error.filename = str(path)
    agree(error)


def _write_all(file: Any, data: Any) -> None:
    left = memoryview(data)
    while left:
        left = left[file.write(left[: 1 << 30]) :]


def gather(piece: Piece) -> jax.Array:
    """One tensor as it lies in the checkpoint; all of it is on this process's devices."""
    sharding: Any = None  # stays as it is
    if not piece.array.is_fully_addressable:
        assert isinstance(piece.array.sharding, NamedSharding)
        sharding = NamedSharding(piece.array.sharding.mesh, PartitionSpec())
    take = _take(sharding, piece.layer is not None, piece.transposed, FLOATS[piece.dtype])
    return take(piece.array, piece.layer or 0)


@functools.cache
def _take(sharding: Any, stacked: bool, transposed: bool, dtype: np.dtype) -> Any:
    """(parameter, layer) -> the tensor; on every device if a sharding says so."""

    def take(array: jax.Array, layer: jax.Array) -> jax.Array:
        value = jax.lax.dynamic_index_in_dim(array, layer, keepdims=False) if stacked else array
        return (value.T if transposed else value).astype(dtype)

    return jax.jit(take, out_shardings=sharding)


def to_host(value: jax.Array) -> np.ndarray:
    """A gathered tensor in host memory, contiguous."""
    return np.ascontiguousarray(value if value.is_fully_addressable else value.addressable_data(0))


# ----------------------------------------------------------------------------------------------- many processes


def by_the_writer(step: Callable[[], T]) -> T | None:
    """Runs a step in the first process, while the others wait; if it fails there, every process raises."""

    def said() -> T:
        try:
            return step()
        except OSError as error:
            raise _no_export(error) from error

    return processes.by_first(said)


def agree(error: Exception | None) -> None:
    """Raises the first process's error in every process; returns once that one has come here too."""
    processes.agree(_no_export(error) if isinstance(error, OSError) else error)


def _no_export(error: OSError) -> ValueError:
    return ValueError(f"{error.filename or 'export'}: {error.strerror or error}; nothing was exported.")
