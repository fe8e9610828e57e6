"""What a `config.json` must not say: what would be misread, or is read in one way here and in another elsewhere.

The yardstick is transformers. A key that it applies and that is not known here is refused by name; so is a setting that
stands in two places which disagree, even where transformers prefers one of them: who wrote the other meant something.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

GLOBAL, SLIDING = "full_attention", "sliding_attention"

# keys that change the numbers in transformers, and the only value of each that is computed here
ONLY: Mapping[str, Any] = {
    "mlp_bias": False,
    "pretraining_tp": 1,
    "attention_dropout": 0.0,
    "quantization_config": None,
    "attn_logit_softcapping": None,  # transformers' Gemma 3 reads it and does not apply it
    "use_bidirectional_attention": False,
    "per_layer_config": None,
    "partial_rotary_factor": 1.0,
    # transformers leaves these alone in our families; the programs that wrote them, and some that serve, do not
    "compression_config": None,
    "logit_scale": 1.0,
    "logits_scaling": 1.0,
    "residual_multiplier": 1.0,
    "embedding_multiplier": 1.0,
    "attention_multiplier": None,
    "clip_qkv": None,
}
# models that hold a language model as one of several parts
PARTS = ("text_config", "llm_config", "language_config", "vision_config", "audio_config", "thinker_config")
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


# what a key's value has to be where it is given; "or null" where transformers allows that
_TYPES: tuple[tuple[str, Callable[[Any], bool], tuple[str, ...]], ...] = (
    ("a whole number above 0", is_count, REQUIRED),
    (
        "a whole number above 0 or null",
        lambda value: value is None or is_count(value),
        ("num_key_value_heads", "head_dim", "max_position_embeddings", "original_max_position_embeddings"),
    ),
    ("a whole number", lambda value: value == 0 or is_count(value), ("max_window_layers",)),
    ("a number above 0", lambda value: is_number(value) and value > 0, ("rms_norm_eps",)),
    (
        "a number above 0 or null",
        lambda value: value is None or (is_number(value) and value > 0),
        ("rope_theta", "rope_local_base_freq", "final_logit_softcapping"),
    ),
    ("true or false", lambda value: isinstance(value, bool), ("tie_word_embeddings", "use_sliding_window")),
    ("true, as it attends to earlier tokens alone", lambda value: value is True, ("is_causal",)),
    ("true, false or null", lambda value: isinstance(value, bool | None), ("attention_bias",)),
    ("a list or null", lambda value: value is None or _is_list(value), ("layer_types", "no_rope_layers")),
    ("an object or null", lambda value: isinstance(value, Mapping | None), ("rope_parameters", "rope_scaling")),
)


def check_keys(config: Mapping[str, Any], model_type: str, architecture: str, where: str) -> None:
    """
    Args:
      architecture: transformers' class of the family's language model.
    Raises:
      ValueError: a key with a value that is not computed here, of a wrong type, or of another kind of model.
    """
    for key, only in ONLY.items():
        if config.get(key, only) not in (only, None):
            raise ValueError(
                f"{where}: {key}={config[key]!r} is not supported (only {only!r}); the logits would be wrong."
            )
    missing = [key for key in REQUIRED if config.get(key) is None]
    if missing:
        raise ValueError(f"{where}: no {', '.join(missing)}; it is not a complete {model_type} config.")
    for wanted, fits, keys in _TYPES:
        for key in keys:
            if key in config and not fits(config[key]):
                raise ValueError(f"{where}: {key} is {config[key]!r}, and has to be {wanted}; correct it.")
    _check_kind(config, model_type, architecture, where)
    _check_attention(config, model_type, where)


def _check_kind(config: Mapping[str, Any], model_type: str, architecture: str, where: str) -> None:
    """Whether it is one language model, and transformers' own."""
    parts = [key for key in PARTS if config.get(key)]
    if parts:
        raise ValueError(
            f"{where}: {parts[0]} beside a {model_type} config; a model of several parts is not supported, and it is "
            "not clear which of the two is meant. Save the language model alone."
        )
    named = config.get("architectures") or [architecture]
    if architecture.lower() not in (str(name).lower() for name in named):
        raise ValueError(
            f"{where}: architectures names {', '.join(map(str, named))}, and only {architecture} is read of model_type "
            f"{model_type}: a language model with its vocabulary projection. A classifier, a reward or an embedding "
            "model cannot be trained from or distilled from here."
        )
    own = config.get("auto_map")
    if isinstance(own, Mapping) and "AutoModelForCausalLM" in own:
        raise ValueError(
            f"{where}: auto_map names code of its own ({own['AutoModelForCausalLM']}), which is never run here, and "
            f"may compute another model than {architecture}. If it does not, remove auto_map from the config."
        )


def _check_attention(config: Mapping[str, Any], model_type: str, where: str) -> None:
    """Biases and windows that transformers does not apply in this family."""
    if model_type == "mistral" and config.get("attention_bias"):
        raise ValueError(
            f"{where}: attention_bias=True, which transformers' mistral does not have; the same model of model_type "
            "llama has it."
        )
    types = config.get("layer_types")
    if types is None:
        return
    layers = config["num_hidden_layers"]
    if len(types) != layers or set(types) - {GLOBAL, SLIDING}:
        raise ValueError(f"{where}: layer_types must name {GLOBAL!r} or {SLIDING!r} for each of {layers} layers.")
    window, flag = config.get("sliding_window"), config.get("use_sliding_window", False)
    beside = ""
    if SLIDING in types:
        if model_type == "llama":
            beside = "model_type llama, whose layers see everything"
        elif model_type in ("qwen2", "qwen3", "smollm3") and not flag:
            beside = "use_sliding_window: false"
        elif "sliding_window" in config and window is None:
            beside = "sliding_window: null"
    elif model_type == "mistral" and config.get("sliding_window", 4096) is not None:
        beside = (
            f"sliding_window: {config.get('sliding_window', 4096)}, which holds for all layers of model_type mistral"
        )
    if model_type == "mistral" and SLIDING in types and GLOBAL in types:
        beside = "model_type mistral, whose layers are all alike; with such a pattern it is ministral"
    if beside:
        raise ValueError(
            f"{where}: layer_types has {', '.join(sorted(set(types)))} beside {beside}; the two disagree, and programs "
            "differ in which they take. Correct the wrong one."
        )
