"""The one map between our parameters and Hugging Face's tensors, used by loading and by export."""

from __future__ import annotations

import dataclasses

from jaxdistill.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Entry:
    """One parameter of ours: its path, its Hugging Face tensors, and whether a matrix is transposed there."""

    path: tuple[str, ...]
    hf: str
    """With `{layer}` in it, one tensor a layer, which we keep stacked."""
    transposed: bool = False

    @property
    def stacked(self) -> bool:
        return "{layer}" in self.hf

    def hf_names(self, config: ModelConfig) -> list[str]:
        return [self.hf.format(layer=i) for i in range(config.num_layers)] if self.stacked else [self.hf]


def entries(config: ModelConfig) -> list[Entry]:
    """Every parameter of a model, in the order in which a checkpoint is written."""
    layer = "model.layers.{layer}."
    found = [
        Entry(("embed",), "model.embed_tokens.weight"),
        Entry(("layers", "attention_norm"), layer + "input_layernorm.weight"),
    ]
    found += [Entry(("layers", n), f"{layer}self_attn.{n}_proj.weight", transposed=True) for n in ("q", "k", "v", "o")]
    if config.qkv_bias:
        found += [Entry(("layers", f"{n}_bias"), f"{layer}self_attn.{n}_proj.bias") for n in ("q", "k", "v")]
    if config.qk_norm:
        found += [Entry(("layers", f"{n}_norm"), f"{layer}self_attn.{n}_norm.weight") for n in ("q", "k")]
    found.append(Entry(("layers", "mlp_norm"), layer + "post_attention_layernorm.weight"))
    found += [Entry(("layers", n), f"{layer}mlp.{n}_proj.weight", transposed=True) for n in ("gate", "up", "down")]
    found.append(Entry(("norm",), "model.norm.weight"))
    if not config.tie_embeddings:
        found.append(Entry(("head",), "lm_head.weight"))
    return found
