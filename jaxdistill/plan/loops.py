"""How often the loops of a compiled program run: its condition, its start and its step, where they are constants."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from jaxdistill.plan.hlo import Computations, Op


def counted(op: Op, ops: Mapping[str, Op], computations: Computations, body: str, condition: str) -> float | None:
    """How often `for (i = start; i < end; i += step)` runs; None if one of these is not a constant."""
    compared = _comparison(computations, condition)
    if compared is None:
        return None
    index, end, inclusive = compared
    start_of = ops.get(op.operands[0])
    start = constant_of(start_of.operands[index], ops) if start_of and start_of.opcode == "tuple" else 0
    if isinstance(end, str):  # another element of what the loop carries, which it does not change
        at = int(end)
        unchanged = _step(computations, body, at) == 0
        limit = (
            constant_of(start_of.operands[at], ops) if unchanged and start_of and start_of.opcode == "tuple" else None
        )
    else:
        limit = end
    step = _step(computations, body, index)
    if limit is None or start is None or not step:
        return None
    return float(max(0, -(-(limit - start + inclusive) // step)))


def _comparison(computations: Computations, condition: str) -> tuple[int, int | str, int] | None:
    """(index of the counter, its end or the index of that as text, 1 if the end is included)."""
    ops = computations[condition]
    root = next(op for op in ops.values() if op.root)
    names: tuple[str, ...] = root.operands
    inner = root
    if root.opcode == "fusion":
        called = computations[root.attribute(r"calls=%?([\w.\-]+)") or ""]
        inner = next(op for op in called.values() if op.root)
        parameters = {
            op.name: int(op.attribute(r"\((\d+)\)") or 0) for op in called.values() if op.opcode == "parameter"
        }
        if inner.opcode != "compare":
            return None
        found = [
            _in_condition(n, called) if n not in parameters else _in_condition(root.operands[parameters[n]], ops)
            for n in inner.operands
        ]
    else:
        if root.opcode != "compare":
            return None
        found = [_in_condition(n, ops) for n in names]
    direction = inner.attribute(r"direction=(\w+)")
    if None in found or direction not in ("LT", "LE") or not isinstance(found[0], str):
        return None
    end = found[1]
    assert end is not None
    return int(found[0]), end, int(direction == "LE")


def _in_condition(name: str, ops: Mapping[str, Op]) -> int | str | None:
    """A constant as a number, an element of the loop's state as the text of its index."""
    op = ops[name]
    while op.opcode in ("copy", "convert", "bitcast"):
        op = ops[op.operands[0]]
    if op.opcode == "get-tuple-element":
        return op.attribute(r"index=(\d+)")
    return constant_of(op.name, ops)


def constant_of(name: str, ops: Mapping[str, Op]) -> int | None:
    op = ops.get(name)
    while op is not None and op.opcode in ("copy", "convert", "bitcast") and op.operands:
        op = ops.get(op.operands[0])
    if op is None or op.opcode != "constant":
        return None
    value = op.attribute(r"^\((-?\d+)\)")
    return int(value) if value else None


def _step(computations: Computations, body: str, index: int) -> int | None:
    """What one run of the body adds to an element of the loop's state; None if it is something else."""
    ops = computations[body]
    root = next(op for op in ops.values() if op.root)
    if root.opcode != "tuple":
        return None
    return _added(root.operands[index], ops, computations, index)


def _added(name: str, ops: Mapping[str, Op], computations: Computations, index: int) -> int | None:
    op = ops.get(name)
    if op is None:
        return None
    if op.opcode == "get-tuple-element":
        return 0 if op.attribute(r"index=(\d+)") == str(index) else None
    if op.opcode in ("copy", "convert", "bitcast"):
        return _added(op.operands[0], ops, computations, index)
    if op.opcode == "add":
        for one, other in (op.operands, op.operands[::-1]):
            value = constant_of(other, ops)
            if value is not None and (before := _added(one, ops, computations, index)) is not None:
                return before + value
        return None
    if op.opcode == "fusion":
        return _added_in_fusion(op, ops, computations, index)
    return None


def _added_in_fusion(op: Op, ops: Mapping[str, Op], computations: Computations, index: int) -> int | None:
    called = computations[op.attribute(r"calls=%?([\w.\-]+)") or ""]
    # what the fusion is given, in the place of its parameters
    inside = dict(called)
    for inner in called.values():
        if inner.opcode == "parameter":
            given = op.operands[int(inner.attribute(r"^\((\d+)\)") or 0)]
            constant = constant_of(given, ops)
            value = ops.get(given)
            if constant is not None:
                inside[inner.name] = Op(inner.name, inner.type, "constant", (), f"({constant})", False)
            elif value is not None:
                inside[inner.name] = dataclasses.replace(value, name=inner.name, root=False)
    root = next(inner for inner in called.values() if inner.root)
    return _added(root.name, inside, computations, index)
