"""Judges the final answer of a response: extraction (`extract`), then comparison (`compare`).

Both are pure functions of text. Texts, numbers and trees are capped before anything is computed, and nothing that a
model wrote is run. When unsure they say `undecided`, with a reason: a false positive teaches a wrong procedure, a false
negative costs one sample.
"""

from __future__ import annotations

from dataclasses import replace

from jaxdistill.verify.compare import Check, compare
from jaxdistill.verify.extract import extract_answer, later_statement
from jaxdistill.verify.notation import normalize, squeeze

__all__ = ["Check", "check_math", "compare_math"]


def check_math(response: str, gold: str, *, kind: str | None = None, problem: str | None = None) -> Check:
    """Judges a whole response, thinking included, against the gold answer.

    Args:
      response: generated text; only what follows its last `</think>` counts, all of it if there are no tags.
      gold: the gold answer; its kind picks the comparison.
      kind: that kind, where it is known: a key of `compare.KINDS`.
      problem: the problem's text, where it is known; an answer that only repeats a formula of it is then undecided.
    Returns:
      correct, incorrect or undecided, with the reason (`truncated`, `no answer found`, `hedged`, ...).
    """
    found = extract_answer(response)
    if found.answer is None:
        return Check("undecided", None, found.reason, "")
    check = compare(found.answer, gold, kind)
    if problem and check.outcome == "correct" and check.method == "algebra" and _is_echo(found.answer, problem):
        return replace(check, outcome="undecided", reason="an echo of the problem")
    later = later_statement(found.tail)
    if later is None:
        return check
    # a response that goes on to state something else has not made up its mind
    other = Check("undecided", None, later.reason, "") if later.answer is None else compare(later.answer, gold, kind)
    if {check.outcome, other.outcome} == {"correct", "incorrect"}:
        return replace(check, outcome="undecided", reason="two answers", method="")
    return replace(other, extracted=check.extracted) if other.reason in ("hedged", "negated") else check


def _is_echo(answer: str, problem: str) -> bool:
    r"""Whether a formula stands in the problem as it is: `\sqrt{50}` is no answer to "simplify \sqrt{50}"."""
    return squeeze(normalize(answer)) in squeeze(normalize(problem))


def compare_math(answer: str, gold: str, *, kind: str | None = None) -> Check:
    """Compares a final answer, already extracted, with the gold answer."""
    return compare(answer, gold, kind)
