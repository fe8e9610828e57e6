"""What is graded: a tokenized trace, in the shapes of well-known chat templates."""

import pytest

from jaxdistill.data import templates
from jaxdistill.data.examples import ANSWER, PROMPT, THINKING, Text, count_steps, tokenize
from jaxdistill.data.templates import Ending, check_template, response_text
from jaxdistill.data.tokenizer import train_tokenizer
from jaxdistill.records import split_response
from jaxdistill.tokenization import decode_response, end_of_turn, load_tokenizer, render_prompt
from tests.data.made import make_tokenizer

QUESTION = "Ann has 2 pens. Bob has 3 more than Ann. How many pens does Bob have?"
THOUGHT, CONTENT = "\n Ann=2\n Bob=2+3=5\n", "The answer is \\boxed{5}."
RESPONSE = f"<think>{THOUGHT}</think>\n{CONTENT}"
CHAT = [{"role": "user", "content": QUESTION}]
BARE = Ending("none", "")
THINKING_FAMILIES = ["qwen3", "strips", "llama3", "gemma", "r1_distill"]
ENDS = {"llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "r1_distill": "<|end|>"}


@pytest.fixture(scope="module")
def tokenizer_of(tmp_path_factory):
    """Tokenizers by family, made once."""
    made = {}

    def of(family, special_tags=False):
        if (family, special_tags) not in made:
            folder = tmp_path_factory.mktemp("tokenizers") / family
            make_tokenizer(folder, family, [QUESTION, RESPONSE], special_tags=special_tags)
            made[family, special_tags] = load_tokenizer(str(folder))
        return made[family, special_tags]

    return of


def end_of(tokenizer):
    return tokenizer.convert_ids_to_tokens(end_of_turn(tokenizer))


def example_of(tokenizer, response, wanted="reasoning", **prompting):
    ending = check_template(tokenizer, wanted, prompting.get("system"), prompting.get("suffix", ""))
    text = Text("p/plain/0", QUESTION, response, split_response(response)[1])
    return tokenize(tokenizer, [text], response=wanted, ending=ending, **prompting)[0]


def text_of(tokenizer, example, *regions):
    ids = [t for t, r in zip(example.tokens, example.regions, strict=True) if r in regions]
    return tokenizer.decode(ids, skip_special_tokens=False)


# ------------------------------------------------------------------------------- the same for every template


@pytest.mark.parametrize("special_tags", [False, True])
@pytest.mark.parametrize("family", THINKING_FAMILIES)
def test_prompt_and_response_are_what_the_student_meets(tokenizer_of, family, special_tags):
    tokenizer = tokenizer_of(family, special_tags)
    example = example_of(tokenizer, RESPONSE)
    prompt = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert example.tokens[: len(prompt)] == prompt
    assert example.regions == [PROMPT] * len(prompt) + [THINKING] * example.regions.count(THINKING) + [
        ANSWER
    ] * example.regions.count(ANSWER)
    # read as evaluation reads what a student has written behind this prompt
    written = decode_response(tokenizer, example.tokens[len(prompt) :])
    assert split_response(written) == (THOUGHT.strip("\n"), CONTENT)
    # and together they hold the trace, tags and all, once
    assert text_of(tokenizer, example, PROMPT, THINKING, ANSWER).endswith(RESPONSE + end_of(tokenizer))
    assert text_of(tokenizer, example, PROMPT, THINKING).count("<think>") == 1
    assert text_of(tokenizer, example, THINKING).endswith("</think>")


@pytest.mark.parametrize("family", THINKING_FAMILIES)
def test_the_turns_end_is_trained_and_last_and_stands_nowhere_else_in_the_response(tokenizer_of, family):
    """The end that the template writes, which for Gemma is not the tokenizer's eos."""
    tokenizer = tokenizer_of(family)
    example = example_of(tokenizer, RESPONSE)
    end = end_of_turn(tokenizer)
    assert tokenizer.convert_ids_to_tokens(end) == ENDS.get(family, "<|im_end|>")
    assert (example.tokens[-1], example.regions[-1]) == (end, ANSWER)
    trained = [t for t, r in zip(example.tokens, example.regions, strict=True) if r != PROMPT]
    assert trained.count(end) == 1
    assert not example.ends_early


@pytest.mark.parametrize("family", ["strips", "r1_distill"])
def test_these_templates_would_have_lost_the_thinking(tokenizer_of, family):
    chat = [*CHAT, {"role": "assistant", "content": RESPONSE}]
    assert "Bob=2+3" not in tokenizer_of(family).apply_chat_template(chat, tokenize=False)


@pytest.mark.parametrize("family", THINKING_FAMILIES)
@pytest.mark.parametrize(
    ("response", "thinking", "content"),
    [
        (f"{THOUGHT}</think>\n{CONTENT}", THOUGHT.strip("\n"), CONTENT),  # the teacher's prompt had opened it
        (f"<think>{THOUGHT[1:]}</think>\n\n{CONTENT}", THOUGHT.strip("\n"), CONTENT),
        (f"\n\n<think>\n{THOUGHT}</think>{CONTENT}", THOUGHT.strip("\n"), CONTENT),
        (CONTENT, None, CONTENT),
    ],
)
def test_whatever_the_teachers_tags_looked_like(tokenizer_of, family, response, thinking, content):
    tokenizer = tokenizer_of(family)
    example = example_of(tokenizer, response)
    written = decode_response(tokenizer, example.tokens[example.regions.count(PROMPT) :])
    if thinking is None and family == "r1_distill":
        thinking = ""  # the template opens it in any case, so it is closed at once
    assert split_response(written) == (thinking, content)
    whole = text_of(tokenizer, example, PROMPT, THINKING, ANSWER)
    assert whole.count("<think>") == whole.count("</think>") == (thinking is not None)


@pytest.mark.parametrize("family", THINKING_FAMILIES)
def test_answer_only_is_the_answer_behind_an_empty_thinking(tokenizer_of, family):
    tokenizer = tokenizer_of(family)
    example = example_of(tokenizer, RESPONSE, "answer")
    whole = text_of(tokenizer, example, PROMPT, THINKING, ANSWER)
    assert whole.endswith(f"<think>\n</think>\n{CONTENT}{end_of(tokenizer)}")
    assert whole.count("<think>") == 1


# ---------------------------------------------------------------------------------------- and of some of them


def test_a_template_that_closes_the_thinking_can_teach_answers_alone(tokenizer_of):
    tokenizer = tokenizer_of("no_thinking")
    example = example_of(tokenizer, RESPONSE, "answer")
    assert text_of(tokenizer, example, PROMPT, ANSWER).endswith(f"</think>\n\n{CONTENT}<|im_end|>")
    assert THINKING not in example.regions
    with pytest.raises(ValueError, match=r"closes the thinking .* set data\.chat_template"):
        example_of(tokenizer, RESPONSE)


def test_a_template_without_a_system_role_says_so_in_one_line(tokenizer_of):
    with pytest.raises(
        ValueError, match=r"a system turn is not supported.* leave the system prompt out \(data\.system"
    ):
        example_of(tokenizer_of("gemma"), RESPONSE, system="Be brief.")


def test_a_tokenizer_without_a_template_is_refused_and_a_built_in_one_helps(tmp_path):
    folder = make_tokenizer(tmp_path / "base", "base", [QUESTION, RESPONSE])
    with pytest.raises(ValueError, match="no chat template"):
        load_tokenizer(str(folder))
    (folder / "chat_template.jinja").write_text(templates.template_text("plain"))
    tokenizer = load_tokenizer(str(folder))
    example = example_of(tokenizer, RESPONSE)
    assert text_of(tokenizer, example, PROMPT) == f"User: {QUESTION}\nAssistant:\n"
    assert text_of(tokenizer, example, THINKING, ANSWER) == f"{RESPONSE}<|endoftext|>"
    with pytest.raises(ValueError, match="vicuna is no file; built in are plain, chatml"):
        templates.template_text("vicuna")


def test_system_and_suffix_reach_the_prompt(tokenizer_of):
    tokenizer = tokenizer_of("qwen3")
    prompt = tokenizer.decode(render_prompt(tokenizer, "Q", system="S", suffix=" box it"))
    assert prompt == "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ box it<|im_end|>\n<|im_start|>assistant\n"


def test_thinking_and_answer_part_behind_the_closing_tag(tokenizer_of):
    example = example_of(tokenizer_of("qwen3"), RESPONSE)
    assert text_of(tokenizer_of("qwen3"), example, THINKING) == f"<think>{THOUGHT}</think>"
    assert text_of(tokenizer_of("qwen3"), example, ANSWER) == f"\n{CONTENT}<|im_end|>"


def test_an_empty_response_is_refused(tokenizer_of):
    with pytest.raises(ValueError, match="p/plain/0: the response is empty"):
        example_of(tokenizer_of("qwen3"), " \n")
    with pytest.raises(ValueError, match="p/plain/0: the answer is empty"):
        example_of(tokenizer_of("qwen3"), "<think>\nso\n</think>\n", "answer")


def test_a_tag_that_the_prompt_opened_is_put_back():
    assert response_text("so 5\n</think>\n5", "5", "reasoning", BARE) == "<think>\nso 5\n</think>\n5"
    assert response_text("no tags: 5", "no tags: 5", "reasoning", BARE) == "no tags: 5"


def test_steps_are_lines_with_something_on_them():
    assert count_steps("<think>\na\n\n b\n</think>\nthe\nanswer", "the\nanswer") == 2
    assert count_steps("a\nb\n\nc", "a\nb\n\nc") == 3


# ---------------------------------------------------------------------------------------- our own tokenizer


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    train_tokenizer(folder, [QUESTION, RESPONSE], 300)
    return load_tokenizer(str(folder))


def test_digits_are_single_tokens_and_text_round_trips(own):
    ids = own.encode("2057", add_special_tokens=False)
    assert len(ids) == 4
    text = "é 漢字\t<think> x </think>\n\n"
    assert decode_response(own, own.encode(text, add_special_tokens=False)) == text


def test_a_vocabulary_below_the_bytes_is_refused(tmp_path):
    with pytest.raises(ValueError, match="need 261"):
        train_tokenizer(tmp_path, ["x"], 200)
