"""Compares a final answer with the gold answer, exactly, in the way that the gold answer's kind asks for.

Numbers are compared as exact rationals and never with an absolute tolerance, so 1/2^99 is not 1/2^98. What needs
algebra is correct only if both sides are spelled the same, and undecided otherwise.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

from jaxdistill.verify.latex import Refused, parse_latex
from jaxdistill.verify.notation import normalize, squeeze, trim
from jaxdistill.verify.quantities import UNITS, Quantity, parse_quantity
from jaxdistill.verify.structure import is_same

MAX_ANSWER = 1000
"""Characters; a longer answer is not compared."""


@dataclass(frozen=True)
class Check:
    """What a comparison found. `undecided` says nothing about the answer: it is neither a positive nor a negative."""

    outcome: Literal["correct", "incorrect", "undecided"]
    extracted: str | None
    """The final answer as it stood in the response."""
    reason: str
    method: str
    """How the comparison was made: `integer`, `rational`, `choice`, `text`, ...; empty if none was."""


def compare(answer: str, gold: str, kind: str | None = None) -> Check:
    """Compares an answer with the gold answer; see `answers.compare_math`."""
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; known kinds of answers are {', '.join(KINDS)}.")
    if max(len(answer), len(gold)) > MAX_ANSWER:
        return Check("undecided", answer[:MAX_ANSWER], "too long", "")
    left, right = normalize(answer), normalize(gold)
    if not right:
        check = _undecided("no gold answer")
    elif not left:
        check = _undecided("no answer found")
    else:
        kind = kind or kind_of(right)
        hedge = _hedge(left, right, kind)
        check = _undecided(hedge) if hedge else KINDS[kind](left, right)
    return replace(check, extracted=trim(answer) or None)


def kind_of(gold: str) -> str:
    """The kind of a normalized gold answer, a key of `KINDS`."""
    if parse_quantity(gold):
        return "number"
    if (_letter(gold) or "a").isupper():  # a small letter is a variable
        return "choice"
    return "words" if _is_words(gold) else "expression"


def _undecided(reason: str, method: str = "") -> Check:
    return Check("undecided", None, reason, method)


def _decide(equal: bool, method: str) -> Check:
    return Check("correct", None, "equal", method) if equal else Check("incorrect", None, "different", method)


_EITHER = re.compile(r"\bor\b|\\lor\b")
_HEDGES = re.compile(r"\b(or|either|maybe|perhaps|possibly|probably|might|could|guess|unsure)\b|\\lor\b|\?", re.I)
_NEGATIONS = re.compile(r"\b(not|never|cannot|neither|nor)\b|n't\b|\\neg\b", re.I)


def _hedge(answer: str, gold: str, kind: str) -> str | None:
    """Why the answer is no single statement: `5 or 7`, `not 5`. A gold answer may speak so itself (`x<1 or x>2`)."""
    if kind == "expression":
        answer = _EITHER.sub(" ", answer)  # x = 1 or x = 2: how many answers there may be, the gold answer says
    if _HEDGES.search(answer) and not _HEDGES.search(gold):
        return "hedged"
    if _NEGATIONS.search(answer) and not _NEGATIONS.search(gold):
        return "negated"
    return None


# -------------------------------------------------------------------------------------------------- numbers

_SCALES = {Fraction(n) for n in (4, 7, 12, 16, 24, 30, 36, 52, 60, 365, 1440, 3600, 5280)}
_SCALES |= {Fraction(10) ** n for n in range(1, 13)}
_SIGNIFICANT = 3
"""Digits from which on an agreement after rounding may not be chance."""


def _compare_numbers(answer: str, gold: str) -> Check:
    theirs, ours = parse_quantity(answer), parse_quantity(gold)
    if ours is None:
        return _undecided("the gold answer is not a number")
    if theirs is None:
        return _undecided("not a number") if _is_words(answer) else _compare_trees(answer, gold)
    method = "percent" if ours.percent else ours.form
    if theirs.name and ours.name and theirs.name != ours.name:
        return _undecided("different variables", method)
    if ours.percent != theirs.percent:
        return _compare_percent(theirs, ours)
    if ours.unit != theirs.unit and (doubt := _unit_doubt(theirs, ours)):
        return replace(doubt, method=method)
    if theirs.value == ours.value:
        if theirs.rounded and not ours.rounded and ours.form != "decimal":
            return _undecided("approximate", method)
        return _decide(True, method)
    return _compare_rounded(theirs, ours, method)


def _compare_percent(theirs: Quantity, ours: Quantity) -> Check:
    """Just one side is a percentage: 10% is 0.1, and what a 10 meant nobody knows."""
    values = [q.value / 100 if q.percent else q.value for q in (theirs, ours)]
    if (theirs.unit or ours.unit) or (theirs.value == ours.value and values[0] != values[1]):
        return _undecided("percent against a plain number", "percent")
    return _decide(values[0] == values[1], "percent")


def _unit_doubt(theirs: Quantity, ours: Quantity) -> Check | None:
    """What the units alone decide, where they differ; None if the values may be compared without them."""
    if theirs.unit and ours.unit:
        known = all(re.sub(r"\^[23]$", "", unit) in UNITS.values() for unit in (theirs.unit, ours.unit))
        # 5 cm is not 5 m; 500 cm may be, and 5 apples may be 5 fruits
        return _decide(False, "") if known and theirs.value == ours.value else _undecided("different units")
    if theirs.maybe_variable or ours.maybe_variable:
        return _undecided("a unit or a variable")
    unit = theirs.unit or ours.unit or ""
    if ours.unit and unit not in ("dollar", "degree"):
        return _undecided("no unit")
    if theirs.value and ours.value and unit in UNITS.values():
        ratio = theirs.value / ours.value
        if ratio in _SCALES or 1 / ratio in _SCALES:
            return _undecided("a unit may differ")  # the question may have asked for minutes: 2 hours are 120
    return None


def _compare_rounded(theirs: Quantity, ours: Quantity, method: str) -> Check:
    r"""Two values that differ, but may be one after rounding to the digits of one of them.

    A decimal does not say that it has been rounded. Where the gold answer is marked so (`\approx 3.14`), rounding to
    its digits decides. Where it is not, agreement after rounding proves neither a right procedure nor a wrong one, so
    the verdict is undecided; with fewer than three digits agreement is chance (0.46 and 0.5), and the values differ.
    """
    if _rounds_to(theirs.value, ours) and ours.rounded:
        enough = _has_digits(ours)
        return Check("correct", None, "equal after rounding", method) if enough else _undecided("approximate", method)
    for value, target in ((theirs.value, ours), (ours.value, theirs)):
        if target.form == "decimal" and _has_digits(target) and _rounds_to(value, target):
            return _undecided("equal only after rounding", method)
    return _decide(False, method)


def _rounds_to(value: Fraction, target: Quantity) -> bool:
    return target.form in ("integer", "decimal") and abs(value - target.value) * 2 * 10**target.decimals <= 1


def _has_digits(decimal: Quantity) -> bool:
    return abs(decimal.value) * 10**decimal.decimals >= 10 ** (_SIGNIFICANT - 1)


# ------------------------------------------------------------------------------------- choices, words, others

_CHOICE = re.compile(r"(?:(?:option|choice) )?(?:\(([A-J])\)|([A-J])(?:\)|(?=[.:])|$))[.:]?(?P<rest>.*)", re.I)
_WORD = re.compile(r"[A-Za-z]+(?:['-][A-Za-z]+)*")


def _letter(text: str) -> str | None:
    """The letter of a multiple-choice answer such as `B`, `(B)`, `B) 42` or `option B`; None if it is none."""
    match = _CHOICE.fullmatch(text.replace(r"\text ", "").strip())
    if match is None or re.search(r"\b[A-J]\b", match["rest"]):  # `(A) and (B)`
        return None
    return match[1] or match[2]


def _compare_choices(answer: str, gold: str) -> Check:
    theirs, ours = _letter(answer), _letter(gold)
    if ours is None:
        return _undecided("the gold answer is not a choice")
    if theirs is None or theirs.isupper() != ours.isupper():  # b may be a variable
        return _undecided("not a choice")
    return _decide(theirs == ours, "choice")


def _is_words(text: str) -> bool:
    words = text.split()
    return all(_WORD.fullmatch(word) for word in words) and any(len(w) > 2 or w.lower() == "no" for w in words)


def _compare_words(answer: str, gold: str) -> Check:
    theirs, ours = answer.split(), gold.split()
    if not (_is_words(answer) and _is_words(gold)):
        return _undecided("worded differently", "text")
    if len(theirs) == len(ours) and all(map(_same_word, theirs, ours)):
        return _decide(True, "text")
    a, b = theirs[0].lower(), ours[0].lower()
    if len(theirs) == len(ours) == 1 and not a.startswith(b) and not b.startswith(a):
        return _decide(False, "text")
    return _undecided("worded differently", "text")  # `none` may mean `no solution`


def _same_word(a: str, b: str) -> bool:
    """Equal but for a capital at the start or throughout; ABC and abc are no words, and differ."""
    if a.lower() != b.lower():
        return False
    return a == b or len(a) > 3 or a.lower() in ("yes", "no") or (len(a) > 1 and a[1:] == b[1:])


def _compare_expressions(answer: str, gold: str) -> Check:
    # "1,234" may be spelled like a pair, and is none
    alike = (parse_quantity(answer) is None) == (parse_quantity(gold) is None)
    if squeeze(answer) == squeeze(gold):
        return _decide(True, "text") if alike else _undecided("a comma with two readings")
    if not alike and answer.replace(" ", "") == gold.replace(" ", ""):
        return _undecided("a comma with two readings")
    return _compare_trees(answer, gold)


def _compare_trees(answer: str, gold: str) -> Check:
    """What needs algebra: parsed by a grammar, compared by structure and value; see `structure`."""
    ours = parse_latex(gold)
    if isinstance(ours, str):
        return _undecided(f"the gold answer is {ours}" if ours == "not understood" else ours)
    theirs = parse_latex(answer)
    if isinstance(theirs, str):
        return _undecided(theirs)
    try:
        return _decide(is_same(theirs, ours), "algebra")
    except Refused as error:
        return _undecided(str(error), "algebra")


KINDS = {
    "number": _compare_numbers,
    "choice": _compare_choices,
    "words": _compare_words,
    "expression": _compare_expressions,
}
"""Kinds of gold answers, and how an answer is compared with each."""
