"""What people's config.json say: read as transformers reads it, or refused with the key that is at fault.

The reports of other projects that are tried here stand beside their cases.
"""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from jaxdistill.models import ModelConfig, load_hf
from jaxdistill.models.config import FAMILIES
from tests.models import tiny

ABSENT = object()
GLOBAL, SLIDING = "full_attention", "sliding_attention"
LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
PATTERN = [SLIDING, GLOBAL, SLIDING]
OLD = {"rope_parameters": ABSENT, "rope_theta": 5000.0}
"""Positions as transformers 4 writes them."""
WINDOWS = {"use_sliding_window": True, "sliding_window": 16}
# what is changed in a config that transformers 5 wrote
EDITS = {
    "nothing": {},
    "the old keys": OLD,
    "the old keys with scaling": OLD | {"rope_scaling": LINEAR},
    "the old keys with no scaling": OLD | {"rope_scaling": None},
    "the old name of the kind": OLD | {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "yarn, by the old keys": OLD | {"rope_scaling": YARN},
    "yarn, no context": OLD | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    "no positions": {"rope_parameters": ABSENT},
    "empty positions": {"rope_parameters": {}},
    "Gemma's old keys": OLD | {"rope_local_base_freq": 500.0, "rope_scaling": LINEAR},
    "one scaled kind of layers": {"rope_parameters": {GLOBAL: LINEAR}},
    "one flat scaling": {"rope_parameters": LINEAR | {"rope_theta": 1e6}},
    "scaling beside": {"rope_scaling": LINEAR},
    "another base beside": {"rope_theta": 5000.0},
    "no key heads": {"num_key_value_heads": ABSENT},
    "null key heads": {"num_key_value_heads": None},
    "no width of heads": {"head_dim": ABSENT},
    "no epsilon": {"rms_norm_eps": ABSENT},
    "no tying": {"tie_word_embeddings": ABSENT},
    "windows": WINDOWS,
    "windows from a layer on": WINDOWS | {"layer_types": ABSENT, "max_window_layers": 1},
    "windows of no size": WINDOWS | {"layer_types": ABSENT, "max_window_layers": 1, "sliding_window": ABSENT},
    "windows of null": WINDOWS | {"layer_types": ABSENT, "max_window_layers": 1, "sliding_window": None},
    "windows by a list": WINDOWS | {"layer_types": PATTERN, "max_window_layers": 3},
    "a list that has none": WINDOWS | {"layer_types": [GLOBAL] * 3, "max_window_layers": 0},
    "windows that are off": {"use_sliding_window": False, "sliding_window": 16, "layer_types": PATTERN},
    "a window and no more": {"use_sliding_window": ABSENT, "sliding_window": 16, "layer_types": ABSENT},
    "no window": {"sliding_window": ABSENT},
    "a null window": {"sliding_window": None},
    "a pattern": {"sliding_window_pattern": 2, "layer_types": ABSENT},
    "a pattern beside a list": {"sliding_window_pattern": 2},
    "layers without positions": {"no_rope_layers": [1, 0, 1, 0, 0]},
    "an interval of them": {"no_rope_layers": ABSENT, "no_rope_layer_interval": 3},
    "an interval beside a list": {"no_rope_layer_interval": 3},
    "a cap": {"final_logit_softcapping": 5.0},
    "a scale of queries": {"query_pre_attn_scalar": 64},
    "no scale of queries": {"query_pre_attn_scalar": ABSENT},
    "biases": {"attention_bias": True},
    "no context": {"max_position_embeddings": ABSENT},
}  # fmt: skip


def changed(config, edit):
    return {k: v for k, v in (config | edit).items() if v is not ABSENT}


@pytest.fixture(scope="module", params=FAMILIES)
def written(request, tmp_path_factory):
    """(family, its config as transformers writes it)."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny.make(request.param, folder)
    return request.param, json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("name", EDITS)
def test_a_config_is_read_as_transformers_reads_it_or_refused(written, name, tmp_path):
    """Transformers' own reading, written out anew, is the same model to us.

    huggingface/transformers#40126 and #35896: which layers of a Qwen have windows is what its code makes of the config.
    """
    family, config = written
    edited = changed(config, EDITS[name])
    if name in REFUSED["every family"] | REFUSED[family]:
        with pytest.raises(ValueError, match=r"^here: "):
            ModelConfig.from_hf(edited, "here")
        return
    ours = ModelConfig.from_hf(edited, "here")
    (tmp_path / "config.json").write_text(json.dumps(edited))
    try:
        theirs = AutoConfig.from_pretrained(tmp_path).to_dict()
    except StrictDataclassFieldValidationError:
        assert name == "null key heads" and family in ("mistral", "gemma3_text")
        return
    assert ours == ModelConfig.from_hf(theirs)


# where transformers fails, or takes one of two things that were said, and others the other
REFUSED = {
    "every family": {"scaling beside", "another base beside"},
    "qwen2": {"one scaled kind of layers", "windows that are off", "no key heads"},
    "qwen3": {"one scaled kind of layers", "windows that are off", "no key heads"},
    "smollm3": {"one scaled kind of layers", "windows that are off", "no key heads"},
    "llama": {"one scaled kind of layers", "windows by a list", "windows that are off"},
    "mistral": {"one scaled kind of layers", "windows by a list", "windows that are off", "a list that has none",
                "no key heads", "biases"},
    "gemma3_text": {"one flat scaling", "the old name of the kind", "no key heads", "windows of null",
                    "a null window"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        # rope_scaling added to what transformers 5 wrote, which drops the base that stands in rope_parameters
        # (sgl-project/sglang#14745, deepspeedai/DeepSpeed#8345: what is in one place is not seen from the other)
        ({"rope_scaling": LINEAR}, r"rope_parameters .* and rope_scaling .* disagree.*remove rope_scaling"),
        ({"rope_theta": 5.0}, r"rope_theta: 5\.0 beside 10000\.0 in rope_parameters"),
        ({"rope_parameters": YARN, "original_max_position_embeddings": 16}, r"embeddings: 16 beside 32"),
        (OLD | {"rope_scaling": {"type": "linear", "rope_type": "default", "factor": 2.0}}, "type: linear, which dis"),
        ({"rope_parameters": {GLOBAL: LINEAR}}, "object of their own for 'full_attention'"),
        ({"rope_parameters": [1]}, r"rope_parameters is \[1\], and has to be an object or null"),
        ({"rope_parameters": LINEAR | {"factor": "4"}}, "factor: '4'; it has to be a number above 0"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0\.5 is not supported"),
        # transformers then lets tokens see later ones
        ({"is_causal": False}, "is_causal is False, and has to be true"),
        ({"is_causal": None}, "is_causal is None, and has to be true"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ({"per_layer_config": {"1": {"rms_norm_eps": 0.5}}}, "per_layer_config=.* is not supported"),
        ({"text_config": {"rms_norm_eps": 0.5}}, "text_config beside a qwen2 config"),
        ({"vision_config": {"depth": 2}}, "vision_config beside a qwen2 config"),
        ({"architectures": ["Qwen2ForSequenceClassification"]}, "architectures names Qwen2ForSequenceClassification"),
        ({"architectures": ["Qwen2ForRewardModel"]}, "classifier, a reward or an embedding model cannot"),
        ({"architectures": ["Qwen2Model"]}, "architectures names Qwen2Model, and only Qwen2ForCausalLM"),
        ({"architectures": ["LlamaForCausalLM"]}, "architectures names LlamaForCausalLM, and only Qwen2ForCausalLM"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}, r"code of its own \(modeling_own\.Own\)"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config=.*fp8.* is not supported"),
        ({"compression_config": {"format": "int-quantized"}}, "compression_config=.* is not supported"),
        ({"logits_scaling": 8.0}, r"logits_scaling=8\.0 is not supported"),
        ({"attention_multiplier": 0.1}, r"attention_multiplier=0\.1 is not supported"),
        ({"attention_dropout": 0.1}, r"attention_dropout=0\.1 is not supported"),
        ({"mlp_bias": True}, "mlp_bias=True is not supported"),
        ({"hidden_act": "gelu"}, "activation 'gelu' is not supported"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false', and has to be true or false"),
        ({"tie_word_embeddings": None}, "tie_word_embeddings is None, and has to be true or false"),
        ({"use_sliding_window": "false"}, "use_sliding_window is 'false', and has to be true or false"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6', and has to be a number above 0"),
        ({"rms_norm_eps": None}, "rms_norm_eps is None, and has to be a number above 0"),
        ({"hidden_size": "48"}, "hidden_size is '48', and has to be a whole number above 0"),
        ({"num_key_value_heads": 2.5}, r"num_key_value_heads is 2\.5, and has to be a whole number above 0 or null"),
        (OLD | {"rope_theta": "1e6"}, "rope_theta is '1e6', and has to be a number above 0 or null"),
        ({"layer_types": [GLOBAL] * 2}, "layer_types must name"),
        ({"layer_types": "full_attention"}, "layer_types is 'full_attention', and has to be a list or null"),
        (
            {"use_sliding_window": False, "sliding_window": 16, "layer_types": PATTERN},
            "layer_types has full_attention, sliding_attention beside use_sliding_window: false; the two disagree",
        ),
        (WINDOWS | {"layer_types": PATTERN, "sliding_window": 0}, "sliding_window is 0; it has to be a whole number"),
        (WINDOWS | {"layer_types": PATTERN, "sliding_window": None}, "beside sliding_window: null"),
    ],
)
def test_the_key_at_fault_is_named(edit, said):
    shape = {
        "model_type": "qwen2", "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
        "num_attention_heads": 6, "num_key_value_heads": 2, "architectures": ["Qwen2ForCausalLM"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }  # fmt: skip
    ModelConfig.from_hf(shape, "config.json")
    with pytest.raises(ValueError, match=said) as error:
        ModelConfig.from_hf(changed(shape, edit), "config.json")
    assert str(error.value).startswith("config.json: ") and "\n" not in str(error.value)


def gemma(**edit):
    ropes = {GLOBAL: {"rope_type": "default", "rope_theta": 1e6}, SLIDING: {"rope_type": "default", "rope_theta": 1e4}}
    shape = {
        "model_type": "gemma3_text", "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80,
        "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2, "layer_types": PATTERN,
        "sliding_window": 24, "rope_parameters": ropes,
    }  # fmt: skip
    return changed(shape, edit)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        ({"rope_scaling": LINEAR}, "disagree; transformers 5 takes the second"),
        ({"rope_theta": 5000.0}, r"rope_theta: 5000\.0 beside 1000000\.0 in rope_parameters\.full_attention"),
        (
            {"rope_local_base_freq": 50.0},
            r"rope_local_base_freq: 50\.0 beside 10000\.0 in rope_parameters\.sliding_att",
        ),
        ({"rope_parameters": LINEAR}, "one object for full_attention and one for sliding_attention, .* such as factor"),
        (OLD | {"rope_scaling": {"type": "linear", "factor": 8.0}}, "type: linear, which transformers does not read"),
        ({"rope_parameters": {GLOBAL: YARN | {"truncate": False}}}, "yarn' of Gemma 3 with truncate"),
        (
            {"rope_parameters": {GLOBAL: YARN}, "original_max_position_embeddings": 16},
            "original_max_position_embeddings outside of rope_parameters",
        ),
        ({"sliding_window": None}, "beside sliding_window: null"),
        ({"query_pre_attn_scalar": None}, "query_pre_attn_scalar is None; it has to be a number"),
        ({"final_logit_softcapping": 0.0}, r"final_logit_softcapping is 0\.0, and has to be a number above 0 or null"),
        ({"layer_types": ABSENT, "sliding_window_pattern": 0}, "sliding_window_pattern is 0"),
    ],
)
def test_the_key_at_fault_is_named_in_gemma_too(edit, said):
    ModelConfig.from_hf(gemma())
    with pytest.raises(ValueError, match=said):
        ModelConfig.from_hf(gemma(**edit))


def test_what_is_said_twice_and_alike_is_fine():
    """As our own exports say it, for transformers 4 and 5."""
    ropes = {GLOBAL: LINEAR | {"rope_theta": 1e6}, SLIDING: {"rope_type": "default", "rope_theta": 1e4}}
    both = {"rope_parameters": ropes, "rope_scaling": LINEAR, "rope_theta": 1e6, "rope_local_base_freq": 1e4}
    assert ModelConfig.from_hf(gemma(**both)) == ModelConfig.from_hf(gemma(rope_parameters=ropes))


# ------------------------------------------------------------------------------------------------- heads and embeddings


def logits(folder):
    ids = np.random.default_rng(0).integers(0, 97, (2, 50))
    with torch.no_grad():
        want = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(torch.from_numpy(ids)).logits
    return np.asarray(load_hf(folder)(jnp.asarray(ids))), want.numpy()


def edit_config(folder, **more):
    config = folder / "config.json"
    config.write_text(json.dumps(changed(json.loads(config.read_text()), more)))


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "mistral"])
@pytest.mark.parametrize("size", ["10GB", "40KB"])
def test_a_head_that_a_flag_denies(tmp_path, family, size):
    """Files of one piece and of several.

    huggingface/transformers#42612: the flag won over the file, and a trained head was lost; it is kept today.
    vllm-project/vllm#3344: a head that repeats the embedding is in the files of some tied models.
    """
    model = tiny.make(family, tie=False)
    model.save_pretrained(tmp_path, max_shard_size=size)
    edit_config(tmp_path, tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from .* Set it to false if the model has a head"):
        load_hf(tmp_path)
    model.lm_head.weight.data = model.model.embed_tokens.weight.data.clone()
    model.save_pretrained(tmp_path, max_shard_size=size)
    edit_config(tmp_path, tie_word_embeddings=True)
    got, want = logits(tmp_path)
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


def test_a_head_that_a_flag_promises(tmp_path):
    tiny.make("llama", tmp_path, tie=True)
    edit_config(tmp_path, tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"no lm_head\.weight, and config\.json says tie_word_embeddings: false; set"):
        load_hf(tmp_path)


# ----------------------------------------------------------------------------------------------------------- tensors


def rename(folder, change):
    file = folder / "model.safetensors"
    save_file({change(name): tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        # FareedKhan-dev/train-llm-from-scratch#37: what torch.compile and DDP put before every name
        (lambda name: f"_orig_mod.{name}", r"there is _orig_mod\.model\.embed_tokens\.weight instead of .* unwrapped"),
        (lambda name: f"module.{name}", r"there is module\.model\.embed_tokens\.weight instead of"),
        (lambda name: name.replace("model.", "model.language_model.", 1), "language_model.embed_tokens.weight instead"),
        (
            lambda name: name.removeprefix("model."),
            r"there is embed_tokens\.weight instead of .* Qwen2ForCausalLM does",
        ),
        (
            lambda name: name.replace("q_proj.weight", "q_proj.base_layer.weight"),
            r"q_proj\.weight is missing \(3 of .*there are adapters in it; merge them",
        ),
    ],
)
def test_names_of_a_wrapper_are_told_from_a_checkpoint_that_is_not_whole(tmp_path, change, said):
    tiny.make("qwen2", tmp_path)
    rename(tmp_path, change)
    with pytest.raises(ValueError, match=said):
        load_hf(tmp_path)


@pytest.mark.parametrize("name", ["score.weight", "v_head.summary.weight", "model.layers.0.mlp.up_proj.bias"])
def test_what_has_no_place_is_refused(tmp_path, name):
    """A classifier's or a value head, and biases that no config announces."""
    tiny.make("qwen2", tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {name: torch.ones(2)}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=f"tensor {name} .* has no place in a qwen2 model"):
        load_hf(tmp_path)


def test_a_file_beside_an_index_of_others_is_refused(tmp_path):
    """Transformers takes `model.safetensors`, vLLM what the index names."""
    tiny.make("llama").save_pretrained(tmp_path, max_shard_size="40KB")
    tiny.make("llama", tmp_path / "other", initializer_range=0.1)
    load_hf(tmp_path)
    (tmp_path / "other" / "model.safetensors").rename(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors, and beside it .*index\.json, which names model-00001"):
        load_hf(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    load_hf(tmp_path)


def test_a_quantized_head_of_a_tied_model_is_refused(tmp_path):
    tiny.make("llama", tmp_path, tie=True)
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {"lm_head.weight": torch.ones(97, 48, dtype=torch.int8)}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lm_head\.weight is I8, and weights must be"):
        load_hf(tmp_path)
