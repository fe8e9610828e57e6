r"""Numbers as they stand in answers: exact rationals, with what hangs on them (percent, currency, units).

Everything is parsed by hand-written linear regexes into `fractions.Fraction`; nothing is evaluated. What is not
certainly one number (`5 to 7`, `5!`, `5 million`, `5x`) is not parsed, and the comparison then stays undecided.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from jaxdistill.verify.notation import DOLLAR, THIN

MAX_DIGITS = 400
"""Of one number, and the largest power of ten: exact arithmetic on them takes microseconds."""


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """One number of an answer."""

    value: Fraction
    """As written: the value of `10%` is 10, with `percent` set."""
    form: str
    """`integer`, `decimal`, `scientific` or `rational`; names the method of a verdict."""
    decimals: int = 0
    """Digits after the point."""
    percent: bool = False
    unit: str | None = None
    """Canonical where it is a known unit (`centimeter^2`), otherwise the words as written."""
    maybe_variable: bool = False
    """The unit is one bare letter, so `5 m` may also be five times m."""
    rounded: bool = False
    r"""Marked as such: `\approx 3.14`."""
    name: str | None = None
    """The left side of `x = 5`."""


_INTEGER = rf"(?:[0-9]{{1,3}}(?:,[0-9]{{3}})+|[0-9]{{1,3}}(?:{THIN}[0-9]{{3}})+|[0-9]+)"
_DECIMAL = rf"(?:{_INTEGER}(?:\.[0-9]+)?|\.[0-9]+)"
_SIGNED = rf"[+-]? ?{_DECIMAL}"
_POWER = r"10 ?\^ ?(?:\{ ?(?P<pa>[+-]?[0-9]+) ?\}|(?P<pb>[+-]?[0-9]+))"
_NUMBERS = {  # the first that matches wins, so the longer forms come first
    "mixed": re.compile(
        r"(?P<whole>[0-9]+)(?: ?\\frac\{(?P<a>[0-9]+)\}\{(?P<b>[0-9]+)\}| (?P<c>[0-9]+) ?/ ?(?P<d>[0-9]+))"
    ),
    "fraction": re.compile(
        rf"\\frac\{{ ?(?P<a>{_SIGNED}) ?\}}\{{ ?(?P<b>{_SIGNED}) ?\}}|(?P<c>{_DECIMAL}) ?/ ?(?P<d>-?{_DECIMAL})"
    ),
    "repeating": re.compile(
        r"(?P<whole>[0-9]+)?\.(?P<fixed>[0-9]*)\\(?:overline|bar) ?(?:\{(?P<a>[0-9]+)\}|(?P<b>[0-9]))"
    ),
    "scientific": re.compile(
        rf"(?P<mantissa>{_DECIMAL})(?:[eE](?P<e>[+-]?[0-9]+)| ?(?:\\times|\\cdot|[x*]) ?{_POWER})"
    ),
    "power": re.compile(_POWER),
    "decimal": re.compile(rf"(?P<decimal>{_DECIMAL})"),
}
_FORMS = {"mixed": "rational", "fraction": "rational", "repeating": "rational", "power": "scientific"}
_APPROXIMATE = re.compile(r"(?:\\approx|\\sim|~|(?:approximately|approx\.?|about|roughly|around)\b) ?", re.IGNORECASE)
_ASSIGNMENT = re.compile(r"([A-Za-z](?:_\{?[0-9A-Za-z]+\}?)?) ?= ?")
_PREFIX = re.compile(rf"(?P<sign1>[+-])? ?(?:(?P<money>(?:US|USD ?)?{DOLLAR}|USD|[€£¥₹]) ?)?(?P<sign2>[+-])? ?")


def parse_quantity(text: str) -> Quantity | None:
    """The one number that a normalized answer consists of; None if it is anything else, or too large.

    Args:
      text: in the notation of `notation.normalize`.
    """
    assignment = _ASSIGNMENT.match(text)
    text = text[assignment.end() :] if assignment else text
    approximate = _APPROXIMATE.match(text)
    text = text[approximate.end() :] if approximate else text
    if text[:1] + text[-1:] in ("()", "{}"):
        text = text[1:-1].strip()
    prefix = _PREFIX.match(text)
    assert prefix is not None  # all of it is optional
    found = _parse_number(text[prefix.end() :])
    if found is None or (prefix["sign1"] and prefix["sign2"]):
        return None
    value, form, decimals, rest = found
    unit = _parse_unit(rest, _MONEY.get(prefix["money"], "dollar") if prefix["money"] else None)
    if unit is None:
        return None
    return Quantity(
        value=-value if "-" in (prefix["sign1"], prefix["sign2"]) else value,
        form=form,
        decimals=decimals,
        percent=unit == "%",
        unit=unit if unit not in ("", "%") else None,
        maybe_variable=_BARE_LETTER.match(rest) is not None,
        rounded=approximate is not None,
        name=re.sub("[{}]", "", assignment[1]) if assignment else None,
    )


def _parse_number(text: str) -> tuple[Fraction, str, int, str] | None:
    """The number at the start: (value, form, digits after the point, what follows)."""
    for name, pattern in _NUMBERS.items():
        match = pattern.match(text)
        if match is None:
            continue
        if len(match[0]) > MAX_DIGITS:
            return None
        value = _value(name, match.groupdict())
        if value is None:
            return None
        decimals = len(match[0].partition(".")[2]) if name == "decimal" else 0
        form = "integer" if name == "decimal" and "." not in match[0] else _FORMS.get(name, name)
        return value, form, decimals, text[match.end() :]
    return None


def _value(name: str, part: dict[str, str | None]) -> Fraction | None:
    exponent = int(part.get("e") or part.get("pa") or part.get("pb") or 0)
    if abs(exponent) > MAX_DIGITS:
        return None
    match name:
        case "power":
            return Fraction(10) ** exponent
        case "scientific":
            mantissa = _decimal(part["mantissa"])
            return None if mantissa is None else mantissa * Fraction(10) ** exponent
        case "repeating":
            fixed, repeated = part["fixed"] or "", part["a"] or part["b"] or ""
            tail = Fraction(int(repeated), 10 ** len(repeated) - 1)
            return (int((part["whole"] or "0") + fixed) + tail) / 10 ** len(fixed)
        case "mixed" | "fraction":
            above, below = _decimal(part["a"] or part["c"]), _decimal(part["b"] or part["d"])
            if above is None or not below:
                return None
            if name == "mixed":
                # 3 5/2 is no mixed number, whatever its author meant
                return int(part["whole"] or "0") + above / below if 0 < above < below else None
            return above / below
        case _:
            return _decimal(part["decimal"])


def _decimal(text: str | None) -> Fraction | None:
    """An exact decimal, with its separators; None for leading zeros, as in `007` or `0,5`."""
    digits = re.sub(rf"[,{THIN} ]", "", text or "")
    if not digits or re.match(r"[+-]?0[0-9]", digits):
        return None
    return Fraction(digits)


# ---------------------------------------------------------------------------------------------------- units

_MONEY = {"€": "euro", "£": "sterling", "¥": "yen", "₹": "rupee"}  # any other sign is the dollar's
_ALIASES = """
    millimeter mm millimetre|centimeter cm centimetre|meter metre|kilometer km kilometre|inch inches|foot feet ft
    |yard yd|mile mi|gram|kilogram kg kilo|milligram mg|pound lb lbs|ounce oz|liter litre|milliliter ml mL millilitre
    |gallon gal|second sec|minute min|hour hr hrs|day|week|month|year yr yrs|dollar usd USD|cent|euro|degree|radian rad
    |mph|kph|watt|volt|newton|joule
"""
UNITS = {
    alias: names.split()[0]
    for names in _ALIASES.split("|")
    for name in names.split()
    for alias in (name, name + "s" if len(name) > 2 else name)
}
"""Spellings of units that are known; two of them with different values are different quantities."""
_LETTERS = {"m": "meter", "g": "gram", "s": "second", "h": "hour", "l": "liter", "L": "liter"}

_CHANGES_THE_VALUE = frozenset(
    """
    one two three four five six seven eight nine ten eleven twelve twenty thirty forty fifty sixty seventy eighty
    ninety hundred hundreds thousand thousands million millions billion billions trillion trillions dozen dozens
    score gross lakh crore half halves third thirds quarter quarters percent percentage pair pairs couple double
    twice thrice squared cubed factorial base binary octal hexadecimal mod modulo plus minus times over divided
    multiplied less than greater least most between and nor not from off unless except without excluding including
    instead rather but because since where when which while wrong incorrect actually wait maybe perhaps possibly
    probably root sqrt power log cos sin tan remainder short exclusive both with cannot error alpha beta gamma
    delta theta lambda sigma omega phi infinity
    """.split()
)
_GLUE = frozenset("a an the per in at of for on by each every".split())
_MAX_WORDS = 7
_DEGREE = re.compile(r"\^ ?\{? ?\\circ ?\}? ?([CF])?")
_BARE_LETTER = re.compile(r" *[A-Za-z](?![A-Za-z'])")
_UNIT_WORD = re.compile(r"(?:\\text )?([A-Za-z][A-Za-z'-]*)(?: ?\^ ?([23]))?")


def _parse_unit(rest: str, money: str | None) -> str | None:
    """What follows a number: its unit, `""` for none, `%` for percent; None if it may change the value."""
    rest = rest.replace(THIN, " ")
    text = rest.strip()
    if money is None and text in ("%", "percent", "per cent"):
        return "%"
    if money is None and text in (DOLLAR, *_MONEY):
        return _MONEY.get(text, "dollar")
    if degree := _DEGREE.fullmatch(text):
        return None if money else f"degree {degree[1] or ''}".strip()
    if not text:
        return money or ""
    words = _parse_words(text, spaced=rest[0] == " ")
    if words is None:
        return None
    return " ".join(([money] if money else []) + [w for w in words if w != money])


def _parse_words(text: str, *, spaced: bool) -> list[str] | None:
    """Unit words in canonical form; None if any of them is no plain word."""
    parts = text.replace("/", " per ").split()
    text, found, position = " ".join(parts), [], 0
    while position < len(text):
        match = _UNIT_WORD.match(text, position)
        if match is None or len(found) == _MAX_WORDS:
            return None
        word = _canonical_word(match[1], first=not found, alone=match.end() == len(text), wrapped=match[0][0] == "\\")
        if word is None or not (spaced or found or match[1] in UNITS or match[0][0] == "\\"):
            return None  # `5ab` is a product, `5cm` a length
        found.append(word + (f"^{match[2]}" if match[2] else ""))
        position = match.end() + 1
        if text[match.end() : position] not in ("", " "):
            return None
    return found


def _canonical_word(word: str, *, first: bool, alone: bool, wrapped: bool) -> str | None:
    lower = word.lower()
    if lower in _CHANGES_THE_VALUE:
        return None
    known = UNITS.get(word) or UNITS.get(lower if len(word) > 2 else word)
    if known:
        return known
    if len(word) == 1:
        # one letter is a unit where the text says so, or where it may be one: see `maybe_variable`
        return _LETTERS.get(word) if wrapped or (first and alone) else word if word in _GLUE else None
    if re.fullmatch(r".+ths?", lower):
        return None  # tenths, but also paths: better undecided
    if lower in _GLUE:
        return lower
    # a word has at least three letters and a vowel behind its first; `xyz` and `abc` are products
    if len(word) < 3 or not re.search("[aeiou]", lower[1:]):
        return None
    return lower.removesuffix("s") if len(lower) > 3 else lower
