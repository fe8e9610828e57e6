"""Edits of reasoning: what a trace would be with wrong numbers, without some steps, or with them in another order.

Pure functions of text and a random generator. They change the text between the `<think>` tags alone, and leave the
solution behind it as it is, so that a student who learns from edited traces sees the same answers. `wrong_answer` is
the exception: it is about the answer. Equal seeds and ids give equal edits.

Source: the perturbations of Li et al. 2025, arXiv:2502.07374, sections 4.1 and 4.2.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

OPEN, CLOSE = "<think>", "</think>"
KEYWORDS = (
    "alternatively", "wait", "hmm", "but", "however", "actually", "instead", "maybe", "let me double-check",
    "let me double check", "double-check", "double check", "let me check", "let me verify", "let's check",
    "let's verify", "on second thought", "hold on",
)  # fmt: skip
"""What marks reflection and backtracking in a long chain of thought."""
_KEYWORD = re.compile(rf"\b(?:{'|'.join(sorted(map(re.escape, KEYWORDS), key=len, reverse=True))})\b[,.]?[ ]?", re.I)
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
FILLER = "."


def edit_response(response: str, edit: Callable[[str], str]) -> str:
    """The response with its thinking edited; the line breaks around the thinking, and what follows it, stay.

    A response without a closed thinking is given back as it is.
    """
    head, closing, content = response.rpartition(CLOSE)
    if not closing:
        return response
    before, opening, thinking = head.rpartition(OPEN)
    body = thinking.strip("\n")
    if not body.strip():
        return response
    start = thinking.index(body)
    return before + opening + thinking[:start] + edit(body) + thinking[start + len(body) :] + closing + content


def split_steps(thinking: str) -> tuple[list[str], str]:
    """The steps of a thinking, and what stands between them: paragraphs if there are any, otherwise lines.

    `separator.join(steps)` is the thinking again.
    """
    separator = "\n\n" if "\n\n" in thinking.strip() else "\n"
    return thinking.split(separator), separator


def count_steps(thinking: str) -> int:
    """How many steps have something on them."""
    return sum(bool(step.strip()) for step in split_steps(thinking)[0])


# --------------------------------------------------------------------------------------------------- edits


def random_digits(thinking: str, rng: random.Random, *, rate: float) -> str:
    """Every digit, with the chance `rate`, becomes one of 0 to 9 at random; the length stays."""
    return "".join(str(rng.randrange(10)) if c.isdecimal() and rng.random() < rate else c for c in thinking)


def without_keywords(thinking: str, rng: random.Random, *, rate: float = 1.0) -> str:
    """Words of reflection (`KEYWORDS`) are taken out, each with the chance `rate`."""
    return _KEYWORD.sub(lambda match: "" if rng.random() < rate else match[0], thinking)


def shuffled_steps(thinking: str, rng: random.Random, *, rate: float) -> str:
    """A share of the steps change places among themselves; where two or more can, the order does change."""
    steps, separator = split_steps(thinking)
    places = _some(steps, rng, rate, least=2)
    order = places[:]
    while len({steps[i] for i in places}) > 1 and [steps[i] for i in order] == [steps[i] for i in places]:
        rng.shuffle(order)
    moved = {place: steps[source] for place, source in zip(places, order, strict=True)}
    return separator.join(moved.get(i, step) for i, step in enumerate(steps))


def deleted_steps(thinking: str, rng: random.Random, *, rate: float, keep_length: bool = True) -> str:
    """A share of the steps are taken out.

    Args:
      keep_length: put dots in their place, one a letter, digit or sign: what was said is gone, the length is not. Such
        filler tokens carry no reasoning (Lanham et al. 2023, arXiv:2307.13702, section 2.5).
    """
    steps, separator = split_steps(thinking)
    gone = set(_some(steps, rng, rate))
    if keep_length:
        return separator.join(re.sub(r"\S", FILLER, s) if i in gone else s for i, s in enumerate(steps))
    return separator.join(step for i, step in enumerate(steps) if i not in gone)


def inserted_steps(
    thinking: str, rng: random.Random, *, rate: float, donors: Sequence[str], keep_length: bool = True
) -> str:
    """A share of steps of other traces get among the trace's own.

    Args:
      donors: steps of other traces.
      keep_length: each takes the place of a step, so that there are as many as before; otherwise they come in between.
    """
    steps, separator = split_steps(thinking)
    chosen = set(_some(steps, rng, rate))
    if not donors:
        return thinking
    found: list[str] = []
    for i, step in enumerate(steps):
        if i in chosen:
            found.append(rng.choice(donors))
        if i not in chosen or not keep_length:
            found.append(step)
    return separator.join(found)


def wrong_answer(response: str, rng: random.Random) -> str:
    """The answer is another number: in the solution, and wherever the last step of the thinking has it.

    So the reasoning comes to the wrong answer that the solution states. A solution without a number stays.
    """
    head, closing, content = response.rpartition(CLOSE)
    numbers = list(_NUMBER.finditer(content))
    if not numbers:
        return response
    right = numbers[-1][0]
    wrong = _another(right, rng)
    exact = re.compile(rf"(?<![\d.]){re.escape(right)}(?![\d]|\.\d)")
    content = exact.sub(wrong, content)
    if not closing:
        return content
    lines = head.split("\n")
    last = next((i for i in reversed(range(len(lines))) if lines[i].strip() and OPEN not in lines[i]), None)
    if last is not None:
        lines[last] = exact.sub(wrong, lines[last])
    return "\n".join(lines) + closing + content


def _another(number: str, rng: random.Random) -> str:
    """Another number with as many digits, or one more at the end of the range."""
    whole, dot, part = number.partition(".")
    low = 10 ** (len(whole) - 1) if len(whole) > 1 else 0
    choices = [low + n for n in range(min(1000, 9 * 10 ** (len(whole) - 1) + (len(whole) == 1)))]
    near = [c for c in choices if str(c) != whole]
    return str(rng.choice(near)) + dot + part


def _some(steps: Sequence[str], rng: random.Random, rate: float, least: int = 1) -> list[int]:
    """Places of a share of the steps that have something on them, in order; at least `least` if there are."""
    places = [i for i, step in enumerate(steps) if step.strip()]
    count = min(len(places), max(least, round(rate * len(places))))
    return sorted(rng.sample(places, count))


EDITS = ("random_digits", "without_keywords", "shuffled_steps", "deleted_steps", "inserted_steps", "wrong_answer")
"""What `data.edit.kind` may be."""


def apply(
    response: str, kind: str, *, key: str, rate: float, keep_length: bool, donors: Sequence[str] = (), seed: int = 0
) -> str:
    """One edit of one response; a pure function of its arguments.

    Args:
      kind: one of `EDITS`.
      key: what tells the traces apart, such as their ids.
    """
    rng = random.Random(f"{seed}/{kind}/{key}")
    match kind:
        case "random_digits":
            return edit_response(response, lambda text: random_digits(text, rng, rate=rate))
        case "without_keywords":
            return edit_response(response, lambda text: without_keywords(text, rng, rate=rate))
        case "shuffled_steps":
            return edit_response(response, lambda text: shuffled_steps(text, rng, rate=rate))
        case "deleted_steps":
            return edit_response(response, lambda text: deleted_steps(text, rng, rate=rate, keep_length=keep_length))
        case "inserted_steps":
            return edit_response(
                response, lambda t: inserted_steps(t, rng, rate=rate, donors=donors, keep_length=keep_length)
            )
        case "wrong_answer":
            return wrong_answer(response, rng)
        case _:
            raise ValueError(f"edit {kind!r} is not known; known are {', '.join(EDITS)}.")
