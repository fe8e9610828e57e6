"""The one map between our parameters and Hugging Face's tensors, used by loading and by export."""

from __future__ import annotations

import dataclasses

from jaxdistill.models.config import ModelConfig

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


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
    vectors = {"attention_norm": "input_layernorm"}
    if config.qkv_bias:
        vectors |= {f"{n}_bias": f"self_attn.{n}_proj.bias" for n in ("q", "k", "v")}
    if config.attention_bias:
        vectors |= {"o_bias": "self_attn.o_proj.bias"}
    if config.family.qk_norm:
        vectors |= {f"{n}_norm": f"self_attn.{n}_norm" for n in ("q", "k")}
    if config.family.sandwich_norms:
        vectors |= {
            "post_attention_norm": "post_attention_layernorm",
            "mlp_norm": "pre_feedforward_layernorm",
            "post_mlp_norm": "post_feedforward_layernorm",
        }
    else:
        vectors |= {"mlp_norm": "post_attention_layernorm"}
    matrices = {n: f"self_attn.{n}_proj.weight" for n in ("q", "k", "v", "o")}
    matrices |= {n: f"mlp.{n}_proj.weight" for n in ("gate", "up", "down")}
    found = [Entry(("embed",), EMBEDDING)]
    for ours, theirs in vectors.items():
        found.append(Entry(("layers", ours), layer + theirs + ("" if theirs.endswith(".bias") else ".weight")))
    found += [Entry(("layers", ours), layer + theirs, transposed=True) for ours, theirs in matrices.items()]
    found.append(Entry(("norm",), "model.norm.weight"))
    if not config.tie_embeddings:
        found.append(Entry(("head",), HEAD))
    return found
