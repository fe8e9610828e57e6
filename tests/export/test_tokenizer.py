"""The tokenizer, the ends of turns and the base that an export names, as other programs read them."""

import json
import os
import subprocess
import sys

import pytest

from jaxdistill import hub, served
from jaxdistill.export import export_adapter, export_hf
from jaxdistill.models import load_hf
from jaxdistill.models.load import with_lora
from jaxdistill.models.lora import Lora
from jaxdistill.served import Sample
from jaxdistill.tokenization import encode_response, end_of_turn, load_tokenizer, render_prompt
from tests.data.made import FAMILIES
from tests.data.made import make_tokenizer as make_family
from tests.export.tiny import config_of, files_of, make_model, make_tokenizer_folder

PROBLEMS = ["Ned has 60 apples. How many apples does Ray have?", "What does <|im_end|> mean?"]
RESPONSES = ["<think>\nRay=60-9\n</think>\nThe answer is \\boxed{51}."]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer_folder(tmp_path_factory.mktemp("tokenizer"))


def family_tokenizer(folder, family, **files):
    make_family(folder, family, [*PROBLEMS, *RESPONSES])
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "mistral", "gemma3_text", "smollm3"])
def test_transformers_gives_the_ids_that_were_trained(tokenizer, tmp_path, family):
    """huggingface/transformers#45920: the same files, and other ids."""
    from transformers import AutoTokenizer, GenerationConfig

    used = tmp_path / "tokenizer"
    used.mkdir()
    for name, data in files_of(tokenizer).items():
        (used / name).write_bytes(data)
    served.settle(used, family)
    texts = Sample(PROBLEMS, RESPONSES)
    export_hf(make_model(family=family), tmp_path / "out", tokenizer=used, card="", texts=texts)
    ours, auto = load_tokenizer(str(used)), AutoTokenizer.from_pretrained(tmp_path / "out")
    chat = [{"role": "user", "content": PROBLEMS[0]}]
    found = auto.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert found == render_prompt(ours, PROBLEMS[0])
    assert [*auto.encode(RESPONSES[0], add_special_tokens=False), end_of_turn(ours)] == encode_response(
        ours, RESPONSES[0]
    )
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == end_of_turn(ours)


def test_a_tokenizer_that_transformers_reads_otherwise_is_not_exported(tokenizer, tmp_path):
    said = r"has \d+ ids, and \d+, .* by transformers' Qwen2Tokenizer; nothing was exported"
    with pytest.raises(ValueError, match=said):
        export_hf(make_model(family="qwen2"), tmp_path / "out", tokenizer=tokenizer, card="")
    assert not (tmp_path / "out").exists()
    export_hf(make_model(family="qwen2"), tmp_path / "out", tokenizer=tokenizer, card="", texts=None)


@pytest.mark.parametrize(
    ("family", "base", "stops"),
    [
        ("gemma", None, ["<eos>", "<end_of_turn>"]),
        ("gemma", ["<eos>"], ["<eos>", "<end_of_turn>"]),
        ("gemma", ["<end_of_turn>", "<eos>"], ["<end_of_turn>", "<eos>"]),
        ("llama3", ["<|begin_of_text|>", "<|eot_id|>"], ["<|begin_of_text|>", "<|eot_id|>"]),
        ("qwen3", None, "<|im_end|>"),
        ("base", ["<|endoftext|>"], ["<|endoftext|>", "<|im_end|>"]),
    ],
)
def test_generation_stops_where_trained_turns_end(tmp_path, family, base, stops):
    """hiyouga/LlamaFactory#7454, huggingface/open-r1#663: the base's eos alone, and responses without an end."""
    files = {"chat_template__jinja": FAMILIES["qwen3"][0]} if family == "base" else {}
    used = family_tokenizer(tmp_path / "tokenizer", family, **files)
    ours = load_tokenizer(str(used))

    def ids(names):
        return ours.convert_tokens_to_ids(names)

    more = {"base_generation_config": {"eos_token_id": ids(base)}} if base else {}
    export_hf(make_model(len(ours)), tmp_path / "out", tokenizer=used, card="", **more)
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written["eos_token_id"] == ids(stops)
    known = config_of(tmp_path / "out")["eos_token_id"]
    assert end_of_turn(ours) in (known if isinstance(known, list) else [known])


# ------------------------------------------------------------------------------------------------------ adapters


def adapted(base):
    return with_lora(load_hf(base), Lora.of(2, 4.0, 0.0, ["q_proj", "v_proj"]), 0)


LOAD = """
import sys
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer
print(type(AutoPeftModelForCausalLM.from_pretrained(sys.argv[1])).__name__)
print(len(AutoTokenizer.from_pretrained(sys.argv[1])))
"""


def test_an_adapter_is_loaded_from_any_working_folder(tokenizer, tmp_path, monkeypatch):
    export_hf(make_model(num_hidden_layers=2), tmp_path / "models" / "base", tokenizer=tokenizer, card="")
    monkeypatch.chdir(tmp_path)
    more = {"revision": None, "tokenizer": tokenizer, "card": "", "texts": Sample(PROBLEMS, RESPONSES)}
    export_adapter(adapted(tmp_path / "models" / "base"), tmp_path / "out", base="models/base", **more)
    named = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(tmp_path / "models" / "base")
    (tmp_path / "elsewhere").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path / "out")],
        cwd=tmp_path / "elsewhere",
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["PeftModelForCausalLM", "448"], done.stderr[-2000:]


def test_a_hub_name_stays_and_the_demo_gets_its_folder(tokenizer, tmp_path):
    model = adapted(hub.demo_teacher())
    more = {"revision": "abc", "tokenizer": tokenizer, "card": ""}
    export_adapter(model, tmp_path / "a", base="owner/name", **more)
    found = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (found["base_model_name_or_path"], found["revision"]) == ("owner/name", "abc")
    export_adapter(model, tmp_path / "b", base="demo", **more | {"revision": None})
    found = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert os.path.isfile(found["base_model_name_or_path"] + "/config.json")
