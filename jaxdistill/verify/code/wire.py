"""Plain Python values as one line of JSON: what the candidate's process and the tests' process say to each other.

Only values travel, never code, classes or pickles: an object of a class of the candidate's stays where it is and is
named by a number, so its `__eq__` never runs where it would be compared.
"""

from __future__ import annotations

import itertools
import json
from collections import deque
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any

MAX_ITEMS = 100_000
"""How much of an iterator is taken; what is longer is no plain value."""
_BIG = 1 << 8192  # JSON's decimal digits are read in quadratic time, and Python refuses more than 4,300 of them
_VIEWS = (type({}.keys()), type({}.values()), type({}.items()))

Remember = Callable[[Any], int]


def dumps(value: Any, remember: Remember) -> bytes:
    """One line; `remember` gives a number to an object that is not plain."""
    return json.dumps(pack(value, remember), separators=(",", ":")).encode() + b"\n"


def loads(line: bytes, recall: Callable[[int], Any]) -> Any:
    """The value of a line; `recall` gives the object with a number.

    Raises:
      ValueError: no such line. RecursionError: nested too deep.
    """
    return unpack(json.loads(line), recall)


def pack(value: Any, remember: Remember) -> Any:
    """A value as what JSON knows: numbers, text and null as they are, all else as `[kind, ...]`.

    Classes derived from plain ones (named tuples, counters, enumerations of integers) become the plain ones.
    """
    if value is None or value is True or value is False:
        return value
    if isinstance(value, int):
        number = int(value)
        return number if -_BIG < number < _BIG else ["int", hex(number)]
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, list | tuple | set | frozenset | deque):
        kind = next(k for k in (list, tuple, set, frozenset, deque) if isinstance(value, k))
        return [kind.__name__, *(pack(item, remember) for item in value)]
    if isinstance(value, dict):
        return ["dict", *([pack(k, remember), pack(v, remember)] for k, v in value.items())]
    return _pack_rare(value, remember)


def _pack_rare(value: Any, remember: Remember) -> Any:
    if isinstance(value, bytes | bytearray):
        return [type(value).__name__ if type(value) in (bytes, bytearray) else "bytes", bytes(value).hex()]
    if isinstance(value, complex):
        return ["complex", value.real, value.imag]
    if isinstance(value, Fraction):
        return ["Fraction", pack(value.numerator, remember), pack(value.denominator, remember)]
    if isinstance(value, Decimal):
        return ["Decimal", str(value)]
    if isinstance(value, range):
        return ["range", value.start, value.stop, value.step]
    if isinstance(value, (*_VIEWS, Iterator)):
        items = list(itertools.islice(value, MAX_ITEMS + 1))
        if len(items) <= MAX_ITEMS:
            return ["iter", *(pack(item, remember) for item in items)]
    return ["object", remember(value)]


def unpack(data: Any, recall: Callable[[int], Any]) -> Any:
    """The inverse of `pack`; everything in `data` may have been forged.

    Raises:
      ValueError: not what `pack` makes.
    """
    if not isinstance(data, list | dict):
        return data
    if not data or not isinstance(data, list) or data[0] not in _KINDS:
        raise ValueError("not a packed value")
    try:
        return _KINDS[data[0]](data[1:], recall)
    except (TypeError, KeyError, IndexError, ArithmeticError) as error:
        raise ValueError(f"not a packed {data[0]}") from error


def _items(data: list[Any], recall: Callable[[int], Any]) -> Iterator[Any]:
    return (unpack(item, recall) for item in data)


_KINDS: dict[str, Callable[[list[Any], Callable[[int], Any]], Any]] = {
    "list": lambda data, recall: list(_items(data, recall)),
    "tuple": lambda data, recall: tuple(_items(data, recall)),
    "set": lambda data, recall: set(_items(data, recall)),
    "frozenset": lambda data, recall: frozenset(_items(data, recall)),
    "deque": lambda data, recall: deque(_items(data, recall)),
    "dict": lambda data, recall: {unpack(k, recall): unpack(v, recall) for k, v in data},
    "iter": lambda data, recall: iter(list(_items(data, recall))),
    "int": lambda data, recall: int(data[0], 16),
    "bytes": lambda data, recall: bytes.fromhex(data[0]),
    "bytearray": lambda data, recall: bytearray.fromhex(data[0]),
    "complex": lambda data, recall: complex(data[0], data[1]),
    "Fraction": lambda data, recall: Fraction(unpack(data[0], recall), unpack(data[1], recall)),
    "Decimal": lambda data, recall: Decimal(data[0]),
    "range": lambda data, recall: range(*data),
    "object": lambda data, recall: recall(data[0]),
}
