"""Rows of other people's files, one after the other: JSON lines and lists, CSV, Parquet, Arrow, and folders of them.

What is compressed (gzip, zstd, bzip2, xz, zip) is unpacked on the way. A row that cannot be read comes as a `BadRow`
in its place; what is wrong with a whole file is an error, for nobody knows how many rows it costs.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jaxdistill.traces import columns, csv_rows, json_rows, unpack
from jaxdistill.traces.values import BadRow

TEXT_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
TABLE_SUFFIXES = (".parquet", ".arrow", ".feather")
SUFFIXES = TEXT_SUFFIXES + TABLE_SUFFIXES
_NOT_DATA = {"state.json", "dataset_info.json", "dataset_dict.json", "dataset_infos.json"}
"""What `datasets` writes beside its data."""


class Row(NamedTuple):
    """One row and where it stands."""

    file: DataFile
    number: int
    """From 1: of JSON lines the line's, of everything else the row's."""
    data: dict[str, Any] | BadRow

    @property
    def where(self) -> str:
        return f"{self.file.name}:{self.number}"


@dataclass(frozen=True)
class DataFile:
    """A file of rows, which is fetched when its rows are wanted."""

    name: str
    """What messages call it: its path, or its address on the hub."""
    stem: str
    """What ids of its rows begin with."""
    source: str
    """What `Problem.source` calls it."""
    fetch: Callable[[], Path]


def local_files(path: Path) -> list[DataFile]:
    """A file, or all data files of a folder in the order of their names.

    Raises:
      ValueError: a folder without data, or with several splits.
    """
    path = path.expanduser()
    found = _files(path) if path.is_dir() else [path]
    stems = [file.stem for file in found]
    # two files of one name but for the ending would give their rows the same ids
    unique = {file: file.stem if stems.count(file.stem) == 1 else file.name for file in found}
    return [DataFile(str(file), unique[file], file.name, lambda file=file: file) for file in found]


def read_rows(path: Path) -> Iterator[tuple[Path, int, dict[str, Any]]]:
    """All rows of a file or folder for those who want every one: (file, number, row).

    Raises:
      ValueError: nothing there, or a row that cannot be read (file and row are named).
    """
    for row in rows(local_files(path)):
        if isinstance(row.data, BadRow):
            raise row.data.at(row.where)
        yield row.file.fetch(), row.number, row.data


def rows(files: Iterable[DataFile], wanted: Collection[str] = (), needed: Collection[str] = ()) -> Iterator[Row]:
    """All rows of some files, few of them in memory at once.

    Args:
      wanted: the fields that will be looked at; of a table no others are read. All of them if empty.
      needed: those without which a whole table is not what was meant.
    Raises:
      ValueError: no such file, one that is damaged or of another kind, or a table without a needed column.
    """
    for file in files:
        for number, data in _read(file.fetch(), file.name, wanted, needed):
            yield Row(file, number, data)


def _read(
    path: Path, name: str, wanted: Collection[str], needed: Collection[str]
) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    number = 0
    try:
        kind = unpack.kind_of(path)
        if kind == "feather 1":
            raise ValueError(f"{name}: Feather's first version, which is not read any more; save it again.")
        if kind in columns.READERS:
            found = columns.rows(path, name, kind, wanted, needed)
        else:
            found = _texts(path, name, kind, needed)
        for number, data in found:
            yield number, data
    except unpack.DAMAGED as error:
        raise _unreadable(name, number, error) from None


def _texts(path: Path, name: str, kind: str, needed: Collection[str]) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    """Rows of a file of text, unpacked; those of an archive's second file are numbered on from its first."""
    before = number = 0
    with contextlib.closing(unpack.streams(path, name, kind, TEXT_SUFFIXES)) as streams:
        for inner, stream in streams:
            suffix = Path(inner).suffix.lower()
            is_csv = suffix in csv_rows.DELIMITERS
            found = csv_rows.rows(stream, name, suffix, needed) if is_csv else json_rows.rows(stream, name)
            before = number
            for line, data in found:
                number = before + line
                yield number, data


def _unreadable(name: str, number: int, error: Exception) -> ValueError:
    reason = str(getattr(error, "strerror", None) or error).strip().splitlines()[0].rstrip(".").lower()
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError):
        return ValueError(f"{name}: {reason}; name a file in `path`.")
    place = f"after row {number:,}" if number else "from its start"
    return ValueError(f"{name}: damaged or cut off {place} ({reason}); fetch it again, or name another in `path`.")


def _files(folder: Path) -> list[Path]:
    """The data files of a folder; those of `datasets` lie beside state.json, dataset_info.json and the like."""
    splits = folder / "dataset_dict.json"
    if splits.is_file():
        names = json.loads(splits.read_text()).get("splits", [])
        if len(names) != 1:
            raise ValueError(f"{folder}: it has the splits {', '.join(names)}; name one, such as {folder / names[0]}.")
        folder = folder / names[0]
    found = sorted(f for f in folder.iterdir() if is_data(f.name) and f.is_file())
    if not found:
        raise ValueError(f"{folder}: no data in it; expected files that end in {', '.join(SUFFIXES)}.")
    return found


def has_data(folder: Path) -> bool:
    """Whether rows lie in the folder itself, or `datasets` has put splits there."""
    return (folder / "dataset_dict.json").is_file() or any(is_data(f.name) for f in folder.iterdir() if f.is_file())


def is_data(name: str) -> bool:
    """Whether a file of that name holds rows."""
    return name not in _NOT_DATA and not name.startswith((".", "_")) and suffix_of(name) in SUFFIXES


def suffix_of(name: str) -> str:
    """What a file's name ends in, `.gz` and the like left out: `.jsonl` of `a.jsonl.gz`."""
    path = Path(name)
    return Path(path.stem if path.suffix.lower() in unpack.SUFFIXES else path.name).suffix.lower()
