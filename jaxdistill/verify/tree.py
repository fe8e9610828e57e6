"""Builds the tree of an answer while Lark reads it; see `latex` for its form."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from jaxdistill.verify.latex import Node, Refused, number

_SET_OPERATORS = {"cup": "union", "cap": "intersection", "setminus": "minus"}
_RELATIONS = {"lt": "<", "gt": ">", "le": "<=", "leq": "<=", "ge": ">=", "geq": ">=", "neq": "!=", "in": "in"}
_FUNCTION_LETTERS = "fghFGH"
HEAD = "head"
"""A function's name that still waits for its argument."""


def make_builder() -> Any:
    """The transformer of the grammar: one method a rule, each called once its operands are built."""
    from lark import Token, Transformer, v_args

    @v_args(inline=True)
    class Builder(Transformer):
        # -------------------------------------------------------------------------------- leaves
        def number(self, text: Token) -> Node:
            return number(str(text))

        def repeating(self, text: Token) -> Node:
            fixed, _, repeated = re.sub(r"\\(?:overline|bar)", "|", text).partition("|")
            repeated = repeated.strip(" {}")
            decimals = len(fixed.partition(".")[2])
            tail = Fraction(int(repeated), (10 ** len(repeated) - 1) * 10**decimals)
            return ("num", Fraction("0" + fixed + "0") + tail, "")

        def based(self, text: Token) -> Node:
            digits, _, base = text.replace(" ", "").partition("_")
            return ("based", digits.lstrip("0") or "0", int(base.strip("{}")))

        def symbol(self, text: Token) -> Node:
            name = re.sub(r"[\\{}]", "", text)
            return ("const", name) if name in ("pi", "e", "i") else ("sym", name)

        def word(self, text: Token) -> Node:
            return ("word", text.removeprefix("\\text "))

        def infinity(self, _: Token) -> Node:
            return ("const", "oo")

        def reals(self, _: Token) -> Node:
            return ("reals",)

        def empty(self, _: Token) -> Node:
            return ("set",)

        # ----------------------------------------------------------------------------- operators
        def exponent(self, *parts: Any) -> Node:
            return _operand(parts[-1])

        def negative_exponent(self, _: Token, value: Any) -> Node:
            return ("neg", _operand(value))

        def power(self, base: Node, exponent: Node) -> Node:
            return ("pow", base, exponent)

        def factorial(self, value: Node) -> Node:
            return ("fn", "factorial", value)

        def percent(self, value: Node) -> Node:
            return ("percent", value)

        def degree(self, value: Node, _: Token) -> Node:
            return ("degree", value)

        def part(self, value: Any) -> Node:
            if isinstance(value, Token) and len(value) > 1:
                raise Refused("a fraction with two readings")  # \\frac{1}23 is 1/2 times 3
            return _operand(value)

        def fraction(self, _: Token, above: Node, below: Node) -> Node:
            return ("div", above, below)

        def root(self, _: Token, *parts: Node) -> Node:
            return ("root", parts[0] if len(parts) == 2 else ("num", Fraction(2), "2"), parts[-1])

        def binomial(self, _: Token, above: Node, below: Node) -> Node:
            return ("binom", above, below)

        def absolute(self, value: Node) -> Node:
            return ("fn", "abs", value)

        def floor(self, value: Node) -> Node:
            return ("fn", "floor", value)

        def ceiling(self, value: Node) -> Node:
            return ("fn", "ceil", value)

        def braces(self, value: Node) -> Node:
            return value

        def head(self, name: Token, subscript: Token | None = None) -> Node:
            plain = name.lstrip("\\")
            base = subscript.strip("_ {}") if subscript else None
            if base is not None and plain != "log":
                raise Refused("not understood")
            return (HEAD, plain, base)

        def juxtaposed(self, *factors: Node) -> Node:
            return _multiply(list(factors))

        def signed(self, sign: Token, value: Node) -> Node:
            return _signed(sign, value)

        def product(self, first: Node, *rest: Any) -> Node:
            value = first
            for sign, factor in zip(rest[::2], rest[1::2], strict=True):
                if sign.type == "TIMES":
                    value = (*value, factor) if value[0] == "mul" and value is not first else ("mul", value, factor)
                elif factor[0] == "juxtaposed" or (factor[0] == "unit"):
                    raise Refused("a quotient with two readings")  # 1/2x
                else:
                    value = ("div", value, factor)
            return value

        def sum(self, first: Node, *rest: Any) -> Node:
            terms = [_signed(sign, term) for sign, term in zip(rest[::2], rest[1::2], strict=True)]
            return ("add", first, *terms) if terms else first

        # ----------------------------------------------------------------------------- structure
        def region(self, first: Node, *rest: Any) -> Node:
            value = first
            for sign, operand in zip(rest[::2], rest[1::2], strict=True):
                value = (_SET_OPERATORS[sign.lstrip("\\")], value, operand)
            return value

        def rel(self, first: Node, *rest: Any) -> Node:
            if not rest:
                return first
            return ("rel", tuple(_RELATIONS.get(s.lstrip("\\"), str(s)) for s in rest[::2]), first, *rest[1::2])

        def items(self, *entries: Node) -> Node:
            return entries[0] if len(entries) == 1 else ("list", *entries)

        def ratio(self, *parts: Node) -> Node:
            return ("ratio", *parts)

        def both(self, *parts: Any) -> Node:
            return ("and", *parts[::2]) if len(parts) > 1 else parts[0]

        def either(self, *parts: Any) -> Node:
            return ("or", *parts[::2]) if len(parts) > 1 else parts[0]

        def brackets(self, left: Token, entries: Node, right: Token) -> Node:
            return ("brackets", str(left), str(right), *_entries(entries))

        def angles(self, entries: Node) -> Node:
            return ("brackets", "(", ")", *_entries(entries))

        def braced_set(self, entries: Node | None = None) -> Node:
            return ("set", *(_entries(entries) if entries else ()))

        def matrix(self, *parts: Any) -> Node:
            rows = [part for part in parts if not isinstance(part, Token)]
            if len({len(row) for row in rows}) != 1:
                raise Refused("rows of different lengths")
            return ("matrix", *rows)

        def row(self, *cells: Node) -> Node:
            return cells

    def _operand(value: Any) -> Node:
        return number(str(value)) if isinstance(value, Token) else value

    return Builder()


def _entries(node: Node) -> tuple[Node, ...]:
    return node[1:] if node[0] == "list" else (node,)


def _signed(sign: str, value: Node) -> Node:
    match sign.lstrip("\\"):
        case "+":
            return value
        case "-":
            return ("neg", value)
        case name:
            return ("pm", 1 if name == "pm" else -1, value)


def _is_group(node: Node) -> bool:
    return node[0] == "brackets" and node[1:3] == ("(", ")") and len(node) == 4


def _multiply(factors: list[Node]) -> Node:
    """What stands side by side: a product, a mixed number, a function with its argument, a quantity with its unit."""
    words = []
    while len(factors) > 1 and factors[-1][0] == "word":
        words.insert(0, factors.pop()[1])
    value = _product(factors)
    return ("unit", value, " ".join(words)) if words else value


def _product(factors: list[Node]) -> Node:
    found: list[Node] = []
    while factors:
        node = factors.pop(0)
        if _head_of(node):
            node = _apply(node, factors)
        elif found:
            _check_factor(found, node)
        if len(found) == 1 and _is_mixed(found[0], node):
            found = [("add", found[0], node)]
        else:
            found.append(node)
    # told apart from a product with a sign, because 1/2x has two readings
    return found[0] if len(found) == 1 else ("juxtaposed", *found)


def _check_factor(before: list[Node], node: Node) -> None:
    inner = node[1] if node[0] in ("pow", "percent", "degree", "fn") else node
    if inner == "factorial":
        inner = node[2]
    if isinstance(inner, tuple) and inner[0] in ("num", "based"):
        raise Refused("two numbers side by side")
    if "word" in (node[0], before[-1][0]):
        raise Refused("words in a formula")
    name = before[-1][1] if before[-1][0] == "pow" else before[-1]
    if name[0] == "sym" and name[1] in _FUNCTION_LETTERS and _is_group(node):
        raise Refused("a function of its own")


def _is_mixed(whole: Node, node: Node) -> bool:
    r"""Whether `2\frac12` is meant; `2\frac52` may be anything."""
    if whole[0] != "num" or node[0] != "div" or "num" not in (node[1][0], node[2][0]):
        return False
    if node[1][0] != "num" or node[2][0] != "num":
        return False
    if not (whole[1].denominator == 1 and 0 < node[1][1] < node[2][1]):
        raise Refused("a mixed number with two readings")
    return True


def _head_of(node: Node) -> Node | None:
    if node[0] == HEAD:
        return node
    return node[1] if node[0] == "pow" and node[1][0] == HEAD else None


def _apply(node: Node, factors: list[Node]) -> Node:
    """A function with its argument: a group, or a short product such as `2x` or `3\\pi t`."""
    head = _head_of(node)
    assert head is not None
    if not factors:
        raise Refused("a function without an argument")
    if _is_group(factors[0]):
        argument = factors.pop(0)[3]
    else:
        taken: list[Node] = []
        for kind in ("num", "const", None):
            if factors and not _head_of(factors[0]) and (kind is None or factors[0][0] == kind):
                taken.append(factors.pop(0))
        last = taken[-1] if taken else ("none",)
        # in `\sin(x)^2` and `\ln 2 x y` it is not clear where the argument ends
        if not taken or (last[0] == "pow" and _is_group(last[1])) or (factors and not _head_of(factors[0])):
            raise Refused("a function's argument with two readings")
        argument = taken[0] if len(taken) == 1 else ("mul", *taken)
    _, name, base = head
    if name == "log" and base is not None:
        symbol: Node = number(base) if base.isdigit() else (("const", "e") if base == "e" else ("sym", base))
        value: Node = ("log", symbol, argument)
    else:
        value = ("fn", name, argument)
    if node[0] != "pow":
        return value
    if node[2] == ("neg", ("num", Fraction(1), "1")):
        raise Refused("an inverse function")
    return ("pow", value, node[2])
