"""Published students: shapes, names and parameter counts are those of transformers, without any weights."""

import dataclasses
import math
from collections.abc import Mapping

import pytest
import torch
from flax import nnx
from transformers import AutoConfig, AutoModelForCausalLM

from jaxdistill.models import ModelConfig, abstract_model
from jaxdistill.models.config import FAMILIES
from jaxdistill.models.decoder import runs_of
from jaxdistill.models.load import get
from jaxdistill.models.names import entries
from jaxdistill.models.published import PUBLISHED, R1_DISTILL
from tests.models import tiny


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_shapes_and_counts_are_those_of_transformers(name):
    published, parameters = PUBLISHED[name]
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**published))
    want = {k: tuple(v.shape) for k, v in theirs.state_dict().items()}
    if published["tie_word_embeddings" if "tie_word_embeddings" in published else "model_type"] in (
        True,
        "gemma3_text",
    ):
        del want["lm_head.weight"]

    config = ModelConfig.from_hf(published)
    params = nnx.to_pure_dict(nnx.state(abstract_model(config)))
    got = {}
    for entry in entries(config):
        shape = get(params, entry.path).shape
        shape = shape[1:] if entry.stacked else shape
        got |= {hf: shape[::-1] if entry.transposed else shape for hf in entry.hf_names(config)}
    assert got == want
    assert sum(math.prod(s) for s in got.values()) == parameters


def test_the_six_students_of_r1_compile_as_one_scanned_run():
    for published, _ in R1_DISTILL.values():
        config = ModelConfig.from_hf(published)
        assert runs_of(config.kinds) == [(0, 1, published["num_hidden_layers"])]
        assert {kind.window for kind in config.kinds} == {None}, "a window that is switched off must stay off"


class Recorder(Mapping):
    """A config that remembers which of its keys were asked for."""

    def __init__(self, data):
        self.data, self.asked = data, set()

    def __getitem__(self, key):
        self.asked.add(key)
        return self.data[key]

    def __iter__(self):
        return iter(self.data)

    def __len__(self):
        return len(self.data)


# keys of transformers' config classes that change no logit
HARMLESS = {"initializer_range", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id"}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_that_transformers_knows_is_read_or_harmless(family):
    config_class, _ = tiny.FAMILIES[family]
    fields = {f.name for f in dataclasses.fields(config_class) if f.name in config_class.__annotations__}
    assert len(fields) > 12, "transformers keeps its keys elsewhere now"
    asked = set()
    # some keys are only read where others are set
    for more in ({}, {"use_sliding_window": True, "sliding_window": 8}):
        config = config_class(num_hidden_layers=4, layer_types=None, **more) if more and family in (
            "qwen2", "qwen3", "smollm3") else config_class()  # fmt: skip
        recorder = Recorder(config.to_dict())
        ModelConfig.from_hf(recorder)
        asked |= recorder.asked
    assert fields - asked - HARMLESS == set()
