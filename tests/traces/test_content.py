"""What answers say: content in every form, thoughts wherever they stand, and why an answer is left out."""

import contextlib
import json

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxdistill.config import ProblemsConfig
from jaxdistill.traces import imports, tables, values
from jaxdistill.traces.problems import load_problems
from tests.traces.brought import responses

QUESTION = {"role": "user", "content": "2+2?"}
BOXED = "\\boxed{4}"
TAGGED = f"<think>\ntwo and two\n</think>\n{BOXED}"
HARMONY = "<|end|><|start|>assistant<|channel|>final<|message|>"
BOTH = ("two and two", BOXED)


def said(tmp_path, *turns, **options):
    """What is read of one chat: (thinking, content), or the reason why not."""
    rows = [{"messages": [QUESTION, *turns]}, {"messages": [{"role": "user", "content": "?"}, answer("!")]}]
    found, reasons = responses(tmp_path, "messages", rows, **options)
    assert found[-1] == (None, "!")
    assert len(found) + len(reasons) == 2
    return found[0] if not reasons else reasons[0]


def answer(content, **more):
    return {"role": "assistant", "content": content, **more}


def text(value):
    return {"type": "text", "text": value}


@pytest.mark.parametrize(
    "turn",
    [
        answer(TAGGED),
        answer([text(TAGGED)]),
        answer([text("<think>\ntwo and two\n"), text(f"</think>\n{BOXED}")]),
        answer([{"type": "text", "text": TAGGED, "image_url": None}, None]),
        answer({"type": ["text", "text"], "text": ["<think>two and two</think>", BOXED]}),  # as `datasets` writes it
        answer({"type": ["thinking", "text"], "thinking": ["two and two", None], "text": [None, BOXED]}),
        answer(["<think>\ntwo and two\n</think>\n", BOXED]),
        answer({"content_type": "text", "parts": [TAGGED]}),
        answer(json.dumps([text(TAGGED)])),
        answer([{"type": "output_text", "text": TAGGED, "annotations": []}]),
        answer([{"type": "text", "text": {"value": TAGGED, "annotations": []}}]),
        # thinking in a part of its own
        answer([{"type": "thinking", "thinking": "two and two", "signature": "s"}, text(BOXED)]),
        answer([{"type": "reasoning", "text": "two and two"}, text(BOXED)]),
        answer([{"type": "reasoning", "summary": [{"type": "summary_text", "text": "two and two"}]}, text(BOXED)]),
        answer([{"type": "thinking", "thinking": [text("two and two")], "closed": True}, text(BOXED)]),  # Mistral's
        answer(json.dumps([{"text": TAGGED, "type": "text"}])),  # keys in the order of the alphabet
        # and in a field, with tags around it or without
        answer(BOXED, reasoning_content="<think>\ntwo and two\n</think>"),
        answer(BOXED, reasoning_content="two and two\n</think>\n"),
        answer(BOXED, reasoning_content="<think>\ntwo and two"),
        answer(BOXED, reasoning="<reasoning>two and two</reasoning>"),
        answer(TAGGED, reasoning_content="<think>two and two</think>"),
        answer([{"type": "thinking", "thinking": "<think>two and two</think>"}, text(BOXED)]),
        answer(BOXED, reasoning_content="two and two"),
        answer(BOXED, thinking="two and two", reasoning=None),
        answer(BOXED, reasoning=["two and two"]),
        answer(BOXED, reasoning=[{"type": "reasoning.text", "text": "two and two"}]),
        answer(BOXED, reasoning={"content": "two and two"}),
        answer(BOXED, reasoning_details=[{"type": "reasoning.text", "text": "two and two", "signature": None}]),
        answer(BOXED, reasoning_details='[{"type": "reasoning.text", "text": "two and two"}]'),
        answer(
            BOXED, reasoning_details=[{"type": "reasoning.text", "text": t, "index": 0} for t in ("two ", "and two")]
        ),
        answer(
            BOXED, reasoning=[{"type": "reasoning.summary", "summary": "two and two"}, {"type": "reasoning.encrypted"}]
        ),
        answer(BOXED, thinking_blocks=[{"type": "thinking", "thinking": "two and two", "signature": "s"}]),
        # twice the same is once
        answer(TAGGED, reasoning_content="two and two"),
        answer(TAGGED, reasoning_content="\n two  and two"),
        answer(f"two and two\n</think>\n{BOXED}", reasoning_content="two and two"),
        answer(f"<think>\n\n</think>\n\n{BOXED}", reasoning_content="two and two"),
        answer(f"<|begin_of_thought|>two and two<|end_of_thought|>{BOXED}", reasoning_content="two and two"),
        answer(TAGGED, reasoning_content="two"),  # a shorter one that the longer holds
        answer(BOXED, reasoning="two and two", reasoning_details=[{"type": "reasoning.text", "text": "two and two"}]),
        answer([{"type": "thinking", "thinking": "two and two"}, text(BOXED)], reasoning_content="two and two"),
        # settings are no thoughts
        answer(TAGGED, thinking=True, reasoning="high"),
        answer(TAGGED, reasoning={"effort": "high"}, thinking={"type": "enabled", "budget_tokens": 1024}),
        answer(TAGGED, tool_calls=[], function_call=None),
        answer(TAGGED, tool_calls={"id": [], "function": []}),
        # tags of other teachers
        answer(f"<|begin_of_thought|>\n\ntwo and two\n\n<|end_of_thought|>\n\n{BOXED}"),
        answer(f"<thinking>two and two</thinking>{BOXED}"),
        answer(f"[THINK]two and two[/THINK]{BOXED}"),
        answer(f"<|START_THINKING|>two and two<|END_THINKING|><|START_RESPONSE|>{BOXED}<|END_RESPONSE|>"),
        answer(f"<|channel|>analysis<|message|>two and two{HARMONY}{BOXED}<|return|>"),
        # tokens that ended the turn
        answer(TAGGED + "<|im_end|>\n<|endoftext|>"),
        answer(TAGGED + "<｜end▁of▁sentence｜>"),
    ],
    ids=lambda turn: json.dumps(turn)[20:90],
)
def test_thoughts_and_answer_are_found(tmp_path, turn):
    assert said(tmp_path, turn) == BOTH


def test_thoughts_in_a_turn_before_the_answers_are_its_thoughts(tmp_path):
    """A turn of tags alone is no answer where the same speaker goes on; as the last turn it was cut off."""
    thoughts = answer("<think>\ntwo and two\n</think>")
    assert said(tmp_path, thoughts, answer(BOXED)) == BOTH
    assert said(tmp_path, thoughts) == ("two and two", "")
    assert said(tmp_path, answer(TAGGED), answer("And more.")) == BOTH


def test_json_in_a_text_that_is_no_list_of_parts_is_text(tmp_path):
    assert said(tmp_path, answer('[{"type": "cat"}]')) == (None, '[{"type": "cat"}]')
    assert said(tmp_path, answer('[{"text": "4"}]')) == (None, '[{"text": "4"}]')


def test_generations_as_a_struct_of_lists(tmp_path):
    row = {"problem": "2+2?", "generations": {"text": [TAGGED, "4"], "score": [0.5, 0.25]}}
    assert responses(tmp_path, "r1", [row]) == ([BOTH, (None, "4")], [])


@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        (answer(BOXED, thinking=True), (None, BOXED)),
        (answer(BOXED, reasoning="off"), (None, BOXED)),
        (answer(BOXED, reasoning=[]), (None, BOXED)),
        (answer(42), (None, "42")),
        (answer(BOXED, reasoning=["first", "second"]), ("first\n\nsecond", BOXED)),
        (answer("A tag is <think>.", reasoning_content="tags"), ("tags", "A tag is <think>.")),
        (answer("No [1] list."), (None, "No [1] list.")),
        (answer('[{"type" is not JSON'), (None, '[{"type" is not JSON')),
        # tags of solutions are no part of the answer, but words elsewhere
        (answer("<|begin_of_solution|>\n4\n<|end_of_solution|>"), (None, "4")),
        (answer("<think>\nt\n</think>\n<|begin_of_solution|>\n4"), ("t", "4")),
        (answer("<think>\na <|begin_of_solution|> b\n</think>\n4"), ("a <|begin_of_solution|> b", "4")),
        (answer("The tag is <|begin_of_solution|>."), (None, "The tag is <|begin_of_solution|>.")),
        (answer("A turn ends in <|im_end|>."), (None, "A turn ends in <|im_end|>.")),
        (answer("It was <thought> first.</thought>"), (None, "It was <thought> first.</thought>")),
        (answer("<answer>4</answer>"), (None, "<answer>4</answer>")),  # a form that people ask for
    ],
)
def test_what_looks_like_thoughts_or_tags_and_is_none(tmp_path, turn, expected):
    assert said(tmp_path, turn) == expected


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        (answer(None), "the response is null or empty"),
        (answer(""), "the response is null or empty"),
        (answer([]), "the response is null or empty"),
        (answer(None, reasoning_content="cut off"), "the response is null or empty"),
        ({"role": "assistant"}, "the response is null or empty"),
        (answer({"a": 1}), "a part of the response has no text"),
        (answer([{"type": ["text"], "text": "a"}]), "a part of the response has a type that is a list"),
        (answer({"type": ["text"], "text": ["a", "b"]}), "the lists in a struct of lists are not equally long"),
        (answer(True), "the response is a boolean, not text"),
        (answer([text("a"), {"type": "image_url", "image_url": {"url": "x"}}]), "of type 'image_url', not text"),
        (answer([{"type": "refusal", "refusal": "no"}]), "a part of the response is of type 'refusal', not text"),
        (answer([text("a"), {"type": "thinking", "thinking": "b"}]), "thoughts go on behind text of the response"),
        (answer([{"type": "redacted_thinking", "data": "x"}, text("a")]), "its thoughts are hidden"),
        (answer("a", reasoning_details=[{"type": "reasoning.encrypted", "data": "x"}]), "its thoughts are hidden"),
        (answer("a", thinking_blocks=[{"type": "thinking", "thinking": "", "signature": "x"}]), "thoughts are hidden"),
        (
            answer(TAGGED, reasoning_content="three and one"),
            "its thoughts stand in a field, and other ones between tags",
        ),
        (answer("a", reasoning="b", reasoning_content="c"), "two fields of the response hold different thoughts"),
        (answer(None, tool_calls=[{"id": "1", "function": {"name": "f"}}]), "the response calls a tool"),
        (answer("Let me see.", tool_calls=[{"id": "1"}]), "the response calls a tool"),
        (answer(None, function_call={"name": "f", "arguments": "{}"}), "the response calls a tool"),
        (answer([{"type": "tool_use", "name": "f"}]), "the response calls a tool"),
        (answer('<tool_call>{"name": "f"}</tool_call>'), "the response calls a tool"),
        (answer("half of an emoji: \ud83d"), "half of a character (a lone surrogate)"),
        (answer("a", reasoning="\ude00"), "half of a character (a lone surrogate)"),
        (None, "a turn before the response is null"),
        ({"role": None, "content": None}, "a turn before the response is null"),
        ("4", "a turn is not an object"),
        ({"role": "referee", "content": "x"}, "a turn by 'referee'"),
    ],
)
def test_an_answer_that_cannot_be_read_is_counted_with_its_reason(tmp_path, turn, reason):
    assert reason in said(tmp_path, turn)


def test_the_first_question_and_its_answer_are_taken_whatever_comes_behind(tmp_path):
    behind = [
        [{"role": "tool", "content": "stored"}, answer("Stored.")],
        [{"role": "user", "content": None}, None, {"role": "referee"}, 7],
        [{"role": "user", "content": [{"type": "image"}]}, answer(None, tool_calls=[{"id": "1"}])],
    ]
    for turns in behind:
        assert said(tmp_path, answer(TAGGED), *turns) == BOTH


def test_turns_before_the_answer(tmp_path):
    system = {"role": "developer", "content": [{"type": "image"}]}
    assert said(tmp_path, system, answer(TAGGED)) == BOTH
    assert said(tmp_path, {"role": "reasoning", "content": "two and two"}, answer(BOXED)) == BOTH
    harmony = {"role": "assistant", "channel": "analysis", "content": "two and two"}
    assert said(tmp_path, harmony, {"role": "assistant", "channel": "final", "content": BOXED}) == BOTH
    assert said(tmp_path, answer(None, reasoning_content="two and two"), answer(BOXED)) == BOTH
    assert said(tmp_path, {"role": "tool", "content": "x"}, answer(BOXED)) == "the response calls a tool"
    assert said(tmp_path, {"role": "function_call", "content": "x"}, answer(BOXED)) == "the response calls a tool"
    assert said(tmp_path, QUESTION, answer(BOXED)) == "two questions, and no response between them"


@pytest.mark.parametrize("role", ["User", "HUMAN ", "prompter"])
def test_speakers_go_by_many_names(tmp_path, role):
    rows = [{"conversations": [{"from": role, "value": "2+2?"}, {"role": None, "from": "GPT", "value": TAGGED}]}]
    assert responses(tmp_path, "sharegpt", rows) == ([BOTH], [])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "the question is null or empty"),
        (" \n", "the question is null or empty"),
        ([{"type": "image"}, text("What is it?")], "a part of the question is of type 'image', not text"),
        ([{"type": "input_audio", "input_audio": {}}], "a part of the question is of type 'input_audio', not text"),
        ([{"type": "tool_result", "content": "x"}], "a part of the question is of type 'tool_result'"),
        ({"x": 1}, "a part of the question has no text"),
    ],
)
def test_a_question_that_is_more_than_text(tmp_path, content, reason):
    rows = [{"messages": [{"role": "user", "content": content}, answer("a")]}, {"messages": [QUESTION, answer("a")]}]
    assert responses(tmp_path, "messages", rows) == ([(None, "a")], [reason])


def test_a_question_in_parts(tmp_path):
    rows = [{"messages": [{"role": "user", "content": [text("2+2"), text("?")]}, answer("4")]}]
    assert responses(tmp_path, "messages", rows) == ([(None, "4")], [])


def test_tags_that_the_config_names_count_in_both_places(tmp_path):
    tags = {"think_tags": ["<t>", "</t>"]}
    assert said(tmp_path, answer(f"<t>two and two</t>{BOXED}"), traces=tags) == BOTH
    assert said(tmp_path, answer(f"<t>two and two</t>{BOXED}", reasoning="two and two"), traces=tags) == BOTH
    assert said(tmp_path, answer(TAGGED), traces=tags) == BOTH  # a set that is written otherwise


def test_generations_with_holes_keep_their_numbers(tmp_path):
    generations = [None, TAGGED, "", answer(BOXED, reasoning="two and two"), [answer(TAGGED)], "\ud800", 4]
    rows = [{"problem": "2+2?", "generations": generations}]
    found, reasons = responses(tmp_path, "r1", rows)
    assert found == [BOTH, BOTH, BOTH, (None, "4")]
    assert sorted(reasons) == ["half of a character (a lone surrogate)", "the response is null or empty"]


@pytest.mark.parametrize("generations", [None, [], [None], ["", None]])
def test_a_row_without_any_response_is_left_out(tmp_path, generations):
    rows = [{"problem": "1?", "generations": generations}, {"problem": "2?", "generations": ["x"]}]
    found, reasons = responses(tmp_path, "r1", rows)
    assert found == [(None, "x")]
    assert len(reasons) == 1


def test_prompt_completion_as_text_and_as_turns(tmp_path):
    rows = [
        {"prompt": "2+2?", "completion": TAGGED},
        {"prompt": "2+2?", "completion": BOXED, "reasoning_content": "two and two", "reasoning": "on"},
        {"prompt": [QUESTION], "completion": [answer(TAGGED)]},
        {"prompt": "2+2?", "completion": [answer(TAGGED)]},
        {"prompt": [QUESTION], "completion": TAGGED},
    ]
    assert responses(tmp_path, "prompt_completion", rows) == ([BOTH] * 5, [])


def test_a_chat_as_json_in_a_text_and_as_a_struct_of_lists(tmp_path):
    turns = [QUESTION, answer(TAGGED)]
    lists = {"role": ["user", "assistant"], "content": ["2+2?", TAGGED], "name": None}
    rows = [{"messages": json.dumps(turns)}, {"messages": lists}, {"messages": json.dumps(lists)}]
    assert responses(tmp_path, "messages", rows) == ([BOTH] * 3, [])
    uneven = {"role": ["user"], "content": ["2+2?", TAGGED]}
    found, reasons = responses(tmp_path, "messages", [rows[0], {"messages": uneven}, {"messages": {"role": "user"}}])
    assert found == [BOTH]
    assert len(reasons) == 2


KEYS = [
    "messages",
    "conversations",
    "problem",
    "generations",
    "prompt",
    "completion",
    "answer",
    "role",
    "content",
    "from",
]
KEYS += [
    "value",
    "type",
    "text",
    "thinking",
    "reasoning",
    "reasoning_details",
    "tool_calls",
    "summary",
    "parts",
    "index",
]
WORDS = [
    "user",
    "assistant",
    "system",
    "tool",
    "human",
    "gpt",
    "thinking",
    "",
    "[{",
    '[{"type": "text"}]',
    "<think>",
    "\ud83d",
]
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(WORDS + KEYS) | st.binary(max_size=3)
)
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=6),
    max_leaves=25,
)


@pytest.mark.parametrize("source", imports.FORMATS)
@given(row=st.dictionaries(st.sampled_from(KEYS), ANYTHING, max_size=6))
@settings(max_examples=60, deadline=None)
def test_no_row_whatever_it_holds_does_more_than_be_left_out(source, row):
    config = ProblemsConfig(source=source, path="x")
    file = tables.DataFile("x", "x", "x", lambda: None)
    problem, reason = None, None
    try:
        problem, _, _ = imports.problem_of(tables.Row(file, 1, row), config)
    except values.BadRow as bad:
        reason = bad.reason
    if problem is None:
        assert reason and "\n" not in reason
        assert not reason.startswith("a shape that is not known")
    else:
        assert problem.prompt.strip()
        pa.table({"text": [problem.prompt, problem.answer, problem.domain]})  # can be written


@pytest.mark.parametrize("source", [*imports.FORMATS, "jsonl", "gsm8k", "humaneval", "mbpp", "apps", "livecodebench"])
@given(rows=st.lists(ANYTHING, min_size=1, max_size=8))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_file_of_json_lines_does_more_than_hold_no_problems(tmp_path, source, rows):
    path = tmp_path / "set.jsonl"
    path.write_text("".join(json.dumps(row, default=str) + "\n" for row in [{}, *rows]))
    with contextlib.suppress(ValueError):
        load_problems(ProblemsConfig(source=source, path=str(path), bad_rows_share=1))
