r"""Regions of the real line: `(-\infty, 1) \cup (2, \infty)`, `x < 1 or x > 2`, `x \neq 0` and the like.

A region is a list of intervals, in order and apart. Their ends are formulas without variables, ordered by value and
compared exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxdistill.verify.evaluate import Evaluator, Undefined, is_equal, variables
from jaxdistill.verify.latex import Node, Refused

_INFINITY: Node = ("const", "oo")
_LEAST: Node = ("neg", _INFINITY)
_ORDER = ("<", ">", "<=", ">=", "!=")
_TURNED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "!=": "!="}
MAX_INTERVALS = 20


@dataclass(frozen=True)
class Interval:
    """Between two ends, each with or without itself."""

    low: Node
    with_low: bool
    high: Node
    with_high: bool


_LINE = Interval(_LEAST, False, _INFINITY, False)


def is_region(node: Node) -> bool:
    """Whether an answer can only be a region: a point `(1, 2)` may also be an interval, and is none here."""
    match node[0]:
        case "union" | "intersection" | "minus" | "reals":
            return True
        case "rel":
            return any(sign in _ORDER for sign in node[1]) or (
                node[1] == ("in",) and (is_region(node[3]) or _is_pair(node[3]))
            )
        case "or" | "and" | "list":
            return any(part[0] == "rel" and is_region(part) for part in node[1:])
        case "brackets":
            return _is_pair(node) and (node[1:3] in (("(", "]"), ("[", ")")) or any(_is_infinite(e) for e in node[3:]))
    return False


def _is_pair(node: Node) -> bool:
    return node[0] == "brackets" and len(node) == 5


def _is_infinite(node: Node) -> bool:
    return node in (_INFINITY, _LEAST)


def same_region(answer: Node, gold: Node) -> bool:
    """Whether two answers, at least one of them a region, describe the same numbers.

    Raises:
      Refused: that could not be decided.
    """
    names = variables(answer) | variables(gold)
    if len(names) > 1:
        raise Refused("different variables")
    theirs, ours = _merge(_intervals(answer)), _merge(_intervals(gold))
    if len(theirs) != len(ours):
        return False
    pairs = list(zip(theirs, ours, strict=True))
    if any((a.with_low, a.with_high) != (g.with_low, g.with_high) for a, g in pairs):
        return False
    return all(_same_end(a.low, g.low) and _same_end(a.high, g.high) for a, g in pairs)


def _same_end(a: Node, b: Node) -> bool:
    if _is_infinite(a) or _is_infinite(b):
        return a == b
    return is_equal(a, b)


def _intervals(node: Node) -> list[Interval]:
    match node[0]:
        case "reals":
            return [_LINE]
        case "set":
            return [Interval(_end(entry), True, _end(entry), True) for entry in node[1:]]
        case "brackets" if _is_pair(node):
            left, right, low, high = node[1:]
            return [Interval(_end(low), left == "[", _end(high), right == "]")]
        case "union":
            return _intervals(node[1]) + _intervals(node[2])
        case "or":
            return [interval for part in node[1:] for interval in _intervals(part)]
        case "intersection":
            return _meet(_intervals(node[1]), _intervals(node[2]))
        case "and" | "list":
            return _of_list(node)
        case "minus":
            return _meet(_intervals(node[1]), _complement(_intervals(node[2])))
        case "rel":
            return _of_relation(node)
    raise Refused("not a region")


def _end(node: Node) -> Node:
    if not _is_infinite(node) and variables(node):
        raise Refused("an interval with variables")
    return _INFINITY if node == _INFINITY else node


def _of_list(node: Node) -> list[Interval]:
    """`x > 1 and x < 2`: both hold. `x \\neq 0, 1` leaves out both."""
    first = node[1]
    if first[0] == "rel" and first[1] == ("!=",):
        parts = [part if part[0] == "rel" else ("rel", ("!=",), first[2], part) for part in node[1:]]
    elif node[0] == "and" or all(part[0] == "rel" and part[1] == ("!=",) for part in node[1:]):
        parts = list(node[1:])
    else:
        raise Refused("a list of inequalities")  # `x < 1, x > 2` may mean either
    found = _intervals(parts[0])
    for part in parts[1:]:
        found = _meet(found, _intervals(part))
    return found


def _of_relation(node: Node) -> list[Interval]:
    """`x < 1`, `1 < x \\le 2`, `x \\in (1, 2)`: one bare variable against formulas without any."""
    signs, sides = node[1], node[2:]
    if signs == ("in",) and sides[0][0] == "sym":
        return _intervals(sides[1])
    if signs == ("=",) and sides[0][0] == "sym" and not variables(sides[1]):
        return [Interval(sides[1], True, sides[1], True)]
    places = [i for i, side in enumerate(sides) if side[0] == "sym"]
    if len(places) != 1 or any(s not in _ORDER for s in signs) or any(variables(s) for s in sides if s[0] != "sym"):
        raise Refused("an inequality that is not solved")
    found = [_LINE]
    for i, sign in enumerate(signs):
        if i == places[0]:  # x < 1
            found = _meet(found, _half_line(sign, sides[i + 1]))
        elif i + 1 == places[0]:  # 1 < x
            found = _meet(found, _half_line(_TURNED[sign], sides[i]))
        else:
            raise Refused("an inequality that is not solved")
    return found


def _half_line(sign: str, end: Node) -> list[Interval]:
    end = _end(end)
    below = Interval(_LEAST, False, end, sign in ("<=", "="))
    above = Interval(end, sign == ">=", _INFINITY, False)
    if _is_infinite(end):  # x < \infty
        return [_LINE]
    return [below, above] if sign == "!=" else [below] if sign in ("<", "<=") else [above]


def _complement(intervals: list[Interval]) -> list[Interval]:
    found = [_LINE]
    for i in _merge(intervals):
        gaps = []
        if i.low != _LEAST:
            gaps.append(Interval(_LEAST, False, i.low, not i.with_low))
        if i.high != _INFINITY:
            gaps.append(Interval(i.high, not i.with_high, _INFINITY, False))
        found = _meet(found, gaps)
    return found


def _meet(first: list[Interval], second: list[Interval]) -> list[Interval]:
    if len(first) * len(second) > MAX_INTERVALS**2:
        raise Refused("too many intervals")
    found = []
    for a in first:
        for b in second:
            low, with_low = _further(a.low, a.with_low, b.low, b.with_low, 1)
            high, with_high = _further(a.high, a.with_high, b.high, b.with_high, -1)
            interval = Interval(low, with_low, high, with_high)
            if not _is_empty(interval):
                found.append(interval)
    return found


def _further(a: Node, with_a: bool, b: Node, with_b: bool, sign: int) -> tuple[Node, bool]:
    """The end that cuts off more, seen from the left (1) or the right (-1)."""
    order = _compare(a, b) * sign
    if order == 0:
        return a, with_a and with_b
    return (a, with_a) if order > 0 else (b, with_b)


def _is_empty(i: Interval) -> bool:
    order = _compare(i.low, i.high)
    return order > 0 or (order == 0 and not (i.with_low and i.with_high))


def _merge(intervals: list[Interval]) -> list[Interval]:
    """In order, and joined where they overlap or touch."""
    if len(intervals) > MAX_INTERVALS:
        raise Refused("too many intervals")
    if any(_is_empty(i) for i in intervals):
        raise Refused("an empty interval")
    rest = sorted(intervals, key=lambda i: (_position(i.low), not i.with_low))
    found: list[Interval] = []
    for i in rest:
        last = found[-1] if found else None
        if last is None or _is_apart(last, i):
            found.append(i)
            continue
        order = _compare(i.high, last.high)
        end = i if order > 0 else last
        found[-1] = Interval(last.low, last.with_low, end.high, end.with_high or (order == 0 and i.with_high))
    return found


def _is_apart(first: Interval, second: Interval) -> bool:
    order = _compare(second.low, first.high)
    return order > 0 or (order == 0 and not (second.with_low or first.with_high))


def _compare(a: Node, b: Node) -> int:
    if _same_end(a, b):
        return 0
    return 1 if _position(a) > _position(b) else -1


def _position(node: Node) -> Any:
    if _is_infinite(node):
        return float("inf") if node == _INFINITY else float("-inf")
    evaluator = Evaluator({}, 50)
    try:
        value = evaluator.to_real(evaluator.value(node))
    except Undefined:
        raise Refused("no value") from None
    if not isinstance(value, evaluator.mp.mpf):
        raise Refused("not a real number")
    return value
