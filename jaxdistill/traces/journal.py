"""What a teacher has answered so far: an append-only file of JSON lines that outlives `kill -9`.

The first line is a header: everything that must be the same for the lines below to belong together. Each further line
is one completion. A write that a kill cut short can only be the last line; opening the journal again cuts it off.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
from pathlib import Path
from typing import Any

from jaxdistill.traces.engines import Completion


class Journal:
    """An open journal; `done` holds its completions by request id."""

    def __init__(self, path: Path, header: dict[str, Any]):
        """Opens a journal, or starts it with `header`.

        Raises:
          ValueError: it was started with another header, holds a broken line, or another process is writing to it.
        """
        self.path = path
        self.done: dict[str, Completion] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        # unbuffered: a line is with the operating system when `add` returns, and no signal to us can lose it
        self._file = open(path, "a+b", buffering=0)  # noqa: SIM115
        try:
            self._lock()
            self._read(header)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def add(self, completion: Completion) -> None:
        """Appends one completion. Of two with the same id the first counts."""
        self._write(dataclasses.asdict(completion))
        self.done.setdefault(completion.id, completion)

    def _write(self, data: dict[str, Any]) -> None:
        line = json.dumps(data, separators=(",", ":")).encode() + b"\n"
        while line:
            line = line[self._file.write(line) :]

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{self.path}: another process is writing to it; wait for it to end, or end it.") from None

    def _read(self, header: dict[str, Any]) -> None:
        self._file.seek(0)
        *lines, torn = self._file.readall().split(b"\n")
        if torn:
            self._file.truncate(self._file.tell() - len(torn))
        if not lines:
            self._write(header)
            return
        found = self._parse(lines[0], 1)
        changed = [key for key in {**header, **found} if header.get(key) != found.get(key)]
        if changed:
            changes = "; ".join(_change(key, found, header) for key in changed)
            raise ValueError(
                f"{self.path}: these traces were begun with other settings: {changes}. "
                f"Set them back to go on, or remove {self.path.parent} (or name another run_dir) to start anew."
            )
        for number, line in enumerate(lines[1:], start=2):
            row = self._parse(line, number)
            self.done.setdefault(row["id"], Completion(**row))

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            return json.loads(line)
        except ValueError:
            raise ValueError(
                f"{self.path}:{number}: broken line in a journal; remove that line to draw its sample again."
            ) from None


def _change(key: str, before: dict[str, Any], now: dict[str, Any]) -> str:
    """One changed setting; what only a hash tells of is named without it."""
    if key.startswith("the "):
        return f"{key} changed"
    return f"{key} was {json.dumps(before.get(key))}, is {json.dumps(now.get(key))}"
