r"""One notation for answers: LaTeX and Unicode spellings of the same thing become the same characters.

Only what cannot change a value is rewritten. Every regex runs in linear time; spaces between two numbers or words stay,
because `1 1/2` is not `11/2`.
"""

from __future__ import annotations

import re

THIN = "\u2009"
"""The thin space of `1\\,234`: it groups digits where an ordinary space would part two numbers."""
DOLLAR = "\uff04"
"""A dollar sign that means money; the one that delimits math is dropped."""

_CHARACTERS = str.maketrans(
    {
        "\u2212": "-",
        "\u2013": "-",
        "\u00d7": r"\times ",
        "·": r"\cdot ",
        "÷": r"\div ",
        "≈": r"\approx ",
        "≤": r"\le ",
        "≥": r"\ge ",
        "≠": r"\neq ",
        "±": r"\pm ",
        "π": r"\pi ",
        "∞": r"\infty ",
        "°": r"^\circ ",
        "²": "^2",
        "³": "^3",
        "\u2019": "'",
        "\u00a0": " ",
        "\u202f": THIN,
        "\t": " ",
        "\n": " ",
        "\r": " ",
    }
)
_SPACES = dict.fromkeys((";", ":", " ", "quad", "qquad", "(", ")", "[", "]"), " ")
_COMMANDS = {
    **_SPACES,
    **dict.fromkeys(("left", "right", "big", "Big", "bigl", "bigr", "displaystyle", "textstyle", "!"), ""),
    **dict.fromkeys((",", "thinspace"), THIN),
    **dict.fromkeys(("dfrac", "tfrac", "cfrac"), r"\frac"),
    **dict.fromkeys(("dbinom", "tbinom"), r"\binom"),
    **dict.fromkeys(("textrm", "textbf", "textit", "textsf", "mathrm", "mathbf", "mathsf", "mbox"), r"\text"),
    **dict.fromkeys(("dots", "cdots", "ldots"), "..."),
    "fbox": r"\boxed",
    "lbrace": r"\{",
    "rbrace": r"\}",
    "leq": r"\le",
    "geq": r"\ge",
    "ne": r"\neq",
    "degree": r"^\circ",
    "%": "%",
    "$": DOLLAR,
}
_COMMAND = re.compile(r"\\([A-Za-z]+|.)")
_TIE = re.compile(r"(?<=[0-9}])~")
_GROUP = re.compile(r"\\(?:text|boxed)\s*\{([^{}]*)\}")
_SHORT_FRACTION = re.compile(r"\\frac\s*(\{[^{}]*\}|[0-9])\s*(\{[^{}]*\}|[0-9])")
_SHORT_ROOT = re.compile(r"\\sqrt\s*([0-9])")
_ROOT_SIGN = re.compile(r"√ ?([0-9]+|[a-z])(?![0-9])")
_SHORT_SCRIPT = re.compile(r"([\^_])\s*\{\s*([0-9A-Za-z])\s*\}(?![0-9])")  # 10^{2}3 is not 10^23
_LEAD_IN = re.compile(r"\s*(?:the )?(?:final )?answer(?: is\b:?|:)\s*", re.IGNORECASE)


def normalize(text: str) -> str:
    """The answer in one notation, on one line."""
    text = _ROOT_SIGN.sub(r"\\sqrt{\1}", text.translate(_CHARACTERS))
    text = _COMMAND.sub(lambda m: _COMMANDS.get(m[1], m[0]), text)
    text = _TIE.sub(" ", _drop_math_delimiters(text)).replace("{,}", ",")
    for _ in range(3):  # a box around a text around a text; deeper ones stay as they are
        text, replaced = _GROUP.subn(_ungroup, text)
        if not replaced:
            break
    text = _SHORT_FRACTION.sub(lambda m: rf"\frac{{{m[1].strip('{}')}}}{{{m[2].strip('{}')}}}", text)
    text = _SHORT_ROOT.sub(r"\\sqrt{\1}", text)
    text = _SHORT_SCRIPT.sub(r"\1\2", text)
    lead_in = _LEAD_IN.match(text)
    return re.sub(" +", " ", trim(text[lead_in.end() :] if lead_in else text))


def squeeze(text: str) -> str:
    """Without the spaces that carry no meaning, so that two spellings of one expression compare equal."""
    text = text.replace(THIN, " ")
    # (1, 234) has two entries where (1,234) may have one
    text = re.sub(r"(?<=[0-9]), (?=[0-9]{3}(?![0-9]))", ",\u00a0", text)
    return re.sub(r"(?<![0-9A-Za-z]) | (?![0-9A-Za-z])", "", text)


def trim(text: str) -> str:
    """Without surrounding blanks and markdown, and without the full stop of the sentence."""
    text = text.strip().strip("*`").strip()
    return text[:-1].rstrip() if text.endswith((".", ",", ";")) and not text.endswith("..") else text


def _drop_math_delimiters(text: str) -> str:
    if text.count("$") % 2:  # an odd one is money, as in `$18` or `$18 is $x$`
        text = text.replace("$", DOLLAR, 1)
    return text.replace("$", " ")


def _ungroup(match: re.Match[str]) -> str:
    inner = match[1].strip()
    if match[0].startswith(r"\text") and len(inner) == 1 and inner.isalpha():
        return rf"\text {inner} "  # still told apart from a variable, so that `5 m` is not `5m`
    return f" {match[1]} "
