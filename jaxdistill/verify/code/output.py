"""Compares what a program printed with what was expected."""

from __future__ import annotations

TOLERANCE = 1e-6
"""Relative, and only where the expected number is written as a float; an expected 0.0 allows 1e-9."""
_ZERO = 1e-9
_LONGEST = 64  # characters of a number


def same_output(printed: str, expected: str) -> bool:
    """Whether two outputs are the same but for whitespace and the last digits of floats.

    Compared are the lines that are not blank, word by word; runs of spaces and spaces at the ends do not count. Words
    are equal as text (so `yes` is not `YES`, and `7.0` is not `7`), or as numbers within `TOLERANCE` if the expected
    one has a point or an exponent.
    """
    ours = [words for line in expected.splitlines() if (words := line.split())]
    theirs = [words for line in printed.splitlines() if (words := line.split())]
    if len(theirs) != len(ours):
        return False
    return all(len(a) == len(b) and all(map(_same_word, a, b)) for a, b in zip(theirs, ours, strict=True))


def _same_word(printed: str, expected: str) -> bool:
    if printed == expected:
        return True
    if max(len(printed), len(expected)) > _LONGEST or not set(".eE") & set(expected) or not expected[-1].isdigit():
        return False
    if not (_is_number(printed) and _is_number(expected)):
        return False
    value, target = float(printed), float(expected)
    return abs(value - target) <= (abs(target) * TOLERANCE if target else _ZERO)


def _is_number(word: str) -> bool:
    """A decimal number in digits; not `nan`, `inf` or `1_000`."""
    if not set(word) <= set("0123456789+-.eE"):
        return False
    try:
        return abs(float(word)) < float("inf")
    except ValueError:
        return False
