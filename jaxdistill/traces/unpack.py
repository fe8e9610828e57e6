"""Files as streams of bytes, unpacked: what kind a file is, its first bytes tell, and only then its name."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import zipfile
import zlib
from collections.abc import Generator
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa

SUFFIXES = (".gz", ".zst", ".bz2", ".xz", ".zip")
DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, pa.ArrowException)
"""What reading a file that is missing, cut off or damaged raises."""
_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"PK\x03\x04": "zip",
    b"PAR1": "parquet",
    b"ARROW1": "arrow file",
    b"FEA1": "feather 1",
}
_BY_SUFFIX = {".parquet": "parquet", ".arrow": "arrow stream", ".feather": "arrow file"}
_BUFFER = 1 << 20


def kind_of(path: Path) -> str:
    """`parquet`, `arrow stream`, `arrow file`, `feather 1`, a way of packing, or `plain`.

    Raises:
      OSError: no such file.
    """
    with open(path, "rb") as file:
        first = file.read(8)
    found = next((kind for magic, kind in _MAGIC.items() if first.startswith(magic)), None)
    return found or _BY_SUFFIX.get(path.suffix.lower(), "plain")


def streams(
    path: Path, name: str, kind: str, suffixes: tuple[str, ...]
) -> Generator[tuple[str, io.BufferedReader], None, None]:
    """(name, stream) of the file, or of each file of an archive that ends in one of `suffixes`.

    Raises:
      ValueError: an archive without such files.
    """
    if kind != "zip":
        inner = path.stem if path.suffix.lower() in SUFFIXES else path.name
        with contextlib.ExitStack() as open_now:
            yield inner, _open(path, kind, open_now)
        return
    with zipfile.ZipFile(path) as archive:
        members = sorted(m for m in archive.namelist() if m.lower().endswith(suffixes) and _is_data(m))
        if not members:
            raise ValueError(f"{name}: no files that end in {', '.join(suffixes)} in this archive; unpack it.")
        for member in members:
            try:
                opened = archive.open(member)
            except (RuntimeError, NotImplementedError) as error:  # encrypted, or packed in another way
                raise ValueError(f"{name}: {member} cannot be unpacked ({error}); unpack it yourself.") from None
            with opened as stream:
                yield member, io.BufferedReader(_raw(stream), _BUFFER)


def _is_data(member: str) -> bool:
    """Not what macOS puts beside every file of an archive."""
    return not member.startswith("__MACOSX/") and not PurePosixPath(member).name.startswith(".")


def _open(path: Path, kind: str, open_now: contextlib.ExitStack) -> io.BufferedReader:
    if kind == "zstd":
        stream: Any = open_now.enter_context(pa.input_stream(str(path), compression="zstd"))
        return open_now.enter_context(io.BufferedReader(stream, _BUFFER))
    if kind == "plain":
        return open_now.enter_context(io.BufferedReader(io.FileIO(path), _BUFFER))
    opened: Any = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}[kind](path, "rb")
    return io.BufferedReader(_raw(open_now.enter_context(opened)), _BUFFER)


def _raw(stream: Any) -> Any:
    """Streams that unpack have what a buffer reads from, though no checker of types knows it."""
    return stream
