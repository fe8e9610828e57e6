"""Small random models of every family, as transformers makes them."""

from pathlib import Path

import torch
import transformers as hf

from jaxdistill import served
from jaxdistill.data.tokenizer import train_tokenizer

FAMILIES = {
    "qwen2": (hf.Qwen2Config, hf.Qwen2ForCausalLM),
    "qwen3": (hf.Qwen3Config, hf.Qwen3ForCausalLM),
    "llama": (hf.LlamaConfig, hf.LlamaForCausalLM),
    "mistral": (hf.MistralConfig, hf.MistralForCausalLM),
    "smollm3": (hf.SmolLM3Config, hf.SmolLM3ForCausalLM),
    "gemma3_text": (hf.Gemma3TextConfig, hf.Gemma3ForCausalLM),
}
# what shows a family at work in three layers and 100 tokens
SPECIAL = {
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": 24, "head_dim": 12},
    "smollm3": {"no_rope_layer_interval": 2, "pad_token_id": 0},
    "gemma3_text": {
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "head_dim": 16,
        "query_pre_attn_scalar": 20,
        "final_logit_softcapping": 30.0,
    },
}


def make(family: str, folder=None, *, tie=False, **overrides):
    """Saves a random checkpoint with awkward sizes; returns transformers' model."""
    config_class, model_class = FAMILIES[family]
    shape = dict(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        tie_word_embeddings=tie,
    )
    torch.manual_seed(0)
    model = model_class(config_class(**(shape | SPECIAL.get(family, {}) | overrides))).eval()
    for parameter in model.parameters():  # so that biases and norms are not 0 and 1
        parameter.data += 0.1 * torch.randn_like(parameter)
    if folder is not None:
        model.save_pretrained(folder)
    return model


def tokenizer(folder: Path, family: str) -> None:
    """A tokenizer of a few tokens, as `prepare` leaves one beside a student of a family."""
    folder.mkdir()
    train_tokenizer(folder, ["some text"], 300)
    served.settle(folder, family)
