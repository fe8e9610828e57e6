"""Small random models of every family, as transformers makes them."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

FAMILIES = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}


def make(family: str, folder, *, tie=False, **overrides):
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
    if family == "qwen3":
        shape["head_dim"] = 16
    torch.manual_seed(0)
    model = model_class(config_class(**(shape | overrides))).eval()
    for parameter in model.parameters():  # so that biases and norms are not 0 and 1
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model
