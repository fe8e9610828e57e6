"""What a response's reasoning looks like, from its text alone: format, steps, loops, reflection."""

from __future__ import annotations

import math
import operator
import re
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from jaxdistill.edits import count_steps
from jaxdistill.records import Score, split_response
from jaxdistill.verify.filters import think_structure

REFLECTION = re.compile(
    r"\b(?:wait|hmm|hold on|let me (?:double[- ]?)?(?:check|verify|re-?check|re-?examine|confirm)|double[- ]check|"
    r"let's (?:double[- ]?)?(?:check|verify)|to verify|checking)\b",
    re.I,
)
"""Looks back at what was written."""
BACKTRACKING = re.compile(
    r"\b(?:alternatively|on second thought|(?:that|this) (?:is|was|can't be|isn't) (?:wrong|incorrect|not right|right)"
    r"|i made (?:a|an) (?:mistake|error)|let me (?:try (?:again|another)|start over|reconsider|rethink)|instead,|"
    r"scratch that|go(?:ing)? back)\b",
    re.I,
)
"""Leaves a way for another one."""
LOOP, LOOPED = 8, 0.5
"""A text is a loop if runs of this many words or signs that stood before make up this share of it."""

_SUM = re.compile(
    r"(?<![\d.,+*/×÷^()-])(?<![+*/×÷^-] )(\d+(?:\.\d+)?) ?([-+*/×÷]) ?(\d+(?:\.\d+)?) ?= ?\$?(\d+(?:\.\d+)?)"
    r"(?![\d%]|\.\d| ?[-+*/×÷^(])"
)
_OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "×": operator.mul}


def sums(text: str) -> list[bool]:
    """Whether each sum of two numbers that a text states, such as `17*3=51`, is right, to the digits that it gives.

    It says whether a chain of steps holds together as far as that can be computed, and nothing about the words.
    """
    found = []
    for left, sign, right, result in _SUM.findall(text):
        a, b, stated = Fraction(left), Fraction(right), Fraction(result)
        if sign in "/÷":
            if not b:
                found.append(False)
                continue
            value = a / b
        else:
            value = _OPERATIONS[sign](a, b)
        digits = len(result.partition(".")[2])
        found.append(abs(value - stated) * 2 * 10**digits <= (1 if digits else 0))
    return found


def repeated_share(text: str, size: int = LOOP) -> float:
    """Share of a text's runs of `size` words or signs that stand in it earlier; 0 for a text that is shorter."""
    words = re.findall(r"\w+|[^\w\s]", text)
    runs = [tuple(words[i : i + size]) for i in range(len(words) - size + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def measure(score: Score) -> dict[str, float]:
    """The numbers of one response; `summarise` takes their means."""
    thinking, _ = split_response(score.response)
    thought = thinking if thinking is not None else score.response.partition("<think>")[2] or score.response
    structure = think_structure(score.response)
    return {
        "well_formed": float(structure == "closed"),
        "answered": float(score.extracted is not None),
        "truncated": float(score.finish_reason == "length"),
        "looping": float(repeated_share(score.response) >= LOOPED),
        "repeated": repeated_share(score.response),
        "tokens": float(score.output_tokens),
        "steps": float(count_steps(thought)) if thought.strip() else 0.0,
        "sums": float(len(checked := sums(thought))),
        "sums_right": float(sum(checked)),
        "reflections": float(len(REFLECTION.findall(thought))),
        "backtracks": float(len(BACKTRACKING.findall(thought))),
    }


def summarise(scores: Sequence[Score]) -> dict[str, Any]:
    """Means over responses.

    Returns:
      shares `well_formed` (one closed thinking before an answer), `answered` (a final answer was found), `truncated`,
      `looping` (see `LOOP`) and `repeated`; a response's `tokens`, `steps`, `sums`, `reflections` and `backtracks`;
      `sums_right`, the share of all stated sums that are right; `tokens_correct` and `tokens_wrong`, the length of
      right responses and of the others. The last three are None where there are none.
    """
    measured = [measure(score) for score in scores]
    if not measured:
        return {}
    means: dict[str, float | None] = {
        name: math.fsum(each[name] for each in measured) / len(measured) for name in measured[0]
    }
    stated = math.fsum(each["sums"] for each in measured)
    means["sums_right"] = math.fsum(each["sums_right"] for each in measured) / stated if stated else None
    right = [score.output_tokens for score in scores if score.outcome == "correct"]
    wrong = [score.output_tokens for score in scores if score.outcome != "correct"]
    return means | {
        "tokens_correct": math.fsum(right) / len(right) if right else None,
        "tokens_wrong": math.fsum(wrong) / len(wrong) if wrong else None,
    }


def finish_reasons(scores: Sequence[Score]) -> dict[str, int]:
    """How many responses ended how."""
    return dict(Counter(score.finish_reason for score in scores))
