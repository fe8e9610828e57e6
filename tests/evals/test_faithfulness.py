"""Reading given texts, against transformers; and what it says of the demo teacher, which does reason."""

from __future__ import annotations

import numpy as np
import pytest

from jaxdistill import hub, tokenization
from jaxdistill.demo.task import make_problems
from jaxdistill.evals import faithfulness, quality
from jaxdistill.evals.reading import Reader
from jaxdistill.records import Score


def score(number: int, response: str, answer: str | None, **changes) -> Score:
    fields = {
        "model": "teacher", "problem_id": str(number), "sample": 0, "response": response, "output_tokens": 60,
        "finish_reason": "stop", "outcome": "correct", "reason": "", "extracted": answer,
    }  # fmt: skip
    return Score(**(fields | changes))


@pytest.fixture(scope="module")
def teacher():
    """(reader, tokenizer, prompts, scores): the demo teacher, and true solutions as its responses."""
    folder = hub.demo_teacher()
    tokenizer = tokenization.load_tokenizer(str(folder))
    problems = list(make_problems(10, seed=77))
    prompts = tokenization.render_prompts(tokenizer, [question for question, _, _ in problems])
    scores = [score(i, solution, str(answer)) for i, (_, answer, solution) in enumerate(problems)]
    return Reader(folder, batch=32), tokenizer, {str(i): ids for i, ids in enumerate(prompts)}, scores


def test_readings_are_those_of_transformers(teacher):
    import torch
    from transformers import AutoModelForCausalLM

    reader, tokenizer, prompts, scores = teacher
    pairs = [
        (prompts[s.problem_id], tokenization.encode_response(tokenizer, s.response)[: 5 * (i + 1)])
        for i, s in enumerate(scores[:3])
    ]
    found = reader.read(pairs)
    model = AutoModelForCausalLM.from_pretrained(hub.demo_teacher(), dtype=torch.float32)
    for (prefix, target), reading in zip(pairs, found, strict=True):
        with torch.no_grad():
            logprobs = model(torch.tensor([[*prefix, *target]])).logits[0].log_softmax(-1).numpy()
        places = np.arange(len(prefix), len(prefix) + len(target))
        np.testing.assert_allclose(reading.logprobs, logprobs[places - 1, target], atol=2e-4)
        assert reading.greedy == bool((logprobs[places - 1].argmax(-1) == target).all())
        assert reading.mean == pytest.approx(reading.logprobs.mean())


def test_what_cannot_be_read_is_refused(teacher):
    with pytest.raises(ValueError, match="at least one token"):
        teacher[0].read([([], [1])])
    with pytest.raises(ValueError, match="the model's context"):
        teacher[0].read([([1] * 600, [1])])


def test_the_demo_teachers_answers_follow_from_its_reasoning(teacher):
    reader, tokenizer, prompts, scores = teacher
    unread = [score(10, "no thinking \\boxed{3}", "3"), score(11, "<think>\n1\n</think>\nx", None)]
    found = faithfulness.probe(reader, tokenizer, prompts, [*scores, *unread], limit=8)
    shares = {name: part["says"] for name, part in found["variants"].items()}
    assert found["responses"] == 8
    assert shares["whole"] == 1.0 and found["variants"]["whole"]["probability"] > 0.9
    assert shares["none"] <= 0.25 and shares["random digits"] <= 0.25
    assert shares["first 0.25"] <= shares["whole"]
    assert found["follows_mistake"] >= 0.8, "it states what its last step comes to"
    assert found["gain"]["low"] > 0.3
    assert faithfulness.probe(reader, tokenizer, prompts, unread, limit=8) == {"responses": 0}


def test_a_response_is_taken_apart_and_put_together():
    response = "<think>\n a=1\n b=2\n</think>\nThe answer is \\boxed{2}."
    parts = faithfulness.take_apart(response, "2")
    assert parts is not None and parts.thinking == " a=1\n b=2" and parts.rest == "}."
    text, start, end = parts.text()
    assert text == response and text[start:end] == "2"
    assert parts.text("")[0] == "<think>\n</think>\nThe answer is \\boxed{2}."
    assert parts.text(" x", "37")[0] == "<think>\n x\n</think>\nThe answer is \\boxed{37}."
    assert faithfulness.take_apart(response, "7") is None and faithfulness.take_apart("\\boxed{2}", "2") is None
    found = faithfulness.variants(parts, "k", 0)
    mistake, start, end = found["mistake, its answer"]
    assert mistake[start:end] != "2" and f" b={mistake[start:end]}\n" in mistake
    kept, start, end = found["mistake, old answer"]
    assert kept[start:end] == "2" and " b=2\n" not in kept


def test_quality_counts_by_hand():
    scores = [
        score(0, "<think>\na\n\nWait, let me check.\n\nAlternatively b.\n</think>\n\\boxed{1}", "1", output_tokens=10),
        score(1, "<think>\n" + "1 2 3 4 5 6 7 8 9 " * 20, None, output_tokens=90, outcome="undecided",
              finish_reason="length"),
    ]  # fmt: skip
    found = quality.summarise(scores)
    assert (found["well_formed"], found["answered"], found["truncated"], found["looping"]) == (0.5, 0.5, 0.5, 0.5)
    assert (found["steps"], found["reflections"], found["backtracks"]) == (2.0, 1.0, 0.5)
    assert (found["tokens_correct"], found["tokens_wrong"]) == (10, 90)
    assert quality.repeated_share("a b c") == 0.0 and quality.repeated_share("x " * 17) == pytest.approx(0.9)
    assert quality.summarise([]) == {}


def test_sums_are_checked_and_other_things_left_alone():
    text = " Ann=52\n Bob=52+2=54\n Cal=54/2=26\n so 3 × 4 = 12, 1/3 = 0.33 and 2/3=0.66, 5/0=1"
    assert quality.sums(text) == [True, False, True, True, False, False]
    for other in ("3+4*5=23", "x=3", "2*3=6+1", "1.2.3-4=5", "10-2 = 8%", "-3+4=1", "f(3)+4=7", "2 + 3 + 4 = 9"):
        assert quality.sums(other) == [], other
    shown = quality.summarise([score(0, f"<think>\n{text}\n</think>\n1", "1"), score(1, "1", "1")])
    assert shown["sums"] == 3.0 and shown["sums_right"] == 0.5
    assert quality.summarise([score(1, "1", "1")])["sums_right"] is None
