"""Rows of CSV and TSV, with quotes as RFC 4180 has them: a quoted field may hold line breaks."""

from __future__ import annotations

import contextlib
import csv
import io
import sys
from collections.abc import Collection, Iterator
from typing import Any

from jaxdistill.traces.values import BadRow, missing_column

DELIMITERS = {".csv": ",", ".tsv": "\t"}
_START = 200


def rows(
    stream: io.BufferedReader, name: str, suffix: str, needed: Collection[str]
) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    """Every row behind the line of names, numbered from 1; every value is text.

    Raises:
      ValueError: no line of names, a needed one that is not there, or a quote that is never closed.
    """
    csv.field_size_limit(sys.maxsize)  # a trace is longer than the 128 KiB that are allowed
    # bytes that are not UTF-8 are found in the one row that has them
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    try:
        yield from _rows(text, name, suffix, needed)
    finally:
        with contextlib.suppress(ValueError):  # closed already, where nobody wanted the rest
            text.detach()


def _rows(
    text: io.TextIOWrapper, name: str, suffix: str, needed: Collection[str]
) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    header = text.readline()
    delimiter = ";" if suffix == ".csv" and ";" in header and "," not in header else DELIMITERS[suffix]
    # strict: otherwise a stray quote takes in the rest of the file without a word
    try:
        names = next(csv.reader([header], delimiter=delimiter, strict=True), [])
    except csv.Error as error:
        raise ValueError(f"{name}: its first line is not valid CSV ({error}); write names of columns there.") from None
    if missing := missing_column(needed, names):
        raise ValueError(f"{name}: {missing[0]}; its first line has {', '.join(names) or 'nothing'}{missing[1]}.")
    if len(set(names)) != len(names):
        raise ValueError(f"{name}: a column's name stands twice in its first line; rename one.")
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    number = 0
    while True:
        number += 1
        begun = reader.line_num
        try:
            values = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            if "unexpected end of data" in str(error):
                line = begun + 2  # from 1, behind the line of names
                raise ValueError(f"{name}:{number}: a quote opens in line {line} and is never closed.") from None
            yield number, BadRow("not valid CSV", f" ({error})")
            continue
        if not values:  # an empty line
            number -= 1
        elif len(values) != len(names):
            detail = f": {len(values)} instead of {len(names)}"
            yield number, BadRow("another number of columns than the first line", detail, start=str(values)[:_START])
        else:
            yield number, dict(zip(names, values, strict=True))
