"""What is graded: a tokenized trace, shown token by token."""

import pytest

from jaxdistill.data.examples import ANSWER, PROMPT, THINKING, response_text, tokenize
from jaxdistill.data.tokenizer import train_tokenizer
from jaxdistill.records import Problem, Trace, split_response
from jaxdistill.tokenization import decode_response, load_tokenizer, render_prompt

QUESTION = "Ann has 2 pens. Bob has 3 more than Ann. How many pens does Bob have?"
RESPONSE = "<think>\n Ann=2\n Bob=2+3=5\n</think>\nThe answer is \\boxed{5}."


def trace_of(response):
    thinking, content = split_response(response)
    return Trace(
        id="p/plain/0",
        problem_id="p",
        style="plain",
        sample=0,
        engine="import",
        teacher="t",
        revision="",
        temperature=1.0,
        top_p=1.0,
        max_tokens=9,
        seed=0,
        prompt_ids=[],
        output_ids=[],
        response=response,
        thinking=thinking,
        content=content,
        finish_reason="stop",
    )


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(folder, [QUESTION, RESPONSE], 300)
    return load_tokenizer(str(folder))


def example_of(tokenizer, text, response="reasoning"):
    problem = Problem(id="p", prompt=QUESTION, answer="5", domain="math", source="test")
    return tokenize(tokenizer, [(problem, trace_of(text))], response=response)[0]


def text_of(tokenizer, example, region):
    return tokenizer.decode(
        [t for t, r in zip(example.tokens, example.regions, strict=True) if r == region], skip_special_tokens=False
    )


def test_prompt_thinking_and_answer_are_told_apart(tokenizer):
    example = example_of(tokenizer, RESPONSE)
    assert text_of(tokenizer, example, PROMPT) == f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    assert text_of(tokenizer, example, THINKING) == RESPONSE[: RESPONSE.index("</think>") + len("</think>")]
    assert text_of(tokenizer, example, ANSWER) == "\nThe answer is \\boxed{5}.<|im_end|>"


def test_the_eos_is_trained_and_last(tokenizer):
    example = example_of(tokenizer, RESPONSE)
    assert (example.tokens[-1], example.regions[-1]) == (tokenizer.eos_token_id, ANSWER)


def test_prompt_and_response_are_tokenized_apart(tokenizer):
    example = example_of(tokenizer, RESPONSE)
    prompt = render_prompt(tokenizer, QUESTION)
    assert example.tokens[: len(prompt)] == prompt
    assert example.regions.count(PROMPT) == len(prompt)


def test_answer_only_keeps_the_content_behind_an_empty_thinking(tokenizer):
    example = example_of(tokenizer, RESPONSE, response="answer")
    assert (
        decode_response(tokenizer, example.tokens[example.regions.count(PROMPT) :])
        == "<think>\n</think>\nThe answer is \\boxed{5}."
    )


def test_a_tag_that_the_prompt_opened_is_put_back():
    assert response_text(trace_of("so 5\n</think>\n5"), "reasoning") == "<think>\nso 5\n</think>\n5"
    assert response_text(trace_of("no tags: 5"), "reasoning") == "no tags: 5"


def test_system_and_suffix_reach_the_prompt(tokenizer):
    prompt = tokenizer.decode(render_prompt(tokenizer, "Q", system="S", suffix=" box it"))
    assert prompt == "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ box it<|im_end|>\n<|im_start|>assistant\n"


def test_digits_are_single_tokens_and_text_round_trips(tokenizer):
    ids = tokenizer.encode("2057", add_special_tokens=False)
    assert len(ids) == 4
    text = "é 漢字\t<think> x </think>\n\n"
    assert decode_response(tokenizer, tokenizer.encode(text, add_special_tokens=False)) == text


def test_a_vocabulary_below_the_bytes_is_refused(tmp_path):
    with pytest.raises(ValueError, match="need 261"):
        train_tokenizer(tmp_path, ["x"], 200)
