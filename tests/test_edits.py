"""Edits of reasoning: what each changes, and that nothing else does."""

from __future__ import annotations

import random
import re

import pytest

from jaxdistill import edits
from jaxdistill.demo.task import make_problems
from jaxdistill.records import split_response

RESPONSES = [solution for _, _, solution in make_problems(40, seed=3)]
LONG = "<think>\nx=1.\n\nWait, let me check 1.\nSo 1.\n\nAlternatively, 3+4=7.\n\nBut no.\n</think>\nIt is \\boxed{7}."


def changed(kind, response, *, rate=1.0, keep_length=True, donors=(" Xan=1",), key="a", seed=0):
    return edits.apply(response, kind, key=key, rate=rate, keep_length=keep_length, donors=donors, seed=seed)


@pytest.mark.parametrize("kind", [k for k in edits.EDITS if k != "wrong_answer"])
@pytest.mark.parametrize("keep_length", [True, False])
def test_only_the_thinking_changes(kind, keep_length):
    for response in [*RESPONSES, LONG]:
        found = changed(kind, response, rate=0.5, keep_length=keep_length)
        assert found.rpartition("</think>")[2] == response.rpartition("</think>")[2]
        assert found.startswith("<think>\n") and found.count("<think>") == found.count("</think>") == 1
        assert "\n</think>" in found
    assert any(changed(kind, r, rate=0.5, keep_length=keep_length) != r for r in [*RESPONSES, LONG])
    for plain in ("no tags", "<think>\n</think>\nx", "<think> never closed"):
        assert changed(kind, plain) == plain


@pytest.mark.parametrize("kind", edits.EDITS)
def test_equal_arguments_give_equal_edits_and_others_differ(kind):
    first = [changed(kind, LONG, rate=0.5, key=str(i)) for i in range(30)]
    assert first == [changed(kind, LONG, rate=0.5, key=str(i)) for i in range(30)]
    assert len(set(first)) > 1, "traces are edited each in its own way"


def test_random_digits_at_a_rate():
    text = "<think>\n" + "0123456789 " * 400 + "\n</think>\nx"
    for rate in (0.2, 0.5, 1.0):
        found = changed("random_digits", text, rate=rate)
        assert len(found) == len(text) and re.sub(r"\d", "", found) == re.sub(r"\d", "", text)
        differ = sum(a != b for a, b in zip(found, text, strict=True)) / 4000
        assert differ == pytest.approx(0.9 * rate, abs=0.03), "one of ten draws is the digit that stood there"


def test_shuffled_steps_are_the_same_steps_in_another_order():
    for number, response in enumerate(RESPONSES):
        found = changed("shuffled_steps", response, key=str(number))
        assert found != response and sorted(found.split("\n")) == sorted(response.split("\n"))
    one = "<think>\n only\n</think>\nx"
    assert changed("shuffled_steps", one) == one
    same = "<think>\n a\n a\n</think>\nx"
    assert changed("shuffled_steps", same) == same


def test_deleted_steps():
    for response in RESPONSES:
        steps = split_response(response)[0].split("\n")
        left = split_response(changed("deleted_steps", response, rate=0.5, keep_length=False))[0].split("\n")
        assert len(left) == len(steps) - round(len(steps) / 2) and [s for s in steps if s in left] == left
        filled = changed("deleted_steps", response, rate=0.5)
        assert len(filled) == len(response)
        kept = split_response(filled)[0].split("\n")
        assert sum(set(step.strip()) == {"."} for step in kept) == round(len(steps) / 2)


def test_inserted_steps_are_others():
    for response in RESPONSES:
        steps = split_response(response)[0].split("\n")
        found = split_response(changed("inserted_steps", response, rate=0.5))[0].split("\n")
        assert len(found) == len(steps) and found.count(" Xan=1") == round(len(steps) / 2)
        longer = split_response(changed("inserted_steps", response, rate=0.5, keep_length=False))[0].split("\n")
        assert [s for s in longer if s != " Xan=1"] == steps and len(longer) == len(steps) + round(len(steps) / 2)
    assert changed("inserted_steps", RESPONSES[0], donors=()) == RESPONSES[0]


def test_keywords_are_removed_and_paragraphs_are_steps():
    found = changed("without_keywords", LONG)
    assert "Wait" not in found and "Alternatively" not in found and "But" not in found and "let me check" not in found
    assert "3+4=7." in found and "x=1." in found
    assert edits.count_steps(split_response(LONG)[0]) == 4
    assert "Butter" in changed("without_keywords", LONG.replace("But", "Butter")), "whole words alone"


def test_a_wrong_answer_is_stated_by_reasoning_and_solution():
    for number, response in enumerate(RESPONSES):
        found = changed("wrong_answer", response, key=str(number))
        right, wrong = (re.search(r"boxed\{(\d+)\}", r)[1] for r in (response, found))
        assert wrong != right and len(wrong) == len(right)
        before, after = (split_response(r)[0].split("\n") for r in (response, found))
        assert before[:-1] == after[:-1], "all but the last step stays"
        assert after[-1].endswith(f"={wrong}")
    assert changed("wrong_answer", "<think>\n1\n</think>\nyes") == "<think>\n1\n</think>\nyes"
    digits = {edits.wrong_answer("<think>\n a=5\n</think>\n5", random.Random(i))[-1] for i in range(200)}
    assert digits == set("012346789")


def test_an_unknown_edit_is_refused():
    with pytest.raises(ValueError, match="known are random_digits"):
        changed("reversed", LONG)
