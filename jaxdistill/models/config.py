"""What distinguishes one decoder family from another, read from a Hugging Face `config.json`."""

from __future__ import annotations

import dataclasses
from typing import Any

FAMILIES = {
    "qwen2": {"architecture": "Qwen2ForCausalLM", "qkv_bias": True, "qk_norm": False},
    "qwen3": {"architecture": "Qwen3ForCausalLM", "qkv_bias": False, "qk_norm": True},
    "llama": {"architecture": "LlamaForCausalLM", "qkv_bias": False, "qk_norm": False},
}

# keys that change the numbers, and the only value of each that is computed here
_ONLY = {
    "hidden_act": "silu",
    "use_sliding_window": False,
    "mlp_bias": False,
    "attention_bias": False,
    "pretraining_tp": 1,
    "attention_dropout": 0.0,
    "quantization_config": None,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape and switches of a decoder-only transformer (pre-norm, RMSNorm, rotary positions, gated SiLU MLP)."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    rms_norm_eps: float
    max_position_embeddings: int
    tie_embeddings: bool

    @property
    def qkv_bias(self) -> bool:
        return bool(FAMILIES[self.model_type]["qkv_bias"])

    @property
    def qk_norm(self) -> bool:
        return bool(FAMILIES[self.model_type]["qk_norm"])

    @classmethod
    def from_hf(cls, config: dict[str, Any], where: str = "config.json") -> ModelConfig:
        """Reads a Hugging Face config.

        Raises:
          ValueError: an unsupported family, or a key whose value would change the numbers.
        """
        family = config.get("model_type")
        if family not in FAMILIES:
            raise ValueError(f"{where}: model_type {family!r} is not supported; known are {', '.join(FAMILIES)}.")
        for key, only in _ONLY.items():
            if config.get(key, only) != only:
                raise ValueError(
                    f"{where}: {key}={config[key]!r} is not supported (only {only!r}); the logits would be wrong."
                )
        required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        missing = [key for key in required if key not in config]
        if missing:
            raise ValueError(f"{where}: no {', '.join(missing)}; it is not a complete {family} config.")
        heads = config["num_attention_heads"]
        made = cls(
            model_type=family,
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            # Qwen3's default is not width / heads
            head_dim=config.get("head_dim") or (128 if family == "qwen3" else config["hidden_size"] // heads),
            rope_theta=_rope_theta(config, where),
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            max_position_embeddings=config.get("max_position_embeddings", 32768),
            tie_embeddings=config.get("tie_word_embeddings", False),
        )
        made.check(where)
        return made

    def check(self, where: str) -> None:
        """Raises ValueError if the shape cannot be a decoder."""
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"{where}: {self.num_heads} query heads do not share {self.num_kv_heads} key heads evenly."
            )
        if self.head_dim % 2:
            raise ValueError(f"{where}: head_dim {self.head_dim} is odd; rotary positions need pairs.")

    def to_hf(self) -> dict[str, Any]:
        """A `config.json` that transformers (4 and 5) and vLLM read back to the same model."""
        config = {
            "architectures": [FAMILIES[self.model_type]["architecture"]],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.rms_norm_eps,
            "max_position_embeddings": self.max_position_embeddings,
            "rope_theta": self.rope_theta,  # read by transformers 4
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},  # read by transformers 5
            "tie_word_embeddings": self.tie_embeddings,
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "use_cache": True,
        }
        if self.model_type in ("qwen3", "llama"):
            config["attention_bias"] = False
        if self.model_type in ("qwen2", "qwen3"):
            config["use_sliding_window"] = False
        if self.model_type == "llama":
            config["mlp_bias"] = False
        return config


def _rope_theta(config: dict[str, Any], where: str) -> float:
    """The base of plain rotary positions; scaled ones are refused."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind != "default":
        raise ValueError(
            f"{where}: rope type {kind!r} is not supported yet (only 'default'); the logits would be wrong."
        )
    return float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
