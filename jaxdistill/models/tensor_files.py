"""The safetensors files of a checkpoint, read slice by slice into buffers of our own.

The format: 8 bytes, little-endian, with the length of a JSON header; the header, which gives every tensor's dtype,
shape and place in the data; the data. Source: https://github.com/huggingface/safetensors#format

The library that reads it maps files into memory, and mapped pages count as the process's own: with several files open,
loading a model would seem to hold it twice. Reads into a buffer count once, and end with the buffer.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

FLOATS = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
"""What weights may be stored as."""
BITS = {
    **{name: 8 * dtype.itemsize for name, dtype in FLOATS.items()},
    **{"F64": 64, "I64": 64, "U64": 64, "C64": 64, "I32": 32, "U32": 32, "I16": 16, "U16": 16},
    **{"I8": 8, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8},
    **{"F6_E2M3": 6, "F6_E3M2": 6, "F4": 4},
}
"""Bits an element of every dtype of the format."""
BLOCK = 16 << 20
"""Bytes read at once where only some columns of a matrix are wanted."""
_MAX_HEADER = 100 << 20  # the limit of the format


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where one tensor lies on disk."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """Of its first byte in the file."""

    def read(self, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """Reads a part of it, in the dtype it is stored in; memory beside the result stays below `BLOCK`.

        Args:
          index: one slice (of step 1) a dimension; all of it if absent.
        Raises:
          ValueError: the file ends early: it was changed since its header was read.
        """
        dtype = FLOATS[self.dtype]
        bounds = [s.indices(n)[:2] for s, n in zip(index or (slice(None),) * len(self.shape), self.shape, strict=True)]
        out = np.empty([stop - start for start, stop in bounds], dtype)
        if not out.size:
            return out
        row = math.prod(self.shape[1:]) * dtype.itemsize
        first, end = bounds[0] if bounds else (0, 1)
        with open(self.file, "rb", buffering=0) as file:
            if out.shape[1:] == self.shape[1:]:  # whole rows lie side by side
                self._fill(file, self.offset + first * row, out)
                return out
            at_once = max(1, BLOCK // row)
            inner = tuple(slice(*bound) for bound in bounds[1:])
            for start in range(first, end, at_once):
                rows = np.empty((min(at_once, end - start), *self.shape[1:]), dtype)
                self._fill(file, self.offset + start * row, rows)
                out[start - first : start - first + len(rows)] = rows[:, *inner]
        return out

    def _fill(self, file: Any, offset: int, out: np.ndarray) -> None:
        """Fills a contiguous array with the bytes from `offset` on."""
        file.seek(offset)
        left = out.reshape(-1).view(np.uint8)
        while len(left):
            got = file.readinto(left[: 1 << 30])  # a read may give less than was asked for, and never more than 2 GiB
            if not got:
                raise ValueError(f"{self.file}: it ends within tensor {self.name}; copy or download it again.")
            left = left[got:]


def open_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, by name; headers are read, data is not.

    Those of the files that the index names; without one of `model.safetensors`, or else of all safetensors files.
    Raises:
      ValueError: a file that is missing or not whole, a broken index, a tensor that is not where the index says, or
        `model.safetensors` beside an index of other files.
    """
    weight_map: dict[str, str] = {}
    if (folder / INDEX).is_file():
        weight_map = read_index(folder / INDEX)
        files = sorted(set(weight_map.values()))
        if (folder / SINGLE).is_file() and SINGLE not in files:
            raise ValueError(
                f"{folder}: {SINGLE}, and beside it {INDEX}, which names {files[0]} instead; transformers takes the "
                "first, and others what the index names. Remove the one that is not meant."
            )
        for name in files:
            if not (folder / name).is_file():
                raise ValueError(f"{folder}: no {name}, which {INDEX} names; download the checkpoint again.")
    elif (folder / SINGLE).is_file():
        files = [SINGLE]
    else:
        files = sorted(file.name for file in folder.glob("*.safetensors"))
    found: dict[str, Tensor] = {}
    for name in files:
        for key, tensor in read_header(folder / name).items():
            if key in found:
                raise ValueError(f"{folder}: tensor {key} is in {found[key].file.name} and in {name}; remove one file.")
            found[key] = tensor
    for key, name in weight_map.items():
        if key not in found:
            raise ValueError(f"{folder}/{name}: no tensor {key} in it, where {INDEX} says it is; download both again.")
        if found[key].file.name != name:
            raise ValueError(
                f"{folder}/{INDEX}: puts tensor {key} into {name}, but it is in {found[key].file.name}; "
                "correct the index or download it again."
            )
    return found


def read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file name.

    Raises:
      ValueError: it is not JSON, or has no `weight_map` of names.
    """
    try:
        index = json.loads(path.read_bytes())
    except ValueError as error:  # of the JSON or of the characters in it
        raise ValueError(f"{path}: not valid JSON ({error}); download it again.") from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path}: no weight_map (tensor name -> file) in it; download it again.")
    for key, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{path}: the file of tensor {key} is {name!r}; it must be a file beside the index.")
    return weight_map


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, by name.

    Raises:
      ValueError: it is cut off, is no safetensors file, or its header contradicts itself.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise _not_whole(path, f"{size:,} bytes, and a header of {length:,}")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        if not isinstance(header, dict):
            raise ValueError("a list or a value instead of names")
    except ValueError as error:
        raise _not_whole(path, f"the header is not valid JSON: {error}") from None
    data = 8 + length
    found, spans = {}, []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        tensor, end = _entry(path, name, entry, data)
        found[name] = tensor
        spans.append((tensor.offset, end, name))
    last = data
    for start, end, name in sorted(spans):
        if start != last:
            raise _not_whole(path, f"tensor {name} starts at byte {start:,} instead of {last:,}")
        last = end
    if last != size:
        raise _not_whole(path, f"{size:,} bytes instead of the {last:,} that its header describes")
    return found


def _entry(path: Path, name: str, entry: Any, data: int) -> tuple[Tensor, int]:
    """One entry of a header: the tensor, and where it ends in the file."""
    try:
        dtype, shape = str(entry["dtype"]), tuple(map(int, entry["shape"]))
        start, end = map(int, entry["data_offsets"])
    except (KeyError, TypeError, ValueError):
        raise _not_whole(path, f"the header's entry of tensor {name} is {json.dumps(entry)[:100]}") from None
    if dtype not in BITS:
        raise ValueError(f"{path}: tensor {name} has the unknown dtype {dtype!r}; weights must be {'/'.join(FLOATS)}.")
    if (end - start) * 8 != math.prod(shape) * BITS[dtype] or min(shape, default=0) < 0 or start < 0:
        raise _not_whole(path, f"tensor {name} of shape {list(shape)} in {dtype} has {end - start:,} bytes")
    return Tensor(name, path, dtype, shape, data + start), data + end


def _not_whole(path: Path, why: str) -> ValueError:
    return ValueError(f"{path}: not a whole safetensors file ({why}); copy or download it again.")


def encode_header(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """What a file starts with, for tensors (name -> dtype and shape) whose data follows in the same order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape) in tensors.items():
        end = at + math.prod(shape) * BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)  # the data starts at a multiple of 8
    return len(raw).to_bytes(8, "little") + raw
