"""What a teacher has answered so far: an append-only file of JSON lines that outlives `kill -9`.

The first line is a header: everything that must be the same for the lines below to belong together. Each further line
is one completion. A write that a kill cut short can only be the last line; opening the journal again cuts it off.
Logprobs lie in `logprobs.bin` beside it, written before the line that tells where. In memory stays where each
completion's line begins, 8 bytes a sample; its content is read back when it is wanted.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxdistill.traces import logprobs
from jaxdistill.traces.engines import Completion

LOGPROBS = "logprobs.bin"
NO_MORE = ("traces.think_tags",)
"""Keys of older headers that may differ."""
SYNC_SECONDS = 5.0
"""A kill loses nothing that was added; a power cut at most what was added in so many seconds."""


class Journal:
    """An open journal of samples that are numbered from 0; `journal.has(n)` tells whether sample n is in it."""

    def __init__(
        self,
        path: Path,
        header: dict[str, Any],
        *,
        size: int,
        number_of: Callable[[str], int | None],
        retry_failed: bool = False,
    ):
        """Opens a journal, or starts it with `header`.

        Args:
          size: how many samples there are.
          number_of: a sample's number, by its id; None for one that is not wanted.
          retry_failed: a failure counts as missing. So it does where nothing else is there: what made all samples fail
            is mended by now, or makes them fail again.
        Raises:
          ValueError: it was started with another header and has answers, holds a broken line, or another process is
            writing to it.
        """
        self.path = path
        self._number_of = number_of
        self._line_at = np.full(size, -1, np.int64)
        self._failed = np.zeros(size, np.bool_)
        self._synced, self._dirty = time.monotonic(), False
        path.parent.mkdir(parents=True, exist_ok=True)
        # unbuffered: a line is with the operating system when `add` returns, and no signal to us can lose it
        self._file = open(path, "a+b", buffering=0)  # noqa: SIM115
        try:
            self._lock()  # first: until then the files may be another process's
            self._binary = open(path.parent / LOGPROBS, "a+b", buffering=0)  # noqa: SIM115
        except BaseException:
            self._file.close()
            raise
        try:
            self._read(header)
        except BaseException:
            self._close()
            raise
        if retry_failed or not self.answered:
            self._line_at[self._failed] = -1
            self._failed[:] = False

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_) -> None:
        self._sync()
        self._close()

    def __len__(self) -> int:
        """How many samples it has."""
        return int((self._line_at >= 0).sum())

    @property
    def answered(self) -> int:
        """How many samples it has that did not fail."""
        return int(((self._line_at >= 0) & ~self._failed).sum())

    def failures(self, most: int = 1000) -> Counter[str]:
        """Why samples failed: reason -> samples, of the first `most` that did."""
        numbers = np.flatnonzero((self._line_at >= 0) & self._failed)[:most]
        return Counter(self.read(int(number)).error or "no reason" for number in numbers)

    def has(self, number: int) -> bool:
        return bool(self._line_at[number] >= 0)

    def missing(self) -> np.ndarray:
        """int64 numbers of the samples that it does not have, ascending."""
        return np.flatnonzero(self._line_at < 0)

    def read(self, number: int) -> Completion:
        """The completion of a sample that the journal has."""
        assert self.has(number)
        # a handle of its own would cost an open a sample; reads do not move where appends go
        self._file.seek(int(self._line_at[number]))
        data = bytearray()
        while not data.endswith(b"\n"):
            part = self._file.read(1 << 16)
            assert part, "a line that was there when the journal was opened"
            end = part.find(b"\n") + 1
            data += part[:end] if end else part
        return self._completion(json.loads(data))

    def add(self, completion: Completion) -> bool:
        """Appends one completion, and tells whether it was new: of two with the same id the first counts."""
        number = self._number_of(completion.id)
        assert number is not None, "an engine answers only what it was asked"
        if self.has(number):
            return False
        row: dict[str, Any] = {
            "id": completion.id,
            "output_ids": completion.output_ids,
            "finish_reason": completion.finish_reason,
        }
        row |= {name: value for name in _OPTIONAL if (value := getattr(completion, name)) is not None}
        if completion.logprobs is not None:
            tokens, k = completion.logprobs.ids.shape
            row["logprobs"] = [self._binary.seek(0, os.SEEK_END), tokens, k]
            _write(self._binary, logprobs.encode(completion.logprobs))
        at = self._file.seek(0, os.SEEK_END)
        self._write(row)
        self._line_at[number], self._dirty = at, True
        self._failed[number] = completion.finish_reason == "error"
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self._sync()
        return True

    def _completion(self, row: dict[str, Any]) -> Completion:
        place = row.pop("logprobs", None)
        if place is None:
            return Completion(**row)
        start, tokens, k = place
        data = os.pread(self._binary.fileno(), logprobs.size(tokens, k), start)
        return Completion(**row, logprobs=logprobs.decode(data, tokens, k))

    def _write(self, data: dict[str, Any]) -> None:
        _write(self._file, json.dumps(data, separators=(",", ":")).encode() + b"\n")

    def _sync(self) -> None:
        if not self._dirty:
            return
        for file in (self._binary, self._file):  # a line never reaches the disk before what it tells of
            os.fsync(file.fileno())
        self._synced, self._dirty = time.monotonic(), False

    def _close(self) -> None:
        if not os.fstat(self._binary.fileno()).st_size:
            (self.path.parent / LOGPROBS).unlink(missing_ok=True)
        self._binary.close()
        self._file.close()  # gives the lock back

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{self.path}: another process is writing to it; wait for it to end, or end it.") from None

    def _read(self, header: dict[str, Any]) -> None:
        """Line by line, so that a long journal needs no more memory than a short one."""
        used, stored = 0, os.fstat(self._binary.fileno()).st_size
        at, other = 0, ""
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    self._file.truncate(at)
                    break
                row = self._parse(line, number)
                if number == 1:
                    other = self._other_settings(row, header)
                else:
                    end = self._note(row, at, number, stored)
                    used = max(used, end)
                at += len(line)
        if other and self.answered:
            raise ValueError(
                f"{self.path}: these traces were begun with other settings: {other}. "
                f"Set them back to go on, or remove {self.path.parent} (or name another run_dir) to start anew."
            )
        if other:  # a server refused all, and its settings were corrected: there is nothing to keep
            self._file.truncate(0)
            self._line_at[:], self._failed[:], at = -1, False, 0
        if at == 0:
            self._write(header)
        self._binary.truncate(used)  # what a kill left without a line

    def _note(self, row: dict[str, Any], at: int, line: int, stored: int) -> int:
        """Remembers where a line is. Gives the end of its logprobs in their file."""
        if not isinstance(row.get("id"), str) or "finish_reason" not in row:
            raise self._broken(line)
        start, tokens, k = row.get("logprobs", (0, 0, 0))
        end = start + logprobs.size(tokens, k)
        number = self._number_of(row["id"])
        if end > stored:  # a power cut took the logprobs: the sample is drawn again
            return 0
        failed = row["finish_reason"] == "error"
        if number is not None and (not self.has(number) or (self._failed[number] and not failed)):
            self._line_at[number], self._failed[number] = at, failed
        return end

    def _other_settings(self, found: dict[str, Any], header: dict[str, Any]) -> str:
        """What is not as it was when the journal was begun; empty if all is."""
        header = json.loads(json.dumps(header))  # tuples are lists there
        keys = [key for key in {**header, **found} if key not in NO_MORE]
        changed = [key for key in keys if header.get(key) != found.get(key)]
        return "; ".join(_change(key, found, header) for key in changed)

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except ValueError:
            raise self._broken(number) from None
        if not isinstance(row, dict):
            raise self._broken(number)
        return row

    def _broken(self, number: int) -> ValueError:
        return ValueError(f"{self.path}:{number}: broken line in a journal; remove that line to draw its sample again.")


_OPTIONAL = ("error", "text", "tokens", "prompt_ids")


def _write(file: Any, data: bytes) -> None:
    while data:
        data = data[file.write(data) :]


def _change(key: str, before: dict[str, Any], now: dict[str, Any]) -> str:
    """One changed setting; what only a hash tells of is named without it."""
    if key.startswith("the "):
        return f"{key} changed"
    return f"{key} was {json.dumps(before.get(key))}, is {json.dumps(now.get(key))}"
