"""Built-in templates, and what a template takes for granted of its tokenizer."""

import json

import pytest

from jaxdistill.data.templates import BUILT_IN, check_template, template_text
from jaxdistill.tokenization import end_of_turn, load_tokenizer, render_prompt
from tests.data.made import FAMILIES, make_tokenizer

TEXTS = ["Ned has 60 apples. How many? user assistant", "<think>\nSo 5.\n</think>\nThe answer is 5."]


def made(folder, family, template, **settings):
    make_tokenizer(folder, family, TEXTS)
    (folder / "chat_template.jinja").write_text(template)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return load_tokenizer(str(folder))


def without_chatml(folder):
    """The tokenizer has other names for ChatML's tokens."""
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace("<|im_start|>", "<|s|>").replace("<|im_end|>", "<|e|>"))
    path = folder / "tokenizer_config.json"
    path.write_text(path.read_text().replace("<|im_end|>", "<|e|>"))
    return load_tokenizer(str(folder))


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("family", ["llama3", "gemma", "r1_distill"])
def test_built_in_templates_start_with_the_bos_once(tmp_path, name, family):
    tokenizer = made(tmp_path / "t", family, template_text(name))
    ids = render_prompt(tokenizer, "Ned?")
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1
    assert check_template(tokenizer, "reasoning", None, "").thinking == "none"


@pytest.mark.parametrize("name", BUILT_IN)
def test_and_without_one_where_there_is_none(tmp_path, name):
    tokenizer = made(tmp_path / "t", "qwen3", template_text(name))
    start = {"plain": "User: Ned?", "chatml": "<|im_start|>user\nNed?<|im_end|>"}[name]
    assert tokenizer.decode(render_prompt(tokenizer, "Ned?")).startswith(start)
    assert tokenizer.convert_ids_to_tokens(end_of_turn(tokenizer)) == "<|im_end|>"


def test_a_bos_that_chatml_writes_anyway_is_not_written_twice(tmp_path):
    """SmolLM names <|im_start|> as its BOS."""
    tokenizer = made(tmp_path / "t", "qwen3", template_text("chatml"), bos_token="<|im_start|>")
    ids = render_prompt(tokenizer, "Ned?")
    assert ids[0] == tokenizer.bos_token_id != ids[1]


def test_a_template_that_drops_the_system_prompt_is_refused(tmp_path):
    template = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    tokenizer = made(tmp_path / "t", "qwen3", template)
    assert check_template(tokenizer, "reasoning", None, "").thinking == "none"
    with pytest.raises(ValueError, match=r"leaves the system prompt out .*data\.chat_template"):
        check_template(tokenizer, "reasoning", "Be brief.", "")
    kept = made(tmp_path / "k", "qwen3", template_text("chatml"))
    assert check_template(kept, "reasoning", " Be brief.\n", "").thinking == "none"


def test_a_template_with_two_bos_is_refused(tmp_path):
    """deepseek-ai/DeepSeek-R1#151, OpenRLHF/OpenRLHF#393: one of the template, and one more in front of it."""
    tokenizer = made(tmp_path / "t", "llama3", "{{ bos_token }}" + str(FAMILIES["llama3"][0]))
    with pytest.raises(ValueError, match=r"starts a prompt with two <\|begin_of_text\|>"):
        check_template(tokenizer, "reasoning", None, "")


def test_a_tokenizer_that_adds_a_bos_of_its_own_does_not_add_it_to_a_template(tmp_path):
    """deepseek-ai/DeepSeek-R1#151"""
    folder = make_tokenizer(tmp_path / "t", "llama3", TEXTS)
    start_with_bos(folder, "<|begin_of_text|>")
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.encode("x")[0] == tokenizer.bos_token_id
    assert render_prompt(tokenizer, "x").count(tokenizer.bos_token_id) == 1


def test_a_template_that_forgets_the_bos_is_told(tmp_path, capsys):
    folder = make_tokenizer(tmp_path / "t", "llama3", TEXTS)
    start_with_bos(folder, "<|begin_of_text|>")
    (folder / "chat_template.jinja").write_text(str(FAMILIES["llama3"][0]).replace("{{- bos_token }}", ""))
    check_template(load_tokenizer(str(folder)), "reasoning", None, "")
    assert "starts without the <|begin_of_text|> with which the tokenizer starts texts" in _said(capsys)


def start_with_bos(folder, bos):
    """tokenizer.json's own post-processor puts it before every text."""
    from tokenizers import Tokenizer, processors

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    number = tokenizer.token_to_id(bos)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, number)])
    tokenizer.save(str(folder / "tokenizer.json"))


def test_chatml_for_a_tokenizer_without_its_tokens_is_refused(tmp_path):
    made(tmp_path / "t", "qwen3", template_text("chatml"))
    tokenizer = without_chatml(tmp_path / "t")
    expected = r"writes <\|im_start\|>, <\|im_end\|>, and the tokenizer has no such token: .* data\.chat_template: plai"
    with pytest.raises(ValueError, match=expected):
        check_template(tokenizer, "reasoning", None, "")
    (tmp_path / "t" / "chat_template.jinja").write_text(template_text("plain"))
    check_template(load_tokenizer(str(tmp_path / "t")), "reasoning", None, "")


def test_other_markers_in_text_are_told_and_no_error(tmp_path, capsys):
    """Zephyr writes <|user|>, and has no such token."""
    template = "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token }}{% endfor %}<|assistant|>"
    check_template(made(tmp_path / "t", "base", template), "reasoning", None, "")
    assert "writes <|assistant|>, and the tokenizer has no such token" in _said(capsys)


def test_a_template_that_leaves_the_problem_out_is_refused(tmp_path):
    """As those that render content as parts alone."""
    template = "{% for m in messages %}{% if m.content is not string %}{{ m.content[0].text }}{% endif %}{% endfor %}A:"
    with pytest.raises(ValueError, match="leaves the problem out of the prompt"):
        check_template(made(tmp_path / "t", "base", template), "reasoning", None, "")


def _said(capsys):
    captured = capsys.readouterr()
    return " ".join((captured.out + captured.err).split())
