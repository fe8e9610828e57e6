"""What distinguishes one decoder family from another, read from a Hugging Face `config.json`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxdistill.models.refusals import GLOBAL, SLIDING, check_keys, is_count, is_number
from jaxdistill.models.rope import Rope, read_rope, read_ropes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """What every model of a family has in common, and transformers' defaults for keys that a config leaves out."""

    architecture: str
    qkv_bias: bool = False
    qk_norm: bool = False
    sandwich_norms: bool = False
    """Norms after attention and MLP too, before each is added to the residual."""
    norm_offset: bool = False
    """Norm weights are stored as their distance from 1."""
    scaled_embedding: bool = False
    activation: str = "silu"
    head_dim: int | None = None
    """None: width / heads."""
    kv_heads: int | None = None
    """None: as many as query heads, as where a config says null."""
    theta: float = 10000.0
    tied: bool = False
    max_positions: int = 32768


FAMILIES: Mapping[str, Family] = {
    "qwen2": Family(architecture="Qwen2ForCausalLM", qkv_bias=True, kv_heads=32),
    "qwen3": Family(architecture="Qwen3ForCausalLM", qk_norm=True, head_dim=128, kv_heads=32),
    "llama": Family(architecture="LlamaForCausalLM", max_positions=2048),
    "mistral": Family(architecture="MistralForCausalLM", max_positions=131072, kv_heads=8),
    "smollm3": Family(architecture="SmolLM3ForCausalLM", theta=2e6, tied=True, kv_heads=4),
    "gemma3_text": Family(
        architecture="Gemma3ForCausalLM",
        qk_norm=True,
        sandwich_norms=True,
        norm_offset=True,
        scaled_embedding=True,
        activation="gelu_pytorch_tanh",
        head_dim=256,
        kv_heads=4,
        theta=1e6,
        tied=True,
        max_positions=131072,
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerKind:
    """What may differ from layer to layer, and is known when the model is compiled."""

    window: int | None = None
    """A token sees this many tokens, itself included; all earlier ones if None."""
    rope: Rope | None
    """None: a layer without positions."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape and switches of a decoder-only transformer (pre-norm, RMSNorm, rotary positions, gated MLP)."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_embeddings: bool
    kinds: tuple[LayerKind, ...]
    """One a layer."""
    query_scale: float
    """Factor on the attention scores."""
    attention_bias: bool = False
    """Biases on q, k, v and o; Qwen2 has those on q, k and v without it."""
    final_softcap: float | None = None
    """c * tanh(logits / c)."""

    @property
    def num_layers(self) -> int:
        return len(self.kinds)

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    @property
    def qkv_bias(self) -> bool:
        return self.family.qkv_bias or self.attention_bias

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
        """Reads a Hugging Face config.

        Raises:
          ValueError: an unsupported family, or a key whose value would change the numbers.
        """
        model_type = config.get("model_type")
        if model_type not in FAMILIES:
            hint = " (its text part alone is gemma3_text)" if model_type == "gemma3" else ""
            raise ValueError(
                f"{where}: model_type {model_type!r}{hint} is not supported; known are {', '.join(FAMILIES)}."
            )
        family = FAMILIES[model_type]
        activation = config.get("hidden_activation" if model_type == "gemma3_text" else "hidden_act")
        if activation not in (None, family.activation):
            raise ValueError(
                f"{where}: activation {activation!r} is not supported (only {family.activation!r} in {model_type})."
            )
        check_keys(config, model_type, family.architecture, where)
        heads = config["num_attention_heads"]
        head_dim = config.get("head_dim") or family.head_dim or config["hidden_size"] // heads
        made = cls(
            model_type=model_type,
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads", family.kv_heads) or heads,
            head_dim=head_dim,
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            max_position_embeddings=config.get("max_position_embeddings") or family.max_positions,
            tie_embeddings=config.get("tie_word_embeddings", family.tied),
            kinds=_kinds(model_type, config, where),
            query_scale=(_query_scalar(config, where) if model_type == "gemma3_text" else head_dim) ** -0.5,
            attention_bias=model_type != "qwen2" and bool(config.get("attention_bias")),
            final_softcap=config.get("final_logit_softcapping") if model_type == "gemma3_text" else None,
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
            "architectures": [self.family.architecture],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "rms_norm_eps": self.rms_norm_eps,
            "max_position_embeddings": self.max_position_embeddings,
            "tie_word_embeddings": self.tie_embeddings,
            "attention_dropout": 0.0,
            "use_cache": True,
        }
        if self.model_type != "gemma3_text":
            config["hidden_act"] = self.family.activation
        if self.model_type in ("qwen3", "llama", "smollm3", "gemma3_text"):
            config["attention_bias"] = self.attention_bias
        if self.model_type in ("llama", "smollm3"):
            config["mlp_bias"] = False
        return config | self._rope_to_hf() | self._windows_to_hf() | self._gemma_to_hf()

    def _rope_to_hf(self) -> dict[str, Any]:
        """Positions for transformers 4 (`rope_theta`, `rope_scaling`) and 5 (`rope_parameters`)."""
        ropes = {GLOBAL if k.window is None else SLIDING: k.rope for k in self.kinds if k.rope}
        if self.model_type == "gemma3_text":
            wide, near = ropes.get(GLOBAL, Rope(theta=1e6)), ropes.get(SLIDING, Rope())
            scaling = wide.to_hf() if wide.kind != "default" else None
            return {
                "rope_parameters": {GLOBAL: wide.to_hf(), SLIDING: near.to_hf()},
                "rope_theta": wide.theta,
                "rope_local_base_freq": near.theta,
                "rope_scaling": {k: v for k, v in scaling.items() if k != "rope_theta"} if scaling else None,
            }
        rope = next(iter(ropes.values()), Rope())
        scaled = {k: v for k, v in rope.to_hf().items() if k != "rope_theta"} if rope.kind != "default" else None
        found = {"rope_theta": rope.theta, "rope_parameters": rope.to_hf()}
        return found | ({"rope_scaling": scaled} if scaled else {})

    def _windows_to_hf(self) -> dict[str, Any]:
        windows = [k.window for k in self.kinds]
        window = next((w for w in windows if w), None)
        types = [SLIDING if w else GLOBAL for w in windows]
        if self.model_type in ("qwen2", "qwen3"):
            # transformers 4 reads how many leading layers see everything
            leading = next((i for i, w in enumerate(windows) if w), self.num_layers)
            return {
                "use_sliding_window": window is not None,
                "sliding_window": window,
                "max_window_layers": leading,
                "layer_types": types,
            }
        if self.model_type == "mistral":
            return {"sliding_window": window}
        if self.model_type == "gemma3_text":
            return {"sliding_window": window or 4096, "layer_types": types}
        if self.model_type == "smollm3":
            return {
                "use_sliding_window": window is not None,
                "sliding_window": window,
                "layer_types": types,
                "no_rope_layers": [int(k.rope is not None) for k in self.kinds],
            }
        return {}

    def _gemma_to_hf(self) -> dict[str, Any]:
        if self.model_type != "gemma3_text":
            return {}
        return {
            "hidden_activation": self.family.activation,
            "query_pre_attn_scalar": round(self.query_scale**-2),
            "final_logit_softcapping": self.final_softcap,
            "attn_logit_softcapping": None,
        }


def _query_scalar(config: Mapping[str, Any], where: str) -> float:
    found = config.get("query_pre_attn_scalar", 256)
    if not is_number(found) or found <= 0:
        raise ValueError(f"{where}: query_pre_attn_scalar is {found!r}; it has to be a number above 0.")
    return found


def _kinds(model_type: str, config: Mapping[str, Any], where: str) -> tuple[LayerKind, ...]:
    """Window and positions of every layer."""
    count = config["num_hidden_layers"]
    windows = _windows(model_type, config, where)
    family = FAMILIES[model_type]
    positions = config.get("max_position_embeddings") or family.max_positions
    if model_type == "gemma3_text":
        rope, local = read_ropes(config, family.theta, positions, where)
        return tuple(LayerKind(window=w, rope=local if w else rope) for w in windows)
    rope = read_rope(config, family.theta, positions, where)
    with_rope = [1] * count
    if model_type == "smollm3":
        with_rope = _with_rope(config, where)
    return tuple(LayerKind(window=w, rope=rope if r else None) for w, r in zip(windows, with_rope, strict=False))


def _with_rope(config: Mapping[str, Any], where: str) -> list[int]:
    """SmolLM3: 1 for a layer with positions, 0 for one without; there may be more of them than layers."""
    count, every = config["num_hidden_layers"], config.get("no_rope_layer_interval", 4)
    found = config.get("no_rope_layers")
    if found is None:
        if not is_count(every):
            raise ValueError(f"{where}: no_rope_layer_interval is {every!r}; it has to be a whole number above 0.")
        return [int((i + 1) % every != 0) for i in range(count)]
    if len(found) < count:
        raise ValueError(f"{where}: no_rope_layers names {len(found)} of {count} layers.")
    return found


def _windows(model_type: str, config: Mapping[str, Any], where: str) -> list[int | None]:
    """Sliding window of every layer, as transformers derives it."""
    count = config["num_hidden_layers"]
    window: int | None = config.get("sliding_window", None if model_type == "smollm3" else 4096)
    given: list[str] | None = config.get("layer_types")
    if model_type == "llama":
        return [None] * count
    if model_type == "gemma3_text":
        every = config.get("sliding_window_pattern", 6)
        if given is None and not is_count(every):
            raise ValueError(f"{where}: sliding_window_pattern is {every!r}; it has to be a whole number above 0.")
        types = given or [SLIDING if (i + 1) % every else GLOBAL for i in range(count)]
    elif model_type != "mistral" and not config.get("use_sliding_window"):
        return [None] * count
    elif model_type == "mistral":
        types = [SLIDING] * count
    elif model_type == "smollm3":
        types = given or [GLOBAL if r else SLIDING for r in _with_rope(config, where)[:count]]
    else:
        leading = config.get("max_window_layers", 28)
        types = given or [SLIDING if i >= leading else GLOBAL for i in range(count)]
    if SLIDING in types and not (is_count(window) or (window is None and model_type != "gemma3_text")):
        raise ValueError(f"{where}: sliding_window is {window!r}; it has to be a whole number above 0.")
    return [window if t == SLIDING else None for t in types]
