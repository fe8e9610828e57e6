"""Bytes that one instruction of a compiled program moves between the chip and its memory (HBM).

An instruction reads its operands and writes its results. Of an operand that is only sliced or gathered it reads what
the slices hold, and what updates an array in place writes the update alone. Caches, and the padding of layouts, do not
count. Each instruction belongs to one category:

    products      matrix products, with what the compiler has fused into them
    attention     attention kernels
    collectives   what goes over the links, as it is read and written here
    elementwise, reductions, gathers (and scatters), copies (transposes, slices, updates), calls (other library calls)
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from jaxdistill.plan.hlo import BYTES, Computations, Op, dims
from jaxdistill.plan.products import MATRIX_CALLS, attention_kernel

INSIDE = ("products", "attention", "collectives")
"""What has a cost model of its own; everything else is limited by the memory's bandwidth alone."""
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")

_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "while", "conditional", "call",
    "async-start", "async-update", "optimization-barrier", "partition-id", "replica-id", "domain", "add-dependency",
    "get-dimension-size",
}  # fmt: skip
_MOVES = {
    "bitcast", "broadcast", "concatenate", "constant", "copy", "copy-start", "dynamic-slice", "dynamic-update-slice",
    "get-tuple-element", "iota", "pad", "parameter", "reshape", "reverse", "slice", "transpose", "tuple",
}  # fmt: skip
_FREE_CALLS = {"AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "Sharding"}
_SLICES = ("dynamic-slice", "slice", "gather")
_WHOLE = ("dot", "convolution", "sort", "reduce-window", "select-and-scatter", "cholesky", "triangular-solve", "fft")
_ARRAY = re.compile(r"\b(pred|bf16|f8\w*|[sufc]\d+)\[([\d,]*)\](\{[^}]*\})?")


def moved_bytes(op: Op, ops: Mapping[str, Op], computations: Computations, apart: tuple[int, ...] = (5,)) -> float:
    """Bytes that one run of an instruction reads and writes; loops and calls count nothing beside what they run.

    Args:
      ops: the instructions of its computation.
      apart: memory spaces that are not HBM: the host's, and on TPUs those on the chip.
    """
    if op.opcode in _FREE or op.opcode.endswith("-done") or _target(op) in _FREE_CALLS:
        return 0.0
    called = _called(op, computations)
    if called is not None:
        read, written = _needs(called, computations), _written(called)
    else:
        read, written = _alone(op, ops)
    total = 0.0
    for i, name in enumerate(op.operands):
        given = _sizes(ops[name].type, apart) if name in ops else []
        share = read.get(i)
        total += sum(given) if share is None else min(sum(given), share)
    results = _results(op, apart)
    if written is None:
        return total + sum(results)
    # a result that is not in HBM has no bytes, whatever of it is updated
    return total + sum(min(size, part) for size, part in zip(results, written, strict=True))


def category_of(op: Op, computations: Computations) -> str:
    """The category of an instruction that moves bytes."""
    opcode = op.opcode.removesuffix("-start")
    if opcode in COLLECTIVES:
        return "collectives"
    if opcode == "custom-call":
        target = _target(op)
        if target in MATRIX_CALLS or "gemm" in target:
            return "products"
        return "attention" if attention_kernel(op, target) else "calls"
    within = _opcodes(op, computations)
    if within & {"dot", "convolution"}:
        return "products"
    if within & {"reduce", "reduce-window", "sort", "select-and-scatter"}:
        return "reductions"
    if within & {"gather", "scatter"}:
        return "gathers"
    return "copies" if within <= _MOVES else "elementwise"


def _target(op: Op) -> str:
    return (op.attribute(r'custom_call_target="([^"]+)"') or "?") if op.opcode == "custom-call" else ""


def memory_spaces_apart(platform: str) -> tuple[int, ...]:
    """Memory spaces in the text of a program that are not HBM: 5 is the host; TPUs have vector and scalar memory."""
    return (1, 2, 3, 4, 5) if platform == "tpu" else (5,)


def _called(op: Op, computations: Computations) -> Mapping[str, Op] | None:
    return computations[op.attribute(r"calls=%?([\w.\-]+)") or ""] if op.opcode == "fusion" else None


def _opcodes(op: Op, computations: Computations) -> set[str]:
    """Of an instruction, or of all that is fused in it."""
    called = _called(op, computations)
    if called is None:
        return {op.opcode.removesuffix("-start") if op.opcode != "copy-start" else op.opcode}
    return set().union(*(_opcodes(inner, computations) for inner in called.values()))


def _needs(called: Mapping[str, Op], computations: Computations) -> dict[int, float]:
    """Bytes of each parameter of a fusion that its results depend on, by the parameter's number.

    What is demanded of every instruction goes back from the results to the parameters, in elements.
    """
    demand: dict[str, float] = {}
    found: dict[int, float] = {}
    for op in reversed(list(called.values())):
        size = float(math.prod(dims(op.type)))
        wanted = size if op.root else min(size, demand.get(op.name, 0.0))
        if op.opcode == "parameter":
            found[int(op.attribute(r"^\((\d+)\)") or 0)] = wanted * _item(op)
            continue
        within = _called(op, computations)
        inner = {} if within is None else _needs(within, computations)
        for i, name in enumerate(op.operands):
            if name in called:
                whole = float(math.prod(dims(called[name].type)))
                needed = inner[i] / _item(called[name]) if i in inner else _demanded(op, i, wanted, whole, called)
                demand[name] = demand.get(name, 0.0) + min(whole, needed)
    return found


def _item(op: Op) -> float:
    """Bytes of one element."""
    array = _ARRAY.search(op.type)
    return BYTES.get(array.group(1), 1) if array else 1


def _demanded(op: Op, operand: int, wanted: float, whole: float, called: Mapping[str, Op]) -> float:
    """Elements of an operand of `whole` that an instruction needs for `wanted` elements of its result."""
    size = float(math.prod(dims(op.type)))
    if op.opcode == "tuple":
        return whole
    if op.opcode in ("dynamic-update-slice", "scatter") and operand == 0:
        update = float(math.prod(dims(called[op.operands[-1 if op.opcode == "scatter" else 1]].type)))
        if not _in_place(op, called):
            return wanted
        return update if op.opcode == "scatter" else 0.0
    if op.opcode in _SLICES and operand == 0:
        return wanted
    if op.opcode in ("dynamic-update-slice", "scatter", "custom-call", *_WHOLE):
        return whole
    # a reduction needs many elements for one, a broadcast one for many, everything else one for one
    return whole * wanted / size if op.opcode == "reduce" and size else wanted


def _written(called: Mapping[str, Op]) -> list[float]:
    """Bytes that a fusion writes of each of its results."""
    root = next(op for op in called.values() if op.root)
    parts = [called[name] for name in root.operands] if root.opcode == "tuple" else [root]
    return [size for part in parts for size in _written_by(part, called)]


def _written_by(op: Op, called: Mapping[str, Op]) -> list[float]:
    whole = _sizes(op.type, ())
    while op.opcode in ("bitcast", "reshape") and op.operands[0] in called:
        op = called[op.operands[0]]
    if op.opcode == "dynamic-update-slice" and _in_place(op, called):
        return _sizes(called[op.operands[1]].type, ())
    if op.opcode == "scatter" and len(op.operands) == 3 and _in_place(op, called):
        return _sizes(called[op.operands[2]].type, ())
    return whole


def _in_place(op: Op, called: Mapping[str, Op]) -> bool:
    """Whether what is updated is a parameter, and the result nothing but that."""
    source = called.get(op.operands[0])
    while source is not None and source.opcode in ("bitcast", "reshape"):
        source = called.get(source.operands[0])
    if source is None or source.opcode != "parameter":
        return False
    users = [other for other in called.values() if op.name in other.operands]
    while len(users) == 1 and users[0].opcode in ("bitcast", "reshape") and not users[0].root:
        users = [other for other in called.values() if users[0].name in other.operands]
    return op.root or all(user.root and user.opcode in ("tuple", "bitcast", "reshape") for user in users)


def _alone(op: Op, ops: Mapping[str, Op]) -> tuple[dict[int, float], list[float] | None]:
    """(bytes read of operands that are not read in full, bytes written of each result) of a single instruction."""
    opcode = op.opcode.removesuffix("-start")
    if opcode in ("dynamic-slice", "slice", "gather"):
        return {0: sum(_results(op, ()))}, None
    if opcode == "dynamic-update-slice":
        update = sum(_sizes(ops[op.operands[1]].type, ()))
        return {0: 0.0}, [update]
    if opcode == "scatter" and len(op.operands) == 3:
        update = sum(_sizes(ops[op.operands[2]].type, ()))
        return {0: update}, [update]
    return {}, None


def _results(op: Op, apart: tuple[int, ...]) -> list[float]:
    """Bytes of every array that an instruction writes; scratch space of libraries is not looked at."""
    sizes = _sizes(op.type, apart)
    if op.opcode == "copy-start":  # (destination, source, context)
        return sizes[:1]
    if op.opcode.endswith("-start") and op.type.startswith("("):  # (operands, results, context)
        # the context is words; what is not in HBM still has its place
        arrays = [size for size, full in zip(sizes, _sizes(op.type, ()), strict=True) if full > 4]
        return arrays[len(arrays) // 2 :]
    if op.opcode == "custom-call":
        return [size for size, array in zip(sizes, _ARRAY.finditer(op.type), strict=True) if array.group(1) != "u8"]
    return sizes


def _sizes(kind: str, apart: tuple[int, ...]) -> list[float]:
    """Bytes of every array in a type, 0 for those in memory spaces that are no HBM."""
    found = []
    for array in _ARRAY.finditer(kind):
        space = re.search(r"S\((\d+)\)", array.group(3) or "")
        size = BYTES.get(array.group(1), 1) * math.prod(int(n) for n in array.group(2).split(",") if n)
        found.append(0.0 if space and int(space.group(1)) in apart else float(size))
    return found
