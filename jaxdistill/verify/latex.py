r"""Parses an answer such as `\frac{\sqrt 3}{2}` or `(-\infty, 1) \cup (2, \infty)` into a tree, and evaluates nothing.

The grammar (`answer.lark`) covers what final answers look like, and Lark's LALR parser reads it in linear time, without
recursion. Whatever has two readings (`1/2x`, `2^3 4`, `f(x+1)`, `(1,234, 5)`) or is not in the grammar (integrals,
sums, limits) is refused, and the comparison then stays undecided. On the same answers this is 5 to 150 times as fast as
the parser of latex2sympy2_extended, which also guesses where this one refuses.

A tree is a nested tuple `(operator, *operands)`:

    ("num", Fraction, text)  ("sym", name)  ("const", "pi" | "e" | "i" | "oo")  ("word", text)  ("based", digits, base)
    ("add", *terms)  ("mul", *factors)  ("div", a, b)  ("neg", a)  ("pow", a, b)  ("root", degree, a)  ("pm", sign, a)
    ("fn", name, a)  ("log", base, a)  ("binom", n, k)  ("percent", a)  ("degree", a)  ("unit", a, words)
    ("brackets", open, close, *entries)  ("set", *entries)  ("matrix", *rows)  ("list", *entries)  ("reals",)
    ("ratio", *parts)
    ("rel", signs, *sides)  ("union" | "intersection" | "minus", a, b)  ("or" | "and", *parts)
"""

from __future__ import annotations

import re
import threading
from fractions import Fraction
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from jaxdistill.verify.notation import THIN

Node = tuple[Any, ...]

MAX_LENGTH = 500
"""Characters of an expression that is parsed."""
MAX_DEPTH = 20
"""Of brackets."""
MAX_NUMBER = 400
"""Digits of one number."""


class Refused(Exception):
    """An answer that cannot be read, or not decided upon; the message is the verdict's reason."""


@lru_cache(maxsize=20_000)
def parse_latex(text: str) -> Node | str:
    """The tree of an answer in the notation of `notation.normalize`; a text says why there is none."""
    from lark.exceptions import LarkError, VisitError

    try:
        return _parse(text)
    except Refused as error:
        return str(error)
    except VisitError as error:
        if isinstance(error.orig_exc, Refused):
            return str(error.orig_exc)
        raise
    except LarkError:
        return "not understood"


def _parse(text: str) -> Node:
    prepared = _prepare(text)
    with _LOCK:
        return _parser().parse(prepared)


_LOCK = threading.Lock()


@cache
def _parser() -> Any:
    from lark import Lark

    from jaxdistill.verify.tree import make_builder

    grammar = (Path(__file__).parent / "answer.lark").read_text(encoding="utf-8")
    return Lark(grammar, parser="lalr", transformer=make_builder(), propagate_positions=False, maybe_placeholders=False)


# ------------------------------------------------------------------------------------------ before the parser

_SIGNS = str.maketrans(
    {
        "√": r"\sqrt ",
        "∪": r"\cup ",
        "∩": r"\cap ",
        "∈": r"\in ",
        "∅": r"\emptyset ",
        "ℝ": r"\mathbb{R}",
        "θ": r"\theta ",
    }
)
_GROUPED = re.compile(r"(?<![0-9.])[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9])")
_IN_BASE = re.compile(r"([0-9][0-9A-F]*) ?\(?(?:in )?base ([0-9]{1,2})\)?")


def _prepare(text: str) -> str:
    """Settles what a context-free grammar cannot: bars, separators of thousands, the letter U as a union."""
    if len(text) > MAX_LENGTH:
        raise Refused("too long to parse")
    text = text.translate(_SIGNS)
    if based := _IN_BASE.fullmatch(text.strip()):
        return f"{based[1]}_{{{based[2]}}}"
    _check_depth(text)
    text = re.sub(rf"(?<=[0-9]){THIN}(?=[0-9]{{3}}(?![0-9]))", "", text).replace(THIN, " ")
    text = re.sub(r"(?<=[)\]]) ?(?:U|u|or) ?(?=[(\[])", r" \\cup ", text)
    if re.search(r"[-+] ?[-+] ?[-+]", text) or re.search(rf"[0-9]{{{MAX_NUMBER + 1}}}", text):
        raise Refused("not understood")
    return _close_bars(_ungroup_thousands(text))


def _check_depth(text: str) -> None:
    depth = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if depth > MAX_DEPTH:
            raise Refused("too deep")


def _ungroup_thousands(text: str) -> str:
    groups = _GROUPED.findall(text)
    if not groups:
        return text
    # in (1,234) or 1,234, 5 a comma may part two entries
    if re.search(r"[(\[]|\\\{", text) or text.count(",") != sum(group.count(",") for group in groups):
        raise Refused("a comma with two readings")
    return _GROUPED.sub(lambda m: m[0].replace(",", ""), text)


def _close_bars(text: str) -> str:
    r"""`|x|` as `\lvert x \rvert`: bars alternate, and what then is empty or crosses a bracket is no expression."""
    text = text.replace(r"\mid", "|").replace(r"\vert", "|")
    parts = text.split("|")
    if len(parts) % 2 == 0:
        raise Refused("not understood")
    return "".join(
        part + (r" \lvert " if i % 2 == 0 else r" \rvert ") * (i + 1 < len(parts)) for i, part in enumerate(parts)
    )


def number(text: str) -> Node:
    """A number without a sign, as written."""
    if re.match("0[0-9]", text):
        raise Refused("a leading zero")
    return ("num", Fraction(text), text)
