"""A student in Hugging Face format: safetensors with an index, configs, tokenizer, chat template and model card.

Any number of processes may hold the model. All of them call `export_hf` and take part in gathering every tensor; the
first one writes, and the others return when the folder has its name, or raise what stopped the writing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxdistill.models import Decoder, ModelConfig, params_of
from jaxdistill.models.load import get
from jaxdistill.models.names import Entry, entries
from jaxdistill.models.tensor_files import BITS, INDEX, SINGLE, encode_header
from jaxdistill.records import atomic_folder

T = TypeVar("T")

DTYPES = {"float32": "F32", "bfloat16": "BF16"}
"""What can be exported, and safetensors' names for it."""
TOKENIZER_SUFFIXES = (".jinja", ".txt", ".model")
TOKENIZER_JSON = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "chat_template.json",
)
# of a base config: what ours says in other words, what was done to its weights, and code that does not come along
_DROPPED = ("rope_theta", "rope_scaling", "rope_parameters", "quantization_config", "auto_map", "_name_or_path")
_WORDS = 1024
"""Bytes of an error that are told to the other processes."""


def export_hf(
    model: Decoder,
    path: Path,
    *,
    tokenizer: Path,
    card: str,
    dtype: str = "float32",
    max_shard_bytes: int = 4 << 30,
    check: Callable[[Path], Any] | None = None,
    base_config: Mapping[str, Any] | None = None,
    base_generation_config: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes a checkpoint that transformers and vLLM load.

    The folder is written beside its place and renamed last, so that nothing partial is ever found there. Beside the
    model, memory holds about one tensor. With several processes every one has to call this, with the same arguments.

    Args:
      path: on a disk that the first process sees.
      tokenizer: folder with the tokenizer's files, which are copied as they are.
      dtype: `float32`, or `bfloat16` (rounded to nearest, ties to even).
      max_shard_bytes: a file holds at most this many bytes of tensors, or one tensor.
      check: called with the folder before it is renamed, in the writing process alone, so it must not compute with
        arrays that other processes share; what it raises stops the export, what it returns is passed on.
      base_config: `config.json` of the checkpoint that the model was loaded from, whose other keys are kept.
      base_generation_config: its `generation_config.json`, likewise.
    Returns:
      {"tensors", "bytes", "files", "check"}; `check` is None in processes that do not write.
    Raises:
      ValueError: the disk is full or read-only, the tokenizer or an argument is unfit; nothing was exported then.
    """
    if dtype not in DTYPES:
        raise ValueError(f"export: dtype {dtype!r}; choose {' or '.join(DTYPES)}.")
    if max_shard_bytes < 1:
        raise ValueError(f"export: max_shard_bytes is {max_shard_bytes}; a file must hold something.")
    path = Path(path)
    files = plan_files(model, DTYPES[dtype], max_shard_bytes)
    with contextlib.ExitStack() as stack:
        folder = _by_the_writer(lambda: stack.enter_context(atomic_folder(path)), path)
        for name, pieces in files.items():
            _write_file(folder / name if folder else None, pieces, DTYPES[dtype], path)

        def finish() -> Any:
            assert folder is not None
            _write_index(folder, files)
            _write_configs(model.config, folder, tokenizer, dtype, base_config, base_generation_config)
            (folder / "README.md").write_text(card)
            for file in sorted(tokenizer.iterdir()):
                if file.suffix in TOKENIZER_SUFFIXES or file.name in TOKENIZER_JSON:
                    shutil.copyfile(file, folder / file.name)
            return check(folder) if check else None

        checked = _by_the_writer(finish, path)
        _by_the_writer(stack.close, path)  # the renaming
    return {
        "tensors": sum(map(len, files.values())),
        "bytes": sum(piece.bytes for pieces in files.values() for piece in pieces),
        "files": len(files),
        "check": checked,
    }


# ------------------------------------------------------------------------------------------------------- tensors


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
    for piece in _pieces(model, dtype):
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


def _pieces(model: Decoder, dtype: str) -> Iterator[Piece]:
    """Every tensor, layer by layer, so that a layer's tensors share a file."""
    params, config = params_of(model), model.config

    def piece(entry: Entry, layer: int | None) -> Piece:
        array, names = get(params, entry.path), entry.hf_names(config)
        shape = array.shape if layer is None else array.shape[1:]
        shape = shape[::-1] if entry.transposed else shape
        return Piece(names[layer or 0], shape, dtype, array, layer, entry.transposed)

    for stacked, group in itertools.groupby(entries(config), lambda entry: entry.stacked):
        members = list(group)
        if not stacked:
            yield from (piece(entry, None) for entry in members)
            continue
        for layer in range(max(len(entry.hf_names(config)) for entry in members)):
            yield from (piece(entry, layer) for entry in members if layer < len(entry.hf_names(config)))


def _write_file(path: Path | None, pieces: list[Piece], dtype: str, export: Path) -> None:
    """Writes one safetensors file, tensor after tensor.

    Args:
      path: None in processes that do not write: they take part in the gathering.
    """
    error: Exception | None = None
    with contextlib.ExitStack() as stack:
        file = None
        try:
            if path is not None:
                file = stack.enter_context(open(path, "wb", buffering=0))
                _write_all(file, encode_header({piece.name: (dtype, piece.shape) for piece in pieces}))
        except OSError as failed:
            error = failed
        for piece in pieces:
            # a writer that failed goes on gathering to the end of the file: the others wait for it there
            value = gather(piece, keep=file is not None and error is None)
            if value is None or file is None:
                continue
            try:
                _write_all(file, value.reshape(-1).view(np.uint8))
            except OSError as failed:
                error = failed
        if file is not None and error is None:
            try:
                os.fsync(file.fileno())
            except OSError as failed:
                error = failed
    _agree(error, export)


def _write_all(file: Any, data: Any) -> None:
    left = memoryview(data)
    while left:
        left = left[file.write(left[: 1 << 30]) :]


def gather(piece: Piece, *, keep: bool) -> np.ndarray | None:
    """One tensor in host memory, contiguous, as it lies in the checkpoint; None where it is not to be kept."""
    array = piece.array
    sharding: Any = None  # stays as it is: this process has all of it
    if not array.is_fully_addressable:
        assert isinstance(array.sharding, NamedSharding)
        sharding = NamedSharding(array.sharding.mesh, PartitionSpec())
    take = _take(sharding, piece.layer is not None, piece.transposed, piece.dtype)
    value = take(array, piece.layer or 0)
    if not keep:
        # as slow as the writer, or the queue of gathered tensors would grow
        value.block_until_ready()
        return None
    return np.ascontiguousarray(value.addressable_data(0) if sharding is not None else value)


@functools.cache
def _take(sharding: Any, stacked: bool, transposed: bool, dtype: str) -> Any:
    """(parameter, layer) -> the tensor; on every device if a sharding says so."""

    def take(array: jax.Array, layer: jax.Array) -> jax.Array:
        value = jax.lax.dynamic_index_in_dim(array, layer, keepdims=False) if stacked else array
        value = value.T if transposed else value
        return value.astype({"F32": jnp.float32, "BF16": jnp.bfloat16}[dtype])

    return jax.jit(take, out_shardings=sharding)


# --------------------------------------------------------------------------------------------------- other files


def _write_index(folder: Path, files: Mapping[str, list[Piece]]) -> None:
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(piece.bytes for pieces in files.values() for piece in pieces)},
            "weight_map": {piece.name: name for name, pieces in files.items() for piece in pieces},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _write_configs(
    model: ModelConfig,
    folder: Path,
    tokenizer: Path,
    dtype: str,
    base: Mapping[str, Any] | None,
    base_generation: Mapping[str, Any] | None,
) -> None:
    from jaxdistill.tokenization import load_tokenizer

    loaded = load_tokenizer(str(tokenizer))
    ours = model.to_hf()
    base = base or {}
    if base.get("model_type", ours["model_type"]) != ours["model_type"]:
        raise ValueError(
            f"export: base_config is of a {base['model_type']} model, and this is a {ours['model_type']}; "
            "give the config.json that the model was loaded from."
        )
    tokens = {name: getattr(loaded, name) for name in ("eos_token_id", "pad_token_id", "bos_token_id")}
    kept = {key: value for key, value in base.items() if key not in _DROPPED}
    config = kept | ours | _special_tokens(tokens, base) | {"dtype": dtype, "torch_dtype": dtype}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = dict(base_generation or {})
    found = _special_tokens(tokens, generation or base)
    generation |= {key: value for key, value in found.items() if value is not None}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def _special_tokens(ours: Mapping[str, int | None], base: Mapping[str, Any]) -> dict[str, Any]:
    """The base's ids where it has the tokenizer's eos among its own, else it is of another tokenizer: ours."""
    eos = base.get("eos_token_id")
    if ours["eos_token_id"] not in (eos if isinstance(eos, list) else [eos]):
        return dict(ours)
    return {name: value if base.get(name) is None else base[name] for name, value in ours.items()}


# ----------------------------------------------------------------------------------------------- many processes


def _by_the_writer(step: Callable[[], T], export: Path) -> T | None:
    """Runs a step in the first process, while the others wait; if it fails there, every process raises."""
    error: Exception | None = None
    result = None
    if jax.process_index() == 0:
        try:
            result = step()
        except Exception as failed:
            error = failed
    _agree(error, export)
    return result


def _agree(error: Exception | None, export: Path) -> None:
    """Raises the first process's error in every process; returns once that one has come here too."""
    if isinstance(error, OSError):
        where = f" ({error.filename})" if error.filename else ""
        error = ValueError(f"{export}: {error.strerror or error}{where}; nothing was exported.")
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        words = np.zeros(_WORDS, np.uint8)
        said = (str(error) or repr(error)).encode()[:_WORDS] if error is not None else b""
        words[: len(said)] = np.frombuffer(said, np.uint8)
        told = bytes(np.asarray(multihost_utils.broadcast_one_to_all(words))).rstrip(b"\0").decode(errors="replace")
        if error is None and told:
            raise ValueError(told)
    if error is not None:
        raise error
