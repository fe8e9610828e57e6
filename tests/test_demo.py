"""The demo task, and the teacher that ships with the package."""

import re

import pytest

from jaxdistill import hub
from jaxdistill.demo.task import LARGEST, make_problems
from jaxdistill.generate import decode
from jaxdistill.models import load_hf
from jaxdistill.tokenization import decode_response, encode_response, load_tokenizer, render_prompts
from jaxdistill.verify import check_math


def test_problems_are_a_pure_function_of_the_seed_without_repeats():
    first = list(make_problems(300, 7))
    assert first == list(make_problems(300, 7))
    assert first != list(make_problems(300, 8))
    assert len({question for question, _, _ in first}) == 300


@pytest.mark.parametrize("seed", range(3))
def test_every_step_of_a_solution_is_right_and_leads_to_the_answer(seed):
    for question, answer, solution in make_problems(300, seed):
        values = {}
        steps = re.findall(r"^ (\w+)=(?:(\d+)([-+*/])(\d+)=)?(\d+)$", solution, re.M)
        for name, left, sign, right, result in steps:
            if sign:
                a, b = int(left), int(right)
                assert a in values.values()
                assert int(result) == {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[sign]
                assert sign != "/" or a % b == 0
            values[name] = int(result)
            assert 1 <= int(result) <= LARGEST
        assert 4 <= len(steps) <= 6
        assert list(values.values())[-1] == answer
        assert f"does {list(values)[-1]} have?" in question
        assert check_math(solution, str(answer)).outcome == "correct"


def test_the_tokenizer_takes_the_task_as_it_is():
    """One token a digit, names the same everywhere, tags of their own, and text that comes back."""
    tokenizer = load_tokenizer("demo")
    _, _, solution = next(make_problems(1, 0))
    ids = encode_response(tokenizer, solution)
    assert decode_response(tokenizer, ids) == solution
    assert len(tokenizer.encode("<think>", add_special_tokens=False)) == 1
    assert len(tokenizer.encode("=57", add_special_tokens=False)) == 3
    name = re.search(r"\n (\w+)=", solution).group(1)
    token = tokenizer.encode(f" {name}", add_special_tokens=False)
    assert len(token) == 1
    assert token[0] in ids


def test_the_shipped_teacher_still_solves_the_held_out_problems():
    held_out = list(make_problems(512, 999))[:256]
    tokenizer = load_tokenizer("demo")
    prompts = render_prompts(tokenizer, [question for question, _, _ in held_out])
    model = load_hf("demo")
    right = sum(
        check_math(decode_response(tokenizer, ids), str(held_out[i][1])).outcome == "correct"
        for i, ids, _ in decode(
            model, prompts, [0] * 256, max_tokens=96, temperature=0.0, stop_ids=[tokenizer.eos_token_id], batch=256
        )
    )
    assert right / 256 >= 0.97


def test_the_shipped_teacher_is_small():
    assert sum(f.stat().st_size for f in hub.demo_teacher().iterdir()) < 5_000_000
