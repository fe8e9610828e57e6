"""Rows of other people's files: JSON lines, JSON, Parquet, Arrow, and folders of them (`datasets.save_to_disk` too)."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

SUFFIXES = (".jsonl", ".json", ".parquet", ".arrow")
UNKNOWN_DOMAIN = "unknown"
Row = tuple[Path, int, dict[str, Any]]
"""A file, a row's number in it from 1 (of JSON lines, the line's), and the row."""


def read_rows(path: Path) -> Iterator[Row]:
    """All rows of a file, or of all files of a folder in the order of their names.

    Raises:
      ValueError: nothing there, several splits in one folder, or a row that cannot be read (file and row are named).
    """
    path = path.expanduser()
    for file in _files(path) if path.is_dir() else [path]:
        if file.suffix == ".parquet":
            yield from _parquet(file)
        elif file.suffix == ".arrow":
            yield from _arrow(file)
        elif file.suffix == ".json":
            yield from _json(file)
        else:
            yield from json_lines(file)


def json_lines(path: Path) -> Iterator[Row]:
    """Every line that is not blank, with its number from 1; `.gz` is unpacked."""
    path = path.expanduser()
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield path, number, _parse(line, f"{path}:{number}")
    except OSError as error:
        raise ValueError(f"{path}: {str(error.strerror).lower()}; name a file of JSON lines in `path`.") from None


def _files(folder: Path) -> list[Path]:
    """The data files of a folder; those of `datasets` lie beside state.json, dataset_info.json and the like."""
    splits = folder / "dataset_dict.json"
    if splits.is_file():
        names = json.loads(splits.read_text()).get("splits", [])
        if len(names) != 1:
            raise ValueError(f"{folder}: it has the splits {', '.join(names)}; name one, such as {folder / names[0]}.")
        folder = folder / names[0]
    other = {"state.json", "dataset_info.json", "dataset_dict.json"}
    found = sorted(f for f in folder.iterdir() if f.suffix in SUFFIXES and f.name not in other)
    if not found:
        raise ValueError(f"{folder}: no data in it; expected files that end in {', '.join(SUFFIXES)}.")
    return found


def _parquet(path: Path) -> Iterator[Row]:
    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield path, number, row
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, "a Parquet file", error) from None


def _arrow(path: Path) -> Iterator[Row]:
    """A `datasets` file: an Arrow stream."""
    try:
        with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as stream:
            number = 0
            for batch in stream:
                for row in batch.to_pylist():
                    number += 1
                    yield path, number, row
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, "an Arrow file of `datasets`", error) from None


def _json(path: Path) -> Iterator[Row]:
    try:
        data = json.loads(path.read_bytes(), parse_float=str)
    except OSError as error:
        raise _unreadable(path, "a JSON file", error) from None
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); a file with one object a line is named .jsonl.") from None
    if not isinstance(data, list):
        raise ValueError(f"{path}: expected a list of objects, found {type(data).__name__}.")
    for number, row in enumerate(data, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number}: expected a JSON object, found {type(row).__name__}.")
        yield path, number, row


def _unreadable(path: Path, what: str, error: Exception) -> ValueError:
    reason = str(getattr(error, "strerror", None) or error).strip().splitlines()[0].lower()
    return ValueError(f"{path}: not {what} that can be read ({reason}); name another in `path`.")


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode(), parse_float=str)  # a gold answer 0.10 keeps its last digit
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 at byte {error.start}; convert the file.") from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where}: not valid JSON ({error.msg} at column {error.colno}); each line must be one JSON object."
        ) from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, found {type(row).__name__}.")
    return row


# ----------------------------------------------------------------------------------------------------------- fields


def field(row: dict[str, Any], name: str, where: str) -> Any:
    if name not in row:
        raise ValueError(f"{where}: no field {name!r}; this line has {', '.join(sorted(row)) or 'none'}.")
    return row[name]


def domain(row: dict[str, Any], name: str | None, otherwise: str) -> str:
    """The domain that a row names in a field, or `unknown`; `otherwise` where no field is named."""
    if name is None:
        return otherwise
    value = row.get(name)
    return value.strip() if isinstance(value, str) and value.strip() else UNKNOWN_DOMAIN


def text(row: dict[str, Any], name: str, where: str) -> str:
    """A field that must hold text; whole numbers are taken for their digits."""
    value = field(row, name, where)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise ValueError(f"{where}: field {name!r} is {json.dumps(value, default=str)[:40]}; it must be text.")
    if not value.strip():
        raise ValueError(f"{where}: field {name!r} is empty; fill it, or take the line out.")
    return value
