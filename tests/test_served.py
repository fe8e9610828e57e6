"""Our tokenizer and transformers' AutoTokenizer on the same files."""

import json
import shutil

import pytest

from jaxdistill import hub, served
from jaxdistill.served import Sample
from jaxdistill.tokenization import load_tokenizer, render_prompt

QUESTION = "Ned has 60 apples. How many apples does Ray have?"
FAMILIES = ("qwen2", "qwen3", "llama", "mistral", "gemma3_text", "smollm3")
CLASSES = ("PreTrainedTokenizerFast", "LlamaTokenizerFast", "Qwen2TokenizerFast", "GemmaTokenizer", None)


def demo(folder, **settings):
    """The demo teacher's tokenizer, byte-level and nobody's class."""
    folder.mkdir(exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(hub.demo_teacher() / name, folder / name)
    change(folder, **settings)
    return folder


def change(folder, **settings):
    path = folder / "tokenizer_config.json"
    found = json.loads(path.read_text()) | settings
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not None}))


def by_transformers(folder, kind):
    from transformers import AutoTokenizer

    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    auto = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": QUESTION}]
    return auto, auto.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("kind", FAMILIES)
def test_settled_files_give_the_same_ids_everywhere(tmp_path, kind, name):
    """huggingface/transformers#45488: LlamaTokenizer drops the spaces of byte-level tokenizers."""
    folder = demo(tmp_path / "t", tokenizer_class=name)
    served.settle(folder, kind)
    ours = load_tokenizer(str(folder))
    ids = render_prompt(ours, QUESTION)
    assert ours.decode(ids).count(QUESTION) == 1
    auto, found = by_transformers(folder, kind)
    assert found == ids
    assert len(auto) == len(ours) == 414  # no token that the model has no embedding for
    # and by the file alone, as other programs read it
    from tokenizers import Tokenizer

    text = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(ours.decode(ids), add_special_tokens=False)
    assert text.ids == ids


def test_what_agrees_is_left_as_it_is(tmp_path):
    folder = demo(tmp_path / "t")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert served.settle(folder, "qwen3") is None
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_what_was_changed_is_told(tmp_path):
    said = served.settle(demo(tmp_path / "a", tokenizer_class="LlamaTokenizerFast"), "llama")
    assert said is not None and "tokenizer_class is now PreTrainedTokenizerFast instead of LlamaTokenizerFast" in said
    said = served.settle(demo(tmp_path / "b"), "qwen2")
    assert said is not None and "as transformers does it in every qwen2 model" in said


@pytest.mark.parametrize("kind", ["qwen3", "llama", "qwen2"])
def test_a_whole_checkpoints_folder_is_read_as_transformers_reads_it(tmp_path, kind):
    folder = demo(tmp_path / "t")
    _, found = by_transformers(folder, kind)
    assert render_prompt(load_tokenizer(str(folder)), QUESTION) == found


# ------------------------------------------------------------------------------------------- what is found to differ


def changed_tokenizer(folder, edit):
    state = json.loads((folder / "tokenizer.json").read_text())
    edit(state)
    (folder / "tokenizer.json").write_text(json.dumps(state))


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda f: change(f, eos_token="<|pad|>"), "eos_token_id is '2', and '0'"),
        (lambda f: change(f, pad_token="<|im_end|>"), "pad_token_id is '0', and '2'"),
        (lambda f: change(f, bos_token="<|im_start|>"), "bos_token_id is 'None', and '1'"),
        (lambda f: (f / "chat_template.jinja").write_text("{{ messages[0].content }}"), "chat_template is "),
        (
            lambda f: changed_tokenizer(f, lambda s: s.update(normalizer={"type": "Lowercase"})),
            r"has \d+ ids, and \d+, the first difference at \d+ \(",
        ),
        (
            lambda f: changed_tokenizer(f, lambda s: s.update(decoder={"type": "Fuse"})),
            r"the text of .*\.\.\. is ",
        ),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "transformers does not load the tokenizer"),
    ],
)
def test_the_first_difference_is_named(tmp_path, break_it, said):
    ours = load_tokenizer(str(demo(tmp_path / "a")))
    other = demo(tmp_path / "b")
    responses = ["<think>\nRay=5\n</think>\n5", "It is <|im_end|>."]
    sample = Sample([QUESTION, "What is <|im_end|>?"], responses, "S", " box it")
    assert served.difference(ours, other, sample) is None
    break_it(other)
    with pytest.raises(ValueError, match=f"export: the tokenizer .* differ: .*{said}.*nothing was exported"):
        served.check_served(other, ours, sample)


def test_an_export_that_does_not_stop_where_responses_end_is_refused(tmp_path):
    """huggingface/open-r1#663: generation_config.json kept the base model's eos."""
    folder = demo(tmp_path / "t")
    ours = load_tokenizer(str(folder))
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3", "vocab_size": 414}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 5]}))
    with pytest.raises(ValueError, match=r"ends with the token 2, and generation_config.json stops at \[0, 5\]"):
        served.check_served(folder, ours, Sample())
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2]}))
    served.check_served(folder, ours, Sample())


def test_a_dated_prompt_is_compared_on_the_runs_day(tmp_path):
    folder = demo(tmp_path / "t")
    template = "{{ strftime_now('%Y') + '\n' }}" + (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(template)
    assert served.difference(load_tokenizer(str(folder), day="1999-12-31"), folder, Sample([QUESTION])) is None


def test_a_tokenizer_that_loses_its_text_as_qwen2_is_refused(tmp_path):
    """Not byte-level, as Llama 2's: transformers would read it by qwen2's rules all the same."""
    folder = demo(tmp_path / "t")
    space = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}

    def words(state):
        state |= {"pre_tokenizer": space, "decoder": space, "normalizer": None}
        vocabulary = {"\u2581" if text == "\u0120" else text: i for text, i in state["model"]["vocab"].items()}
        state["model"] |= {"vocab": vocabulary, "merges": []}

    changed_tokenizer(folder, words)
    with pytest.raises(ValueError, match=r"otherwise in a qwen2 model: .*qwen3 and llama take any"):
        served.settle(folder, "qwen2")
