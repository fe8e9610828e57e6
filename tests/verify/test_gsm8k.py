"""All of GSM8K: every solution verifies against its own answer, and against no answer that is one digit off."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

from jaxdistill.verify import check_math

DATA = Path(os.environ.get("JAXDISTILL_DATA") or Path(__file__).parents[2].parent / "shared" / "data") / "gsm8k"
FILES = [DATA / "train.jsonl", DATA / "test.jsonl"]

pytestmark = pytest.mark.skipif(
    not all(file.is_file() for file in FILES),
    reason=f"no GSM8K at {DATA}; name the folder that holds gsm8k/train.jsonl and test.jsonl with JAXDISTILL_DATA",
)


def one_digit_off(answer: str, rng: random.Random) -> str:
    places = [i for i, character in enumerate(answer) if character.isdigit()]
    place = rng.choice(places)
    # a first digit does not become 0, so that the number is still written as people write it
    digits = [d for d in "0123456789" if d != answer[place] and not (d == "0" and place == places[0])]
    return answer[:place] + rng.choice(digits) + answer[place + 1 :]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_solution_is_right_and_one_digit_makes_it_wrong(file):
    rng = random.Random(0)
    solutions = [json.loads(line)["answer"] for line in file.read_text().splitlines()]
    assert len(solutions) > 1000
    for solution in solutions:
        gold = solution.rpartition("####")[2].strip()
        assert check_math(solution, gold).outcome == "correct", solution
        assert check_math(solution, one_digit_off(gold, rng)).outcome == "incorrect", solution
