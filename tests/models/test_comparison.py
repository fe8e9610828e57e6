"""Ours against transformers, layer by layer: what agrees, what does not, and where it first differs."""

import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from jaxdistill.models import ModelConfig, load_hf, merge_lora, params_of, with_lora, with_params
from jaxdistill.models.layerwise import FromFiles, FromModel, forward
from jaxdistill.models.lora import Lora, is_adapter
from jaxdistill.models.parity import (
    MOST_TOKENS,
    TOKENS,
    TOLERANCE,
    Comparison,
    compare_files,
    compare_with_transformers,
    token_ids,
)
from jaxdistill.models.reference import reference
from jaxdistill.parallel.mesh import make_mesh
from tests.models import tiny
from tests.models.test_parity import CASES, VARIANTS, tiny_is_tied

IDS = np.random.default_rng(0).integers(0, 97, (2, 100), np.int32)
MESH = {"fsdp": 2, "data": 4}


def whole(folder):
    """(hidden states, logits) of transformers with all of the model in memory."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    kept = []
    for module in (model.get_input_embeddings(), *model.model.layers):
        module.register_forward_hook(lambda _, __, out: kept.append(out[:, -8:].numpy()))
    with torch.no_grad():
        return kept, model(torch.from_numpy(IDS.astype(np.int64))).logits.numpy()


@pytest.mark.parametrize(("family", "tie"), CASES)
def test_every_family_layer_by_layer(tmp_path, family, tie):
    tiny.make(family, tie=tie).save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    hidden, logits = whole(tmp_path)
    theirs = reference(tmp_path, IDS)
    np.testing.assert_array_equal(theirs.logits, logits)
    for got, want in zip(theirs.hidden, hidden, strict=True):
        np.testing.assert_array_equal(got, want)
    near = dict(atol=TOLERANCE * np.abs(logits).max(), rtol=0)
    model = load_hf(tmp_path)
    np.testing.assert_allclose(forward(FromModel(model), IDS).logits, model(jnp.asarray(IDS)), **near)
    for source in (FromModel(model), FromFiles(tmp_path), FromModel(load_hf(tmp_path, make_mesh(MESH)))):
        ours = forward(source, IDS)
        np.testing.assert_allclose(ours.logits, logits, **near)
        for got, want in zip(ours.hidden, hidden, strict=True):
            np.testing.assert_allclose(got, want, atol=TOLERANCE * np.abs(want).max(), rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_agrees(tmp_path, variant):
    family, overrides = VARIANTS[variant]
    tiny.make(family, tmp_path, tie=tiny_is_tied(family), **overrides)
    np.testing.assert_array_equal(reference(tmp_path, IDS).logits, whole(tmp_path)[1])
    found = compare_files(tmp_path)
    assert found.agrees, found
    assert all(difference <= TOLERANCE * scale for difference, scale in found.states)


@pytest.mark.parametrize("mesh", [None, {"fsdp": 2, "tensor": 2, "data": 2}, {"context": 2, "fsdp": 4}])
def test_a_model_in_bf16_is_what_its_rounded_weights_give(tmp_path, mesh):
    """In fp32, rounded where it is used; or kept in bf16."""
    reference = tiny.make("gemma3_text", tmp_path / "fp32", tie=True, vocab_size=98)
    reference.to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    mesh = make_mesh(mesh) if mesh else None
    exact = load_hf(tmp_path / "fp32", mesh)
    assert compare_with_transformers(exact, tmp_path / "fp32").agrees
    assert compare_with_transformers(exact, tmp_path / "bf16", dtype="bfloat16").agrees
    assert not compare_with_transformers(exact, tmp_path / "bf16").agrees
    kept = load_hf(tmp_path / "bf16", mesh, param_dtype="bfloat16", dtype="bfloat16")
    assert compare_with_transformers(kept, tmp_path / "bf16").agrees
    assert compare_files(tmp_path / "bf16").agrees


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.embed_tokens.weight", "from the embedding on"),
        ("model.layers.0.mlp.up_proj.weight", "first after layer 1 of 3"),
        ("model.layers.1.self_attn.q_norm.weight", "first after layer 2 of 3"),
        ("model.layers.2.self_attn.o_proj.weight", "first after layer 3 of 3"),
        ("model.norm.weight", "only in the final norm or the vocabulary projection"),
        ("lm_head.weight", "only in the final norm or the vocabulary projection"),
    ],
)
@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_what_differs_is_found_and_placed(tmp_path, name, place, factor):
    tiny.make("qwen3", tmp_path)
    model = load_hf(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {name: tensors[name] * factor}, file, {"format": "pt"})
    found = compare_with_transformers(model, tmp_path)
    assert not found.agrees
    assert found.place == place
    assert place in str(found) and "transformers' logits differ by " in str(found)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight"])
def test_infinite_logits_are_none(tmp_path, name):
    """One weight is too large: infinity differs from a number by no more than a share of infinity."""
    tiny.make("qwen3", tmp_path)
    model = load_hf(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors[name].view(-1)[5] = float("inf")
    save_file(tensors, file, {"format": "pt"})
    found = compare_with_transformers(model, tmp_path)
    assert found.logit_scale == float("inf") and not found.agrees


def test_a_config_that_says_something_else_is_found(tmp_path):
    tiny.make("qwen3", tmp_path)
    model = load_hf(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] *= 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert compare_with_transformers(model, tmp_path).place == "first after layer 1 of 3"


def test_tokens_show_windows_that_are_not_too_long():
    shape = {
        "model_type": "mistral", "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 4096,
    }  # fmt: skip

    def tokens(**more):
        return token_ids(ModelConfig.from_hf(shape | more)).shape

    assert tokens(sliding_window=None) == tokens(sliding_window=4096) == tokens(sliding_window=16) == (2, TOKENS)
    assert tokens(sliding_window=512) == (1, 512 + TOKENS // 2)
    assert tokens(sliding_window=1024) == (1, 1024 + TOKENS // 2)
    assert 1024 + TOKENS // 2 <= MOST_TOKENS
    assert tokens(sliding_window=512, max_position_embeddings=256) == (1, 256)


def test_nothing_near_a_zero_scale_agrees_but_zero():
    assert Comparison(0.0, 0.0, ()).agrees
    assert not Comparison(1e-9, 0.0, ()).agrees
    assert not Comparison(float("nan"), 1.0, ()).agrees


# ------------------------------------------------------------------------------------------------------ adapters


def adapted(model, lora):
    """With adapters as training leaves them: B is not zero any more."""
    with_them = with_lora(model, lora, seed=0)
    params = params_of(with_them)
    random = np.random.default_rng(1)
    for name, x in params["layers"].items():
        if is_adapter(name):
            params["layers"][name] = jnp.asarray(random.standard_normal(x.shape, np.float32) * 0.1)
    return with_params(with_them, params)


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
@pytest.mark.parametrize("base", ["float32", "nf4"])
def test_adapters_are_compared_with_peft(tmp_path, family, base):
    from jaxdistill.export import export_adapter, export_hf
    from tests.export.tiny import make_tokenizer_folder

    pytest.importorskip("peft")
    tiny.make(family, tmp_path / "base", tie=True)
    lora = Lora.of(4, 8.0, targets=["q", "o", "up"])
    model = adapted(load_hf(tmp_path / "base", param_dtype=base), lora)
    more = {"tokenizer": make_tokenizer_folder(tmp_path / "tokenizer"), "card": ""}
    export_adapter(model, tmp_path / "adapter", base=str(tmp_path / "base"), revision=None, **more)
    # a quantized base is not what PEFT loads, and no fault of the adapters
    found = compare_with_transformers(model, tmp_path / "adapter")
    assert found.agrees, found
    assert compare_files(tmp_path / "adapter").agrees
    if base == "float32":
        export_hf(merge_lora(model), tmp_path / "merged", **more)
        assert compare_files(tmp_path / "merged").logit_scale == pytest.approx(found.logit_scale, rel=1e-4)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    save_file(tensors | {name: tensors[name] * 2}, file, {"format": "pt"})
    assert compare_with_transformers(model, tmp_path / "adapter").place == "first after layer 2 of 3"


# ------------------------------------------------------------------------------------------------------ refusals


def test_a_head_of_its_own_beside_a_flag_that_ties_it_is_refused(tmp_path):
    """Transformers 5 uses the head, vLLM drops it."""
    tiny.make("qwen2", tmp_path, tie=False)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": True}))
    for load in (load_hf, compare_files):
        with pytest.raises(ValueError, match=r"lm_head\.weight differs from .* tie_word_embeddings: true"):
            load(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file, {"format": "pt"})
    assert compare_files(tmp_path).agrees
    save_file({n: t for n, t in tensors.items() if n != "lm_head.weight"}, file, {"format": "pt"})
    assert compare_files(tmp_path).agrees


def test_without_torch_it_says_what_to_install(tmp_path, monkeypatch):
    tiny.make("qwen3", tmp_path)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match=r"torch is not installed, .* pip install 'jaxdistill\[torch\]'"):
        compare_files(tmp_path)


def test_a_config_that_transformers_does_not_load_is_said(tmp_path):
    tiny.make("qwen3", tmp_path)
    config = tmp_path / "config.json"
    # we know the family by this, and transformers does not
    text = config.read_text()
    config.write_text("{")
    with pytest.raises(ValueError, match=r"not valid JSON"):
        compare_files(tmp_path)
    config.write_text(text.replace('"num_attention_heads": 6', '"num_attention_heads": 2'))
    with pytest.raises(ValueError, match=r"has shape"):
        compare_files(tmp_path)
