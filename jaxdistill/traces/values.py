"""What the fields of other people's rows mean: text, a gold answer, a domain; or why a row cannot be read."""

from __future__ import annotations

import datetime
import decimal
import json
import math
from collections.abc import Collection
from typing import Any

UNKNOWN_DOMAIN = "unknown"
MISSING = ("nan", "NaN", "<NA>")
"""How pandas spells a missing value where it was made into text."""
_EXACT = 2**53
"""From here on a float does not hold every whole number."""
_SHOWN = 40


SHAPES = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "r1": ("problem", "generations"),
    "prompt_completion": ("prompt", "completion"),
}
"""Fields by which rows of a source with responses are known; the likeliest first."""


class BadRow(ValueError):
    """A row that cannot be read: a reason, the same for all rows of the kind, and what is special about this one."""

    def __init__(self, reason: str, detail: str = "", *, start: str | None = None):
        super().__init__(reason + detail)
        self.reason = reason
        self.detail = detail
        self.start = start
        """The row's first characters, where it has not even become an object."""

    def at(self, where: str) -> ValueError:
        """The same as an error that names the place, for those who want every row."""
        return ValueError(f"{where}: {self}.")


UNEXPECTED = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError)
"""What reading a row of a shape that nobody has thought of may raise."""


def unexpected(error: BaseException) -> BadRow:
    """Such an error as a row's reason: one odd row never stops a million."""
    return BadRow("a shape that is not known", f" ({type(error).__name__}: {' '.join(str(error).split())})")


class Twice:
    """Stands in a row for a key that its JSON gives twice, with two values."""

    def __repr__(self) -> str:
        return "two different values of one key"


def field(row: dict[str, Any], name: str) -> Any:
    """The value of a field.

    Raises:
      BadRow: the row does not have it, or has it twice.
    """
    if name not in row:
        raise BadRow(f"no field {name!r}", f"; this line has {', '.join(sorted(map(str, row))) or 'none'}")
    value = row[name]
    if isinstance(value, Twice):
        raise BadRow(f"field {name!r} stands in it twice, with different values")
    return value


def shape_field(row: dict[str, Any], name: str) -> Any:
    """The value of a field that makes the row one of its source.

    Raises:
      BadRow: as `field`; which source reads such rows, if one does.
    """
    try:
        return field(row, name)
    except BadRow as bad:
        bad = BadRow(bad.reason, bad.detail + other_source(list(map(str, row)))) if name not in row else bad
        raise bad from None


def other_source(names: Collection[str]) -> str:
    """Which source reads a row or table that lacks a field of its own, to be put behind that; empty if none does."""
    found = next((source for source, fields in SHAPES.items() if {*fields} <= {*names}), None)
    return f"; set source: {found}, which reads {' and '.join(SHAPES[found])}" if found else ""


def missing_column(needed: Collection[str], names: Collection[str]) -> tuple[str, str] | None:
    """What a table lacks, the source's own columns first, and which source reads it; None if it lacks nothing."""
    missing = next((name for name in needed if name not in names), None)
    if missing is None:
        return None
    is_shape = missing == next(iter(needed)) or any(missing in fields for fields in SHAPES.values())
    return f"no column {missing!r}", other_source(names) if is_shape else ""


def text(row: dict[str, Any], name: str) -> str:
    """A field that must hold text; numbers are taken for their digits, bytes for UTF-8.

    Raises:
      BadRow: it holds something else, or nothing.
    """
    value = field(row, name)
    found = written(value) if not isinstance(value, bool) else None
    if found is None:
        raise BadRow(f"field {name!r} is {kind(value)}; it must be text", f": {shown(value)}")
    if not found.strip():
        raise BadRow(f"field {name!r} is empty")
    return found


def gold(row: dict[str, Any], name: str) -> str | None:
    """The gold answer in a field, as it is written: a float of a whole number without its `.0`, a date by ISO 8601.

    None where there is none: null, an empty text, NaN (how pandas writes a missing number), an empty list. A list of
    one is that one; several could be one answer together or each be right, and are refused.

    Raises:
      BadRow: no single answer can be read from it.
    """
    value = field(row, name)
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value is None or value == [] or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, list):
        raise BadRow(f"field {name!r} has several gold answers", f": {shown(value)}")
    if isinstance(value, float) and math.isinf(value):
        raise BadRow(f"field {name!r} is infinite; no gold answer", f": {value}")
    if isinstance(value, float) and abs(value) >= _EXACT and len(_digits(value)) > 15:
        raise BadRow(f"field {name!r} is a float of 2**53 or more, which may have lost digits", f": {value!r}")
    found = written(value)
    if found is None:
        raise BadRow(f"field {name!r} is {kind(value)}; no gold answer", f": {shown(value)}")
    found = found.strip()
    return None if not found or found in MISSING else found


def domain(row: dict[str, Any], name: str | None, otherwise: str) -> str:
    """The domain that a row names in a field, or `unknown`; `otherwise` where no field is named."""
    if name is None:
        return otherwise
    value = row.get(name)
    return clean(value.strip()) if isinstance(value, str) and value.strip() else UNKNOWN_DOMAIN


def written(value: Any) -> str | None:
    """A single value as text; None if it is no single value.

    Raises:
      BadRow: text that no file can hold.
    """
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, bool | int):
        return str(value)
    if isinstance(value, float):
        return _float(value)
    if isinstance(value, decimal.Decimal):
        return _decimal(value)
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise BadRow("bytes that are not UTF-8", f": {value[:_SHOWN]!r}") from None
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    return None


def clean(found: str) -> str:
    """The text, if it can be written as UTF-8.

    Raises:
      BadRow: half of a pair of UTF-16 (as of an emoji that was cut in two), or bytes that were not UTF-8.
    """
    if found.isascii():
        return found
    try:
        found.encode()
    except UnicodeEncodeError as error:
        code = ord(found[error.start])
        if 0xDC80 <= code <= 0xDCFF:  # how Python keeps an undecodable byte; as JSON, `\udc80` and up are as broken
            raise BadRow("text that is not UTF-8", f": byte or half character {code:#x} at {error.start}") from None
        raise BadRow("half of a character (a lone surrogate)", f": \\u{code:04x} at {error.start}") from None
    return found


def kind(value: Any) -> str:
    """The JSON word for what a value is."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return next((name for cls, name in names.items() if isinstance(value, cls)), type(value).__name__)


def shown(value: Any) -> str:
    """The first characters of a value, on one line."""
    written_out = json.dumps(value, default=str, ensure_ascii=False)
    return written_out if len(written_out) <= _SHOWN else written_out[:_SHOWN] + "..."


def _float(value: float) -> str:
    """2.0 is `2`, 0.1 is `0.1`, 1e20 is 1 and 20 zeros, 1e300 stays `1e+300`."""
    if not math.isfinite(value):
        return str(value)
    return _decimal(decimal.Decimal(repr(value))) if abs(value) < 1e40 else repr(value)


def _decimal(value: decimal.Decimal) -> str:
    if not value.is_finite():
        return str(value)
    if value == value.to_integral_value():
        return f"{value.to_integral_value():f}" if value else "0"
    return f"{value:f}" if abs(value.adjusted()) < 40 else str(value)


def _digits(value: float) -> str:
    """The digits that tell a float from its neighbours, without zeros at either end."""
    return "".join(map(str, decimal.Decimal(repr(value)).as_tuple().digits)).strip("0")
