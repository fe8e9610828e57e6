r"""Compares two parsed answers in the way that the gold answer's structure asks for.

Ordered entries (points, vectors) one by one; sets, roots that are joined by `or` and `\pm` in any order; intervals and
inequalities as regions of the real line; matrices cell by cell; equations by their right sides where they are explicit,
otherwise up to a constant factor; numbers in a base as they are written. What two kinds of brackets mean is not
guessed: `\{1, 2\}` against `(1, 2)` is undecided.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from jaxdistill.verify.evaluate import POINTS, Evaluator, Undefined, is_equal, variables
from jaxdistill.verify.latex import Node, Refused
from jaxdistill.verify.quantities import UNITS
from jaxdistill.verify.regions import is_region, same_region

MAX_ENTRIES = 40
_OF_A_KIND = ("matrix", "based", "ratio", "word")
_ZERO = ("num", Fraction(0), "0")
_SUMS = ("add", "mul", "juxtaposed", "neg")


def is_same(answer: Node, gold: Node) -> bool:
    """Whether two trees are the same answer.

    Raises:
      Refused: that could not be decided.
    """
    if answer == gold:
        return True
    answer, gold = _strip_units(answer, gold)
    answer, gold = _strip_group(answer), _strip_group(gold)
    if is_region(gold) or is_region(answer):
        return same_region(answer, gold)
    if gold[0] in _OF_A_KIND or answer[0] in _OF_A_KIND:
        return _of_a_kind(answer, gold)
    if named := _assignments(gold):
        return _same_assignments(answer, named)
    if _is_equation(gold) or _is_equation(answer):
        return _same_equations(answer, gold)
    theirs, ours = Collection.of(answer), Collection.of(gold)
    if theirs.many or ours.many:
        return theirs.equals(ours)
    return _same_formula(theirs.entries[0], ours.entries[0])


def _strip_group(node: Node) -> Node:
    """`(x + 1)` is `x + 1`."""
    while node[0] == "brackets" and node[1:3] == ("(", ")") and len(node) == 4:
        node = node[3]
    return node


def _strip_units(answer: Node, gold: Node) -> tuple[Node, Node]:
    theirs, ours = (_canonical(n[2]) if n[0] == "unit" else None for n in (answer, gold))
    if ours and theirs != ours:
        raise Refused("different units" if theirs else "no unit")
    if theirs and not ours and theirs not in UNITS.values():
        raise Refused("words in a formula")
    return answer[1] if theirs else answer, gold[1] if ours else gold


def _canonical(words: str) -> str:
    return UNITS.get(words) or UNITS.get(words.lower()) or words.lower()


def _of_a_kind(answer: Node, gold: Node) -> bool:
    """Matrices, numbers in a base, ratios and words, which are compared with their own kind alone."""
    if answer[0] != gold[0]:
        raise Refused(f"different forms: {_name(answer)} and {_name(gold)}")
    match gold[0]:
        case "matrix":
            shapes = [(len(m) - 1, len(m[1])) for m in (answer, gold)]
            if shapes[0] != shapes[1]:
                if shapes[0] == shapes[1][::-1] and 1 in shapes[0]:
                    raise Refused("a row or a column")
                return False
            return _all_same([c for row in answer[1:] for c in row], [c for row in gold[1:] for c in row])
        case "based":
            if answer[2] != gold[2]:
                raise Refused("different bases")
            return answer[1] == gold[1]
        case "ratio":
            return _same_ratio(answer[1:], gold[1:])
    raise Refused("worded differently")


def _name(node: Node) -> str:
    names = {"matrix": "a matrix", "based": "a number in a base", "ratio": "a ratio", "word": "words", "set": "a set"}
    return names.get(node[0], "a formula")


def _same_ratio(answer: Sequence[Node], gold: Sequence[Node]) -> bool:
    if len(answer) != len(gold):
        return False
    if any(is_equal(part, _ZERO) for part in (*answer, *gold) if not variables(part)):
        return _all_same(answer, gold)
    proportional = all(
        is_equal(("mul", a, gold[0]), ("mul", g, answer[0])) for a, g in zip(answer[1:], gold[1:], strict=True)
    )
    times = any(len(p) > 1 and p[1][0] == "num" and re.fullmatch("[0-5][0-9]", p[1][2]) for p in (answer, gold))
    if proportional and times and not _all_same(answer, gold):
        raise Refused("a ratio or a time")  # 3:30 is no 6:60
    return proportional


def _all_same(answers: Sequence[Node], golds: Sequence[Node]) -> bool:
    """Entry by entry; one difference decides, also where another entry cannot be decided."""
    if len(answers) != len(golds):
        return False
    doubt: Refused | None = None
    for answer, gold in zip(answers, golds, strict=True):
        try:
            if not is_same(answer, gold):
                return False
        except Refused as error:
            doubt = error
    if doubt is not None:
        raise doubt
    return True


# ----------------------------------------------------------------------------------------------- collections


class Collection:
    """The entries of a list, a set, a point, or of one answer with `\\pm`.

    Attributes:
      brackets: of a point or vector, `{}` of a set, empty if there are none.
      ordered: whether the order counts; None for a bare list, where nobody knows.
    """

    def __init__(self, entries: Sequence[Node], brackets: str, ordered: bool | None) -> None:
        if len(entries) > MAX_ENTRIES:
            raise Refused("too many entries")
        self.entries, self.brackets, self.ordered = list(entries), brackets, ordered

    @property
    def many(self) -> bool:
        return len(self.entries) != 1 or bool(self.brackets)

    @classmethod
    def of(cls, node: Node) -> Collection:
        node, label = _strip_label(node)
        match node[0]:
            case "set":
                return cls([v for entry in node[1:] for v in _with_signs(entry)], "{}", False)
            case "brackets":
                return cls(node[3:], node[1] + node[2], True)
            case "list" | "or" | "and":
                stripped = [_strip_label(entry) for entry in node[1:]]
                labels = {name for _, name in stripped if name} | ({label} if label else set())
                if len(labels) > 1:
                    raise Refused("different variables")
                signed = [_with_signs(entry) for entry, _ in stripped]
                bare = node[0] == "list" and not labels and all(len(values) == 1 for values in signed)
                return cls([v for values in signed for v in values], "", None if bare else False)
        values = _with_signs(node)
        return cls(values, "", False)

    def equals(self, gold: Collection) -> bool:
        sets = [side.brackets == "{}" for side in (self, gold)]
        ordered = [side.brackets not in ("", "{}") for side in (self, gold)]
        if sets[0] != sets[1] and (any(ordered) or not (self.many and gold.many)):
            raise Refused("a set or not")
        if len(self.entries) == 1 and len(gold.entries) > 1:
            return False
        if len(gold.entries) == 1 and not gold.brackets:
            raise Refused("more than one answer")
        if gold.ordered or self.ordered:
            same = _all_same(self.entries, gold.entries)
            if same and self.brackets != gold.brackets:
                raise Refused("different brackets")
            return same
        if gold.ordered is None and self.ordered is None:
            try:
                if _all_same(self.entries, gold.entries):
                    return True
            except Refused:
                pass
            if _same_in_any_order(self.entries, gold.entries):
                raise Refused("another order")
            return False
        return _same_in_any_order(self.entries, gold.entries)


def _same_in_any_order(answers: list[Node], golds: list[Node]) -> bool:
    """Whether every entry has its equal on the other side; an entry that stands twice counts once."""
    doubt: Refused | None = None
    table: list[list[bool]] = []
    for answer in answers:
        row = []
        for gold in golds:
            try:
                row.append(is_same(answer, gold))
            except Refused as error:
                doubt = error
                row.append(False)
        table.append(row)
    if all(map(any, table)) and all(map(any, zip(*table, strict=True))):
        return True
    if doubt is not None:
        raise doubt
    return False


def _with_signs(node: Node) -> list[Node]:
    r"""The values of a formula with `\pm`: all signs as they stand, then all turned round."""
    if not _has(node, "pm"):
        return [node]
    return [_choose_sign(node, 1), _choose_sign(node, -1)]


def _has(node: Node, operator: str) -> bool:
    return node[0] == operator or any(_has(part, operator) for part in node if isinstance(part, tuple) and part)


def _choose_sign(node: Node, sign: int) -> Node:
    if node[0] == "pm":
        value = _choose_sign(node[2], sign)
        return value if node[1] * sign > 0 else ("neg", value)
    return tuple(_choose_sign(part, sign) if isinstance(part, tuple) else part for part in node)


# ------------------------------------------------------------------------------------------------- equations


def _strip_label(node: Node) -> tuple[Node, str | None]:
    """The right side of `x = 5` or `f(x) = 2x`, with the name on the left; the node itself if it is no such thing."""
    if node[0] == "rel" and node[1] == ("=",):
        name = _label(node[2])
        if name and name[0] not in variables(node[3]):
            return node[3], name
    elif node[0] == "rel" and node[1] == ("in",) and node[2][0] == "sym" and node[3][0] == "set":
        return node[3], node[2][1]
    return node, None


def _label(node: Node) -> str | None:
    if node[0] == "sym":
        return node[1]
    return None


def _is_equation(node: Node) -> bool:
    return node[0] == "rel" and (node[1] != ("=",) or _strip_label(node)[1] is None or bool(variables(node[3])))


def _assignments(node: Node) -> dict[str, Node] | None:
    """`x = 1, y = 2` as a mapping; None if the names are not all there and different."""
    if node[0] not in ("list", "and"):
        return None
    pairs = [_strip_label(entry) for entry in node[1:]]
    names = {name: value for value, name in pairs if name}
    return names if len(names) == len(pairs) > 1 else None


def _same_assignments(answer: Node, gold: dict[str, Node]) -> bool:
    named = _assignments(answer)
    if named is None or named.keys() != gold.keys():
        raise Refused("different variables")
    return _all_same([named[name] for name in gold], list(gold.values()))


def _same_equations(answer: Node, gold: Node) -> bool:
    """Explicit ones (`y = ...`) by their right sides; rational ones are the same up to a constant factor."""
    if answer[0] != "rel" or gold[0] != "rel" or {answer[1], gold[1]} != {("=",)}:
        return _against_formula(answer, gold)
    (left, name), (right, other) = _strip_label(answer), _strip_label(gold)
    if name and other:
        if name != other:
            if {name} | variables(left) == {other} | variables(right):
                return _same_solutions(answer, gold)
            raise Refused("different variables")
        return is_same(left, right)
    return _same_solutions(answer, gold)


def _against_formula(answer: Node, gold: Node) -> bool:
    """An equation on one side alone: `y = 2x` says more than `2x`, and 3x + 2 = 5 is no answer to "what is x"."""
    (left, name), (right, other) = _strip_label(answer), _strip_label(gold)
    if name and other is None and left[0] != "rel" and gold[0] != "rel" and name not in variables(gold):
        return is_same(left, right)
    raise Refused("an equation or a formula")


def _same_solutions(answer: Node, gold: Node) -> bool:
    """Whether both differences of the sides are proportional, judged from exact values at four points."""
    names = sorted(variables(answer) | variables(gold))
    if variables(answer) != variables(gold) or not names:
        raise Refused("different variables")
    ratios = set()
    for point in [*POINTS["positive"], *POINTS["negative"]]:
        values = {name: point(n) for n, name in enumerate(names)}
        try:
            a, g = (Evaluator(values, 50).value(("add", n[2], ("neg", n[3]))) for n in (answer, gold))
        except Undefined:
            raise Refused("no value") from None
        if not (isinstance(a, Fraction) and isinstance(g, Fraction)) or not a or not g:
            raise Refused("equations that are not rational")
        ratios.add(a / g)
    if len(ratios) == 1:
        return True
    raise Refused("different equations")  # they may still have the same solutions


# -------------------------------------------------------------------------------------------------- formulas


def _same_formula(answer: Node, gold: Node) -> bool:
    if answer == gold:
        return True
    answer, gold = _percent_or_degree(answer, gold)
    same = is_equal(answer, gold)
    if same and _is_number(gold) and not _is_number(answer) and answer[0] in _SUMS and _is_arithmetic(answer):
        raise Refused("not evaluated")
    if not same and answer[:2] == ("fn", "factorial") and is_equal(answer[2], gold):
        raise Refused("a factorial or an exclamation")
    if not same and (_rounds(answer, gold) or _rounds(gold, answer)):
        raise Refused("equal only after rounding")
    return same


def _percent_or_degree(answer: Node, gold: Node) -> tuple[Node, Node]:
    for mark in ("percent", "degree"):
        if answer[0] == gold[0] == mark:
            return answer[1], gold[1]
        marked, plain = (answer, gold) if answer[0] == mark else (gold, answer)
        if marked[0] == mark and not variables(plain) and is_equal(marked[1], plain):
            if mark == "percent":
                raise Refused("percent against a plain number")
            return plain, plain  # an angle without its sign
    return answer, gold


def _is_number(node: Node) -> bool:
    return node[0] == "num" or (node[0] == "neg" and node[1][0] == "num")


def _is_arithmetic(node: Node) -> bool:
    """Sums and products of plain numbers, which nobody leaves as an answer unless the question stood so."""
    node = _strip_group(node)
    return node[0] == "num" or (node[0] in (*_SUMS, "div", "pow") and all(_is_arithmetic(part) for part in node[1:]))


def _rounds(exact: Node, decimal: Node) -> bool:
    """Whether a decimal may have been rounded from a value."""
    sign, number = (-1, decimal[1]) if decimal[0] == "neg" else (1, decimal)
    if number[0] != "num" or "." not in number[2] or variables(exact):
        return False
    half = Fraction(1, 2 * 10 ** len(number[2].partition(".")[2]))
    evaluator = Evaluator({}, 50)
    try:
        gap = evaluator.to_real(evaluator.value(exact)) - evaluator.to_real(sign * number[1])
    except Undefined:
        return False
    return bool(abs(gap) <= evaluator.to_real(half))
