"""The list of work: styles, prompts, ids and seeds; and all that is refused before a token is drawn."""

import dataclasses

import numpy as np
import pytest

from jaxdistill import config as configs
from jaxdistill import tokenization
from jaxdistill.records import Problem
from jaxdistill.traces import show, styles, thinking
from jaxdistill.traces.work import Requests, WorkList, sample_seed
from tests.traces.test_collect import make_config
from tests.traces.tiny import checkpoint  # noqa: F401  (a fixture)


def make_problems(count):
    return [
        Problem(id=f"a/b:{n}", prompt=f"Ann has {n} pens.", answer=str(n), domain="math", source=f"s:{n}")
        for n in range(count)
    ]


@pytest.fixture(scope="module")
def tokenizer(checkpoint):  # noqa: F811
    return tokenization.load_tokenizer(str(checkpoint))


def make_work(tokenizer, count=3, counts=None, **traces):
    config = make_config("demo", **{"samples": 2, "styles": ["plain", "cot"], **traces})
    return WorkList(config.traces, make_problems(count), tokenizer, counts)


def test_every_problem_style_and_sample_once_in_order(tokenizer):
    work = make_work(tokenizer)
    requests = list(Requests(work, np.arange(len(work))))
    assert [request.id for request in requests] == [
        f"a/b:{n}/{style}/{sample}" for n in range(3) for style in ("plain", "cot") for sample in range(2)
    ]
    assert [work.number_of(request.id) for request in requests] == list(range(12))
    assert len({request.seed for request in requests}) == 12
    assert requests[1].prompt_ids == requests[0].prompt_ids != requests[2].prompt_ids
    for unknown in ("a/b:0/plain/2", "a/b:0/orca/0", "a/b:9/plain/0", "x", "a/b:0/plain/-1"):
        assert work.number_of(unknown) is None


def test_more_samples_of_one_prompt_move_nothing_else(tokenizer):
    before, after = make_work(tokenizer), make_work(tokenizer, counts={("a/b:1", "plain"): 5})
    assert len(after) == len(before) + 3
    assert [after.number_of(f"a/b:1/plain/{n}") for n in range(6)] == [4, 5, 6, 7, 8, None]
    for number in range(len(before)):
        request = before.request(number)
        moved = after.number_of(request.id)
        assert moved is not None
        assert after.request(moved) == request
    assert before.hashes() == after.hashes()


def test_prompts_are_those_of_the_template(tokenizer):
    work = make_work(tokenizer, suffix=" Box it.", system="Be brief.")
    expected = tokenization.render_prompt(tokenizer, "Ann has 1 pens.", system="Be brief.", suffix=" Box it.")
    number = work.number_of("a/b:1/plain/0")
    assert number is not None
    assert work.request(number).prompt_ids == expected


def test_seeds_and_hashes_tell_runs_apart(tokenizer):
    one, other = make_work(tokenizer), make_work(tokenizer, suffix="!")
    assert one.hashes()[0] == other.hashes()[0]
    assert one.hashes()[1] != other.hashes()[1]
    assert sample_seed(0, "a") != sample_seed(1, "a")


# --------------------------------------------------------------------------------------------------------- styles


def test_the_packaged_styles_are_well_formed_and_say_where_they_are_from():
    found = styles.read_styles(styles.PACKAGED)
    assert {"plain", "cot", "long_cot", "few_shot_math", "math", "code", "legal", "medical"} <= set(found)
    assert sum(name.startswith("orca_") for name in found) >= 8
    assert all(style.source for style in found.values())
    assert found["plain"].messages("x") == [{"role": "user", "content": "x"}]
    chat = found["few_shot_math"].messages("1+1?")
    assert [message["role"] for message in chat] == ["user", "assistant", "user", "assistant", "user"]
    assert chat[-1]["content"] == "1+1?\n\nThink step by step, then give the answer as \\boxed{}."


def test_a_problem_with_braces_stays_as_it_is():
    style = styles.Style(name="s", prompt="Q: {problem}\nA in \\boxed{}.")
    assert (
        style.messages("{problem} {x} \\frac{1}{2}")[0]["content"] == "Q: {problem} {x} \\frac{1}{2}\nA in \\boxed{}."
    )


def test_ones_own_styles_are_added_and_replace(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("plain: {system: Mine.}\npirate: {system: Arr., prompt: 'Ahoy! {problem}'}\n")
    plain, pirate, cot = styles.load_styles(("plain", "pirate", "cot"), str(path))
    assert (plain.system, pirate.prompt, cot.system) == ("Mine.", "Ahoy! {problem}", None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a", "expected a mapping of style names, found list"),
        ("a: [", "not valid YAML"),
        ("a b: {}", "a style's name has only letters"),
        ("a: text", "found str"),
        ("a: {sytem: x}", "unknown key sytem; known are examples, prompt, source, system"),
        ("a: {prompt: no hole}", r"holds \{problem\} 0 times"),
        ("a: {prompt: '{problem} {problem}'}", r"holds \{problem\} 2 times"),
        ("a: {system: 7}", r"a\.system is 7; write text"),
        ("a: {examples: [x]}", "each is a mapping of `problem` and `response`"),
        ("a: {examples: [{problem: x, response: 4}]}", "quote numbers"),
    ],
)
def test_a_bad_style_is_named(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        styles.load_styles(("plain",), str(path))
    assert "mine.yaml" in str(error.value)


def test_an_unknown_style_is_told_the_nearest(tmp_path):
    with pytest.raises(ValueError, match="'orca_longer' is not known; did you mean orca_long"):
        styles.load_styles(("orca_longer",))
    with pytest.raises(ValueError, match=r"mine\.yaml: no such file"):
        styles.load_styles(("plain",), str(tmp_path / "mine.yaml"))


# ------------------------------------------------------------------------------------------------------ bad input


def test_problems_that_cannot_be_asked_are_named(tokenizer):
    config = make_config("demo").traces
    one, two = make_problems(2)
    with pytest.raises(ValueError, match="a/b:0: 2 problems have this id"):
        WorkList(config, [one, two, one], tokenizer)
    with pytest.raises(ValueError, match=r"a/b:1 \(s:1\): the problem is empty \(1 are\)"):
        WorkList(config, [one, dataclasses.replace(two, prompt=" \n")], tokenizer)
    with pytest.raises(ValueError, match="no problems to ask"):
        WorkList(config, [], tokenizer)


def test_a_template_that_leaves_the_problem_out_or_fails_is_named(checkpoint):  # noqa: F811
    config = make_config("demo", system="Be brief.").traces
    broken = tokenization.load_tokenizer(str(checkpoint))
    broken.chat_template = "{% for m in messages %}{{ m.role }}{% endfor %}"
    with pytest.raises(ValueError, match="the chat template of demo leaves the problem out"):
        WorkList(config, make_problems(1), broken)
    broken.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(ValueError, match=r"fails on messages of system, user \(System role not supported\)"):
        WorkList(config, make_problems(1), broken)


SERVER = {"urls": ["http://a/v1"], "api": "completions"}


@pytest.mark.parametrize(
    ("traces", "message"),
    [
        ({"engine": "server"}, r"needs `traces\.server\.urls`"),
        ({"server": {"urls": ["localhost:8000"]}}, "write it as http://HOST:PORT/v1"),
        ({"server": {"urls": ["http://a/v1", "http://a/v1"]}}, "names a server twice"),
        ({"server": {"urls": ["http://a/v1"], "start": 1}}, "`urls` or `start`, not both"),
        ({"server": {"timeout_s": 0}}, r"timeout_s is 0\.0; set it above 0"),
        ({"server": {"in_flight": 0}}, "at least one request at a time"),
        ({"styles": []}, r"traces\.styles is empty"),
        ({"styles": ["cot", "cot"]}, "names a style twice"),
        ({"think_tags": ["<a>", "<a>"]}, "an opening and a closing tag that differ"),
        ({"until_kept": 1}, r"needs `traces\.max_samples`"),
        ({"until_kept": 1, "max_samples": 1, "samples": 2}, "at least samples=2"),
        ({"until_kept": 1, "max_samples": 4, "temperature": 0.0}, "always draws the same"),
        (
            {"logprobs": 4, "engine": "server", "server": SERVER | {"api": "chat"}},
            "needs engine vllm or jax, or a server",
        ),
        ({"logprobs": 21, "engine": "server", "server": SERVER}, "0 to 20"),
        ({"logprobs": 1025, "engine": "vllm"}, "0 to 1024"),
        ({"logprobs_kind": "random", "engine": "vllm"}, "random needs engine jax"),
        ({"logprobs_temperature": 2.0, "engine": "vllm"}, "other than 1 needs logprobs_kind top, and engine jax"),
        ({"logprobs_kind": "random", "engine": "import"}, r"traces\.scorer: jax"),
    ],
)
def test_a_config_that_cannot_work_is_refused(traces, message):
    with pytest.raises(ValueError, match=message):
        make_config("demo", **traces)


# ------------------------------------------------------------------------------------------------------- thinking


def test_other_tags_become_think_tags():
    tags = ("<|begin|>", "<|end|>")
    assert thinking.normalize("<|begin|>hm<|end|>5", tags) == "<think>hm</think>5"
    assert thinking.normalize("<|begin|>cut off", tags) == "<think>cut off"
    assert thinking.normalize("a <|begin|> b<|end|> c <|end|>5", tags) == "a <think> b<|end|> c </think>5"
    assert thinking.normalize("no tags", tags) == "no tags"
    assert thinking.normalize("<think>hm</think>5") == "<think>hm</think>5"


def test_what_the_prompt_opened_is_put_back():
    assert thinking.is_open("<|assistant|><think>\n")
    assert not thinking.is_open("Put it into <think> tags.\n<|assistant|>")
    assert thinking.normalize("hm\n</think>\n\n5", opened=True) == "<think>\nhm\n</think>\n\n5"
    assert thinking.normalize("cut off", opened=True) == "<think>\ncut off"
    assert thinking.normalize("<think>\nhm</think>5", opened=True) == "<think>\nhm</think>5"
    assert thinking.join(None, "5") == "5"
    assert thinking.join("hm", "5") == "<think>\nhm\n</think>\n5"


def test_a_template_that_opens_the_thinking_is_noticed(checkpoint):  # noqa: F811
    opening = tokenization.load_tokenizer(str(checkpoint))
    assert not make_work(opening).opened(3)
    opening.chat_template = opening.chat_template.replace("assistant\n", "assistant\n<think>\n")
    assert all(make_work(opening).opened(n) for n in range(12))


# ----------------------------------------------------------------------------------------------------------- show


def test_prompts_can_be_looked_at_before_anything_is_run(tmp_path, capsys, checkpoint):  # noqa: F811
    data = configs.to_dict(make_config(checkpoint, styles=["plain", "long_cot"])) | {"run_dir": str(tmp_path)}
    show.show_prompts(configs.build(data), 1)
    out = capsys.readouterr().out
    assert "demo-0:0, style plain: " in out
    assert "<|im_start|>user\n" in out
    assert "demo-0:0, style long_cot: " in out
    assert "down between <think> and </think>" in out
