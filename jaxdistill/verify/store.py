"""Results that outlive a run: a file of lines, each found by a hash of all that its result depends on.

A result is the same however often, in whatever order and by whichever process it is computed, so that what is there
need not be computed again: after `kill -9`, with more traces, with other thresholds. It is no input and no output: if
it is removed, the next run computes it anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

HEX = 32


def key_of(*parts: str | None) -> str:
    """A hash of texts, 32 hexadecimal digits: equal exactly if all parts are."""
    digest = hashlib.blake2b(digest_size=HEX // 2)
    for part in parts:
        data = b"" if part is None else part.encode("utf-8", "surrogatepass")
        digest.update(f"{'-' if part is None else len(data)}:".encode() + data)
    return digest.hexdigest()


def hash_of_code(names: Iterable[str], libraries: Iterable[str] = ()) -> str:
    """A hash of modules and folders beside this one, and of libraries' versions: a result of other code is not used."""
    here = Path(__file__).parent
    files = [here / name for name in names]
    files = [f for path in files for f in (sorted(path.glob("*.py")) if path.is_dir() else [path])]
    versions = []
    for name in libraries:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions.append(f"{name} {metadata.version(name)}")
    return key_of(*(f.read_text(encoding="utf-8") for f in files), *versions)


class Store:
    """An open store; as a context manager it closes itself.

    In memory is where each result's line begins, not the result.
    """

    def __init__(self, path: Path, code: str):
        """Opens a store, or starts it anew if it was written by other code."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._at: dict[bytes, int] = {}
        self._waiting: dict[str, Any] = {}
        self._file = open(path, "a+b")  # noqa: SIM115
        end = self._old = self._read(code)
        if end == 0:
            self._file.truncate(0)
            self._file.write(f"{code}\n".encode())
            self._file.flush()
        else:
            self._file.truncate(end)  # the line that a kill cut short

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()
        self._file.close()

    def __len__(self) -> int:
        return len(self._at) + len(self._waiting)

    def get(self, key: str) -> Any:
        """A result, or None if it is not there."""
        if key in self._waiting:
            return self._waiting[key]
        at = self._at.get(bytes.fromhex(key))
        if at is None:
            return None
        self._file.seek(at)
        try:
            return json.loads(self._file.readline()[HEX + 1 :])
        except ValueError:  # what a power cut left
            return None

    def is_old(self, key: str) -> bool:
        """Whether a result was there when the store was opened."""
        return self._at.get(bytes.fromhex(key), self._old) < self._old

    def put(self, key: str, result: Any) -> None:
        """Takes a result, which is on file after the next `flush`."""
        self._waiting[key] = result

    def flush(self) -> None:
        """Writes what was put: from then on no kill can lose it."""
        if not self._waiting:
            return
        at = self._file.seek(0, 2)
        lines = []
        for key, result in self._waiting.items():
            lines.append(f"{key} {json.dumps(result, separators=(',', ':'))}\n".encode())
            self._at[bytes.fromhex(key)] = at
            at += len(lines[-1])
        self._file.write(b"".join(lines))
        self._file.flush()
        self._waiting = {}

    def _read(self, code: str) -> int:
        """Notes where the lines are; gives the end of the last whole one, 0 if nothing can be used."""
        self._file.seek(0)
        if self._file.readline() != f"{code}\n".encode():
            return 0
        at = self._file.tell()
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            with contextlib.suppress(ValueError):
                self._at[bytes.fromhex(line[:HEX].decode("ascii"))] = at
            at += len(line)
        return at
