"""The demo task: chained word problems, small enough for two CPU cores and yet honest.

    Pam has 52 shells. Ann has 2 more than Pam. ... How many shells does Jon have?

Three to five operations in a row, every value in 1..99. Answering at once is hard for a small model, writing the
chain down makes it learnable. A trace names one person a line:

    <think>
     Pam=52
     Ann=52+2=54
    </think>
    The answer is \\boxed{54}.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

NAMES = [
    "Ann",
    "Bob",
    "Cal",
    "Dan",
    "Eva",
    "Fay",
    "Gus",
    "Hal",
    "Ida",
    "Jon",
    "Kim",
    "Leo",
    "Mia",
    "Ned",
    "Pam",
    "Ray",
    "Sue",
    "Tom",
    "Una",
    "Zoe",
]
OBJECTS = ["pens", "cards", "coins", "books", "shells", "stamps", "apples", "marbles"]
LARGEST = 99


def make_problems(count: int, seed: int) -> Iterator[tuple[str, int, str]]:
    """`count` problems without repeats, as (question, answer, solution); a pure function of its arguments.

    Two seeds may give the same question: who needs disjoint sets excludes one set's questions from the other.
    """
    rng = random.Random(seed)
    seen: set[str] = set()
    while len(seen) < count:
        question, answer, solution = _one(rng)
        if question not in seen:
            seen.add(question)
            yield question, answer, solution


def _one(rng: random.Random) -> tuple[str, int, str]:
    operations = rng.randint(3, 5)
    names = rng.sample(NAMES, operations + 1)
    things = rng.choice(OBJECTS)
    value = rng.randint(2, 60)
    sentences = [f"{names[0]} has {value} {things}."]
    steps = [f" {names[0]}={value}"]
    for before, name in itertools.pairwise(names):
        sentence, expression, result = _operate(rng, value, before)
        sentences.append(f"{name} has {sentence}.")
        steps.append(f" {name}={expression}={result}")
        value = result
    question = " ".join(sentences) + f" How many {things} does {names[-1]} have?"
    # every name in a trace follows a space, so that it is the same token everywhere
    solution = "<think>\n" + "\n".join(steps) + f"\n</think>\nThe answer is \\boxed{{{value}}}."
    return question, value, solution


def _operate(rng: random.Random, value: int, before: str) -> tuple[str, str, int]:
    """One operation that stays within 1..LARGEST: (the sentence's end, the step's expression, its result)."""
    possible = [
        name
        for name, fits in (
            ("more", value + 2 <= LARGEST),
            ("fewer", value - 2 >= 2),
            ("times", 2 * value <= LARGEST),
            ("half", value % 2 == 0 and value >= 4),
        )
        if fits
    ]
    match rng.choice(possible):
        case "more":
            n = rng.randint(2, min(15, LARGEST - value))
            return f"{n} more than {before}", f"{value}+{n}", value + n
        case "fewer":
            n = rng.randint(2, min(15, value - 1))
            return f"{n} fewer than {before}", f"{value}-{n}", value - n
        case "times":
            n = rng.randint(2, min(5, LARGEST // value))
            return f"{n} times what {before} has", f"{value}*{n}", value * n
        case _:
            return f"half what {before} has", f"{value}/2", value // 2
