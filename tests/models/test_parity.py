"""Logits and gradients against transformers, on random weights."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxdistill.export.hf import export_hf
from jaxdistill.models import ModelConfig, init_model, load_hf, params_of, with_params
from jaxdistill.models.config import LayerKind
from jaxdistill.models.decoder import REMAT, runs_of
from tests.models import tiny

CASES = [
    ("qwen2", False),
    ("qwen2", True),
    ("qwen3", False),
    ("qwen3", True),
    ("llama", False),
    ("mistral", False),
    ("smollm3", True),
    ("gemma3_text", True),
]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
# name: family, what its config says
VARIANTS = {
    "llama 3.1 rope": ("llama", {"rope_parameters": LLAMA3}),
    "linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    "yarn": ("qwen2", {"rope_parameters": YARN}),
    "yarn, every key": (
        "qwen3",
        {"rope_parameters": YARN | {"beta_fast": 8.0, "beta_slow": 2.0, "attention_factor": 1.3}},
    ),
    "yarn, two mscales": ("qwen3", {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.5}}),
    "a large base": ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}}),
    "qwen2 with a sliding window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    ),
    "qwen3 with a sliding window": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2},
    ),
    "mistral without a window": ("mistral", {"sliding_window": None}),
    "attention biases": ("llama", {"attention_bias": True}),
    "qwen3 with attention biases": ("qwen3", {"attention_bias": True}),
    "gemma, two rope bases and a scaled one": (
        "gemma3_text",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
            "final_logit_softcapping": None,
        },
    ),
    "gemma, the usual pattern": ("gemma3_text", {"num_hidden_layers": 8, "layer_types": None}),
    "smollm3, the usual pattern": ("smollm3", {"num_hidden_layers": 9, "no_rope_layer_interval": 4}),
    "smollm3 with windows": ("smollm3", {"use_sliding_window": True, "sliding_window": 16}),
    "one key head": ("llama", {"num_key_value_heads": 1}),
    "as many key heads as query heads": ("qwen2", {"num_key_value_heads": 6}),
}


def tokens_of(shape, vocab=97, seed=0):
    return np.random.default_rng(seed).integers(0, vocab, shape)


@pytest.mark.parametrize(("family", "tie"), CASES)
def test_logits_match_beyond_the_original_context(tmp_path, family, tie):
    reference = tiny.make(family, tmp_path, tie=tie)
    ids = tokens_of((2, 100))
    with torch.no_grad():
        want = reference(torch.from_numpy(ids)).logits.numpy()
    got = load_hf(tmp_path)(jnp.asarray(ids))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_match_in_every_variant(tmp_path, variant):
    family, overrides = VARIANTS[variant]
    reference = tiny.make(family, tmp_path, tie=tiny_is_tied(family), **overrides)
    ids = tokens_of((2, 100))
    with torch.no_grad():
        want = reference(torch.from_numpy(ids)).logits.numpy()
    got = load_hf(tmp_path)(jnp.asarray(ids))
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())
    # what is exported is read back to the same numbers, by transformers too
    config = json.loads((tmp_path / "config.json").read_text())
    ours = ModelConfig.from_hf(config)
    assert ModelConfig.from_hf(ours.to_hf()) == ours
    again = type(reference)(type(reference.config)(**ours.to_hf(), pad_token_id=0)).eval()
    again.load_state_dict(reference.state_dict())
    with torch.no_grad():
        np.testing.assert_array_equal(again(torch.from_numpy(ids)).logits.numpy(), want)


def tiny_is_tied(family):
    return family in ("gemma3_text", "smollm3")


def test_bf16_is_within_bf16_error(tmp_path):
    reference = tiny.make("qwen3", tmp_path, initializer_range=0.05)
    ids = tokens_of((2, 64))
    with torch.no_grad():
        want = reference(torch.from_numpy(ids)).logits.numpy()
    got = load_hf(tmp_path, dtype="bfloat16")(jnp.asarray(ids))
    assert np.abs(got - want).mean() < 0.02 * np.abs(want).mean()


@pytest.mark.parametrize("family", ["qwen2", "gemma3_text"])
def test_bf16_parameters_give_the_logits_of_rounded_weights(tmp_path, family):
    reference = tiny.make(family, tmp_path)
    ids = tokens_of((2, 40))
    for parameter in reference.parameters():
        parameter.data = parameter.data.bfloat16().float()
    with torch.no_grad():
        want = reference(torch.from_numpy(ids)).logits.numpy()
    got = load_hf(tmp_path, param_dtype="bfloat16")(jnp.asarray(ids))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


def test_gradients_match_torch(tmp_path):
    reference = tiny.make("qwen3", tmp_path)
    ids = tokens_of((2, 33))
    labels = torch.from_numpy(ids)
    reference(labels, labels=labels).loss.backward()
    model = load_hf(tmp_path)

    def loss(params):
        logits = with_params(model, params)(jnp.asarray(ids))[:, :-1]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(ids)[:, 1:, None], axis=-1).mean()

    gradient = jax.grad(loss)(params_of(model))
    named = dict(reference.named_parameters())
    for layer in range(3):
        for ours, theirs in (("q", "self_attn.q_proj"), ("o", "self_attn.o_proj"), ("down", "mlp.down_proj")):
            want = named[f"model.layers.{layer}.{theirs}.weight"].grad.numpy().T
            np.testing.assert_allclose(gradient["layers"][ours][layer], want, atol=1e-4 * np.abs(want).max())
    want = named["model.embed_tokens.weight"].grad.numpy()
    np.testing.assert_allclose(gradient["embed"], want, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_a_packed_row_equals_its_examples_alone(tmp_path, family):
    reference = tiny.make(family, tmp_path)
    model = load_hf(tmp_path)
    a, b = tokens_of((1, 40)), tokens_of((1, 24), seed=1)
    packed = np.concatenate([a, b, np.zeros((1, 4), int)], axis=1)
    segments = np.array([[1] * 40 + [2] * 24 + [0] * 4])
    positions = np.concatenate([np.arange(40), np.arange(24), np.zeros(4, int)])[None]
    logits = model(jnp.asarray(packed), jnp.asarray(positions), jnp.asarray(segments))
    for ids, got in ((a, logits[:, :40]), (b, logits[:, 40:64])):
        with torch.no_grad():
            want = reference(torch.from_numpy(ids)).logits.numpy()
        np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())
    assert np.isfinite(logits).all()


@pytest.mark.parametrize(("family", "tie"), CASES)
def test_load_then_export_is_bit_identical(tmp_path, family, tie):
    from safetensors.numpy import load_file
    from transformers import AutoConfig

    tiny.tokenizer(tmp_path / "tokenizer", family)
    tiny.make(family, tmp_path / "in", tie=tie)
    export_hf(
        load_hf(tmp_path / "in"),
        tmp_path / "out",
        tokenizer=tmp_path / "tokenizer",
        card="card",
        max_shard_bytes=40_000,
    )
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    before = load_file(tmp_path / "in" / "model.safetensors")
    after = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        after |= load_file(file)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name], tensor)
    ours, theirs = AutoConfig.from_pretrained(tmp_path / "out"), AutoConfig.from_pretrained(tmp_path / "in")
    for key in (
        "model_type",
        "hidden_size",
        "num_key_value_heads",
        "rope_parameters",
        "rms_norm_eps",
        "tie_word_embeddings",
        "vocab_size",
    ):
        assert getattr(ours, key) == getattr(theirs, key), key


def test_remat_changes_nothing():
    config = ModelConfig.from_hf(SMALL | {"num_hidden_layers": 5})
    ids = jnp.asarray(tokens_of((2, 16)))
    plain, *others = (
        jax.jit(jax.grad(lambda p, model=model: with_params(model, p)(ids).std()))(params_of(model))
        for model in (init_model(config, 0, remat=remat) for remat in REMAT)
    )
    for other in others:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), plain, other)


@pytest.mark.parametrize(
    ("pattern", "want"),
    [
        ("aaaa", [(0, 1, 4)]),
        ("a", [(0, 1, 1)]),
        ("sssssgsssssgss", [(0, 6, 2), (12, 1, 2)]),
        ("rrrnrrrnrrrn", [(0, 4, 3)]),
        ("ggggss", [(0, 1, 4), (4, 1, 2)]),
        ("gs", [(0, 1, 1), (1, 1, 1)]),
    ],
)
def test_layers_are_cut_into_runs_that_can_be_scanned(pattern, want):
    layer = {c: LayerKind(window=i, rope=None) for i, c in enumerate("agsrn", start=1)}
    assert runs_of([layer[c] for c in pattern]) == want


SMALL = {
    "model_type": "qwen3",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope type 'yarn' needs factor"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope type 'longrope' is not supported"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope type 'linear' needs factor"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "curve": 1}}, "has a key 'curve'"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"use_sliding_window": True, "layer_types": ["chunked_attention"] * 2}, "layer_types must name"),
        ({"model_type": "gemma3"}, "its text part alone is gemma3_text"),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
        ({"num_key_value_heads": 3, "num_attention_heads": 4}, "do not share"),
        ({"vocab_size": None}, "no vocab_size"),
    ],
)
def test_what_would_change_the_numbers_is_an_error(change, message):
    config = {k: v for k, v in (SMALL | change).items() if v is not None}
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf(config)


def test_broken_checkpoints_are_named(tmp_path):
    from safetensors.numpy import load_file, save_file

    tiny.make("qwen3", tmp_path)
    file = tmp_path / "model.safetensors"
    whole = load_file(file)
    save_file({k: v for k, v in whole.items() if k != "model.norm.weight"}, file)
    with pytest.raises(ValueError, match=r"tensor model\.norm\.weight is missing"):
        load_hf(tmp_path)
    save_file(whole | {"model.norm.weight": np.ones(5, np.float32)}, file)
    with pytest.raises(ValueError, match=r"model\.norm\.weight has shape \[5\]"):
        load_hf(tmp_path)
    save_file(whole | {"model.surprise": np.ones(5, np.float32)}, file)
    with pytest.raises(ValueError, match=r"model\.surprise"):
        load_hf(tmp_path)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_hf(tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match="no weights"):
        load_hf(tmp_path)
