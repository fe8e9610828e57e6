"""Rows of JSON: one object a line, or a list of objects, read piece by piece, so that a large file needs no memory."""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Iterator
from typing import Any

from jaxdistill.traces.values import BadRow, Twice

BOM = codecs.BOM_UTF8
OTHER_BOMS = {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}
PIECE = 1 << 20
_START = 200
_SPACE = " \t\r\n"
_CHATS = ("messages", "conversations")
_LISTS = re.compile(rb"\[.*\]\s*\n\s*\[")
"""A list in the first line and another in the next: a list a line, and not one list of all rows."""


def rows(stream: io.BufferedReader, name: str) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    """Every row with its number from 1: of lines the line's, of a list the element's.

    Raises:
      ValueError: what is no row's fault alone: another encoding, a list that is broken off or not JSON.
    """
    first = stream.peek(1 << 12)
    for bom, encoding in OTHER_BOMS.items():
        if first.startswith(bom):
            raise ValueError(f"{name}: it is in {encoding}; save it as UTF-8.")
    if first.startswith(BOM):
        stream.read(len(BOM))
        first = first[len(BOM) :]
    if first.startswith(b"version https://git-lfs"):
        raise ValueError(f"{name}: a pointer of Git LFS and not the file itself; fetch it with `git lfs pull`.")
    is_list = first.lstrip().startswith(b"[") and not _LISTS.match(first.lstrip())
    return _elements(stream, name) if is_list else _lines(stream)


def _lines(stream: io.BufferedReader) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    for number, line in enumerate(stream, start=1):
        if line.strip():
            yield number, parse(line)


def parse(line: bytes) -> dict[str, Any] | BadRow:
    """One line as a row."""
    try:
        # files with such a mark may have been put behind each other
        found = _DECODER.decode(line.removeprefix(BOM).decode())
    except UnicodeDecodeError as error:
        return BadRow("not UTF-8", f" at byte {error.start}; convert the file", start=_start(line))
    except json.JSONDecodeError as error:
        last = not line.endswith(b"\n")
        if last and (error.pos >= len(error.doc.rstrip()) - 1 or "Unterminated" in error.msg):
            return BadRow("not valid JSON: the file ends within the line", start=_start(line))
        if error.msg == "Extra data" and error.doc[error.pos] in "{[":
            return BadRow(
                "several JSON objects in one line", f" (a second at column {error.colno})", start=_start(line)
            )
        # some of its messages end in "at" themselves
        detail = f" ({error.msg.removesuffix(' at')} at column {error.colno}); each line must be one JSON object"
        return BadRow("not valid JSON", detail, start=_start(line))
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; nested too deep
        return BadRow("not valid JSON", f" ({' '.join(str(error).split())})", start=_start(line))
    return _object(found)


def _elements(stream: io.BufferedReader, name: str) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    """The elements of one list, whatever its size: decoded one after the other from a buffer."""
    text = _Buffer(stream, name)
    text.skip("[")
    number = 0
    while text.next() != "]":
        if number:
            text.skip(",")
        number += 1
        yield number, _object(text.element(number))
    text.skip("]")
    if text.next():
        raise ValueError(f"{name}: not valid JSON: something stands behind the end of its list.")


class _Buffer:
    """The text of a stream from the place that was reached."""

    def __init__(self, stream: io.BufferedReader, name: str):
        self._stream, self._name = stream, name
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self._text, self._at, self._ended = "", 0, False

    def next(self) -> str:
        """The next character that is no space, which is not consumed; empty at the end."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in _SPACE:
                    return self._text[self._at]
                self._at += 1
            if self._ended:
                return ""
            self._more(PIECE)

    def skip(self, expected: str) -> None:
        found = self.next()
        if found != expected:
            what = f"{found!r} instead of {expected!r}" if found else "its list is cut off"
            raise ValueError(f"{self._name}: not valid JSON: {what}; write one object a line, or a whole list.")
        self._at += 1

    def element(self, number: int) -> Any:
        """The next element; more is read until it is whole, twice as much each time."""
        self.next()
        piece = PIECE
        while True:
            try:
                found, end = _DECODER.raw_decode(self._text, self._at)
                if end < len(self._text) or self._ended:  # a number may go on in the next piece
                    self._at = end
                    return found
            except (ValueError, RecursionError) as error:
                if self._ended:
                    said = " ".join(str(error).split())
                    message = f"{self._name}:{number}: not valid JSON, or its list is cut off here ({said})."
                    raise ValueError(message) from None
            self._more(piece)
            piece *= 2

    def _more(self, size: int) -> None:
        data = self._stream.read(size)
        self._ended = not data
        try:
            self._text = self._text[self._at :] + self._decode(data, final=self._ended)
        except UnicodeDecodeError:
            raise ValueError(f"{self._name}: not UTF-8; convert the file.") from None
        self._at = 0


def _object(found: Any) -> dict[str, Any] | BadRow:
    if isinstance(found, dict):
        return found
    if isinstance(found, list) and found and all(isinstance(turn, dict) for turn in found):
        return {name: found for name in _CHATS}  # a chat that stands for itself
    return BadRow(f"expected a JSON object, found {type(found).__name__}", start=str(found)[:_START])


def _start(line: bytes) -> str:
    return line[:_START].decode(errors="replace").strip()


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose repeated keys are not silently the last of them."""
    found = dict(pairs)
    if len(found) != len(pairs):
        for key, value in pairs:
            if found[key] != value:
                found[key] = Twice()
    return found


def _constant(name: str) -> float | None:
    """`NaN` is how Python and pandas write a missing number."""
    return None if name == "NaN" else float(name)


# a gold answer 0.10 keeps its last digit
_DECODER = json.JSONDecoder(parse_float=str, parse_constant=_constant, object_pairs_hook=_pairs)
loads = _DECODER.decode
"""JSON text as rows have it: `ValueError` or `RecursionError` if it is none."""
