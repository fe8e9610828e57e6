"""An unknown key offers the right one, also to who comes from another trainer; or says what its section has."""

import copy
import re

import pytest

from jaxdistill.config import build, keys
from tests.helpers import TINY


def refusal(path: str, value=1) -> str:
    data = copy.deepcopy(TINY) | {"run_dir": "x"}
    *parents, last = path.split(".")
    at = data
    for part in parents:
        at = at.setdefault(part, {})
    at[last] = value
    with pytest.raises(ValueError) as error:
        build(data)
    return str(error.value)


def test_every_key_that_is_offered_is_there():
    there = set(keys.all_keys())
    for key in (*keys.OTHER_WORDS, *keys.NOTES):
        assert key in there, key
    words = [(word, key) for key, found in keys.OTHER_WORDS.items() for word in found.split()]
    twice = {word for word, _ in words if sum(other == word for other, _ in words) > 1}
    assert twice == set()


@pytest.mark.parametrize(
    ("key", "offered"),
    [
        ("train.lr", "train.optimizer.learning_rate"),
        ("train.learning_rate", "train.optimizer.learning_rate"),
        ("learning_rate", "train.optimizer.learning_rate"),
        ("train.optimizer.lr", "train.optimizer.learning_rate"),
        ("train.gradient_accumulation_steps", "train.micro_batches"),
        ("train.per_device_train_batch_size", "train.batch_rows"),
        ("train.batch_size", "train.batch_rows"),
        ("train.max_seq_length", "data.row_tokens"),
        ("data.max_seq_length", "data.row_tokens"),
        ("data.max_tokens", "data.row_tokens"),
        ("sequence_len", "data.row_tokens"),
        ("lora.r", "student.lora.rank"),
        ("student.lora.r", "student.lora.rank"),
        ("student.lora_alpha", "student.lora.alpha"),
        ("lora_alpha", "student.lora.alpha"),
        ("student.lora.target_modules", "student.lora.targets"),
        ("peft.lora_dropout", "student.lora.dropout"),
        ("train.num_train_epochs", "train.epochs"),
        ("train.max_steps", "train.steps"),
        ("train.warmup_steps", "train.optimizer.warmup_share"),
        ("train.bf16", "train.compute_dtype"),
        ("train.gradient_checkpointing", "train.remat"),
        ("train.save_steps", "train.checkpoint_every"),
        ("model_name_or_path", "student.init"),
        ("traces.model", "traces.teacher"),
        ("problems.dataset_split", "problems.split"),
        ("model.name_or_path", "student.init"),
        ("dataset_name", "problems.path"),
        ("dataset.name", "problems.path"),
        ("traces.path", "problems.path"),
        ("train.row_tokens", "data.row_tokens"),
        ("traces.max_new_tokens", "traces.max_tokens"),
        ("traces.num_return_sequences", "traces.samples"),
        ("traces.top_k", "traces.server.extra"),
        ("traces.server.base_url", "traces.server.urls"),
        ("output_dir", "run_dir"),
        ("verify.min_thinking", "verify.filters.min_thinking"),
        ("evaluate.tasks", "evaluate.benchmarks"),
    ],
)
def test_words_of_other_trainers(key, offered):
    said = refusal(key)
    assert f"unknown key {key}; did you mean {offered}" in said


def test_slips_of_the_pen():
    assert "unknown key train.batch_row; did you mean train.batch_rows?" in refusal("train.batch_row")
    assert "unknown key trian; did you mean train?" in refusal("trian.steps")
    assert "unknown key student.tokeniser; did you mean student.tokenizer?" in refusal("student.tokeniser")


def test_what_is_like_nothing_gets_the_keys_of_its_section():
    said = refusal("student.xyzzy")
    assert re.search(r"unknown key student\.xyzzy; student has architecture, .*init, lora, .*tokenizer_vocab\.", said)
    assert "a config has ablate, baselines, data, evaluate, export" in refusal("xyzzy")
    assert "unknown key foo.bar; there is no section foo; a config has ablate" in refusal("foo.bar")


def test_a_value_in_the_place_of_a_section():
    assert "student is 'Qwen/Qwen3-8B', but it is a section" in refusal("student", "Qwen/Qwen3-8B")


def test_keys_of_an_unknown_section_are_explained_one_by_one():
    said = refusal("lora", {"r": 8, "lora_alpha": 16})
    assert "unknown key lora.r; did you mean student.lora.rank?" in said
    assert "lora.lora_alpha; did you mean student.lora.alpha?" in said
