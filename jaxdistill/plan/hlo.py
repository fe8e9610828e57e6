"""The text of a compiled program (optimized HLO), taken apart: instructions, shapes, groups of devices."""

from __future__ import annotations

import dataclasses
import math
import re

BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "c64": 8, "c128": 16} | {
    f"{kind}{bits}": bits // 8 for kind in "suf" for bits in (8, 16, 32, 64) if (kind, bits) != ("f", 8)
}


@dataclasses.dataclass(frozen=True)
class Op:
    """One instruction."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    rest: str
    """Its attributes, as text."""
    root: bool

    def attribute(self, pattern: str) -> str | None:
        found = re.search(pattern, self.rest)
        return found.group(1) if found else None

    @property
    def scope(self) -> str:
        """Where in the Python program it comes from, as `jit(step)/jvp()/while/body/dot_general`."""
        return self.attribute(r'op_name="([^"]*)"') or ""


Computations = dict[str, dict[str, Op]]


def parse(text: str) -> tuple[Computations, str]:
    """(instructions by name, by computation; the entry computation's name)."""
    computations: Computations = {}
    current: dict[str, Op] | None = None
    entry = ""
    # an attribute may hold line breaks: what is no instruction belongs to the one before
    for line in re.sub(r"\n(?!\s*(?:ROOT )?%?[\w.\-]+ = |(?:ENTRY )?%?[\w.\-]+ \(|\}\n|\n)", " ", text).splitlines():
        header = re.match(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line)
        if header:
            current = computations.setdefault(header.group(2), {})
            entry = header.group(2) if header.group(1) else entry
        elif line == "}":
            current = None
        elif current is not None:
            op = _parse_op(line)
            if op:
                current[op.name] = op
    return computations, entry


def _parse_op(line: str) -> Op | None:
    found = re.match(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$", line)
    if not found:
        return None
    root, name, rest = found.groups()
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opening = rest.find("(")
    closing = _closing(rest, opening)
    operands = tuple(re.findall(r"%([\w.\-]+)", rest[opening:closing]))
    inside = rest[opening + 1 : closing]
    after = rest[closing + 1 :]
    # constants and parameters keep what is written in their brackets
    rest_text = f"({inside}){after}" if not operands else after
    return Op(name, kind, rest[:opening], operands, rest_text, root is not None)


def _closing(text: str, opening: int) -> int:
    depth = 0
    for at in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        if depth == 0:
            return at
    return len(text)


def dims(kind: str) -> list[int]:
    """The first shape in a type, as `bf16[2,3]{1,0}` -> [2, 3]."""
    found = re.search(r"\[([\d,]*)\]", kind)
    return [int(n) for n in found.group(1).split(",") if n] if found else []


def array_bytes(kind: str) -> list[float]:
    """Bytes of every array in a type, the parts of a tuple one by one; layouts and their padding do not count."""
    shapes = re.findall(r"\b(pred|bf16|f8\w*|[sufc]\d+)\[([\d,]*)\]", kind)
    return [BYTES.get(dtype, 1) * math.prod(int(n) for n in sizes.split(",") if n) for dtype, sizes in shapes]


def replica_group(attributes: str, devices: int) -> list[int]:
    """The first group of devices that a collective runs over, as indices into the mesh.

    Three spellings: `{{0,1},{2,3}}`, `[2,2]<=[4]T(..)`, and `mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}`, whose
    order of devices may be absent; a permute names pairs.
    """
    if "replica_groups=mesh[" in attributes:
        return _named_group(attributes, devices)
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if iota:
        shape, source = ([int(n) for n in iota.group(i).split(",")] for i in (1, 2))
        order = [int(n) for n in iota.group(3).split(",")] if iota.group(3) else list(range(len(source)))
        return _iota(source, order)[: shape[-1]]
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
    if listed:
        return [int(n) for n in listed.group(1).split(",") if n]
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", attributes)
    if pairs:
        return _cycle([(int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)", pairs.group(0))])
    # all devices
    return list(range(devices))


def _named_group(attributes: str, devices: int) -> list[int]:
    found = re.search(
        r"replica_groups=mesh\[([^\]]*)\]"
        r"(?:,\s*device_ids=\((?:\[([\d,]+)\](?:T\(([\d,]+)\))?|([\d,]+))\))?\s*\{([^}]*)\}",
        attributes,
    )
    if found is None or ":" in found[5]:
        raise ValueError(f"the compiler names a group of devices in a way that is unknown here: {attributes[:200]}")
    axes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", found[1])}
    order = list(range(devices))
    if found[2]:
        shape = [int(n) for n in found[2].split(",")]
        order = _iota(shape, [int(n) for n in found[3].split(",")] if found[3] else list(range(len(shape))))
    elif found[4]:
        order = [int(n) for n in found[4].split(",")]
    wanted = re.findall(r"'([^']*)'", found[5])
    at, stride = [0], devices
    for name, size in axes.items():
        stride //= size
        if name in wanted:
            at = [base + i * stride for base in at for i in range(size)]
    return [order[i] for i in at]


def _iota(shape: list[int], order: list[int]) -> list[int]:
    """The numbers 0, 1, ... in `shape`, transposed by `order` and laid out flat."""
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    numbers = [0]
    for axis in order:
        numbers = [base + i * strides[axis] for base in numbers for i in range(shape[axis])]
    return numbers


def _cycle(pairs: list[tuple[int, int]]) -> list[int]:
    """The devices that are reached from the first pair."""
    to, chain = dict(pairs), [pairs[0][0]]
    while (following := to.get(chain[-1])) is not None and following not in chain:
        chain.append(following)
    return chain
