"""The published configs of students that people distil into, without the keys that no model code reads.

`plan` takes a student's shape from here where its checkpoint is not at hand; tests hold them against transformers.
"""

from __future__ import annotations

from typing import Any

_QWEN25 = {
    "model_type": "qwen2",
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "use_sliding_window": False,
    "tie_word_embeddings": False,
    "max_position_embeddings": 131072,
}
_LLAMA3 = {
    "model_type": "llama",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "mlp_bias": False,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}


def _llama3_rope(factor: float) -> dict[str, Any]:
    return {
        "rope_scaling": {
            "factor": factor,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        }
    }


def _shape(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        **more,
    }


# name: (config, parameters)
R1_DISTILL = {
    "DeepSeek-R1-Distill-Qwen-1.5B": (
        _QWEN25
        | _shape(1536, 8960, 28, 12, 2, vocab_size=151936, rms_norm_eps=1e-6, rope_theta=10000, sliding_window=4096)
        | {"max_window_layers": 21},
        1_777_088_000,
    ),
    "DeepSeek-R1-Distill-Qwen-7B": (
        _QWEN25
        | _shape(3584, 18944, 28, 28, 4, vocab_size=152064, rms_norm_eps=1e-6, rope_theta=10000, sliding_window=4096)
        | {"max_window_layers": 28},
        7_615_616_512,
    ),
    "DeepSeek-R1-Distill-Qwen-14B": (
        _QWEN25
        | _shape(5120, 13824, 48, 40, 8, vocab_size=152064, rms_norm_eps=1e-5, rope_theta=1e6, sliding_window=131072)
        | {"max_window_layers": 48},
        14_770_033_664,
    ),
    "DeepSeek-R1-Distill-Qwen-32B": (
        _QWEN25
        | _shape(5120, 27648, 64, 40, 8, vocab_size=152064, rms_norm_eps=1e-5, rope_theta=1e6, sliding_window=131072)
        | {"max_window_layers": 64},
        32_763_876_352,
    ),
    "DeepSeek-R1-Distill-Llama-8B": (_LLAMA3 | _shape(4096, 14336, 32, 32, 8) | _llama3_rope(8.0), 8_030_261_248),
    "DeepSeek-R1-Distill-Llama-70B": (_LLAMA3 | _shape(8192, 28672, 80, 64, 8) | _llama3_rope(8.0), 70_553_706_496),
}


def _qwen3(*sizes: int, tied: bool) -> dict[str, Any]:
    shape = _shape(*sizes, head_dim=128, vocab_size=151936, rms_norm_eps=1e-6, rope_theta=1e6)
    return shape | {"model_type": "qwen3", "tie_word_embeddings": tied, "max_position_embeddings": 40960}


QWEN3 = {
    "Qwen3-0.6B": (_qwen3(1024, 3072, 28, 16, 8, tied=True), 596_049_920),
    "Qwen3-1.7B": (_qwen3(2048, 6144, 28, 16, 8, tied=True), 1_720_574_976),
    "Qwen3-4B": (_qwen3(2560, 9728, 36, 32, 8, tied=True), 4_022_468_096),
    "Qwen3-8B": (_qwen3(4096, 12288, 36, 32, 8, tied=False), 8_190_735_360),
    "Qwen3-14B": (_qwen3(5120, 17408, 40, 40, 8, tied=False), 14_768_307_200),
    "Qwen3-32B": (_qwen3(5120, 25600, 64, 64, 8, tied=False), 32_762_123_264),
}
OTHERS = {
    "Llama-2-7b": (
        _LLAMA3 | _shape(4096, 11008, 32, 32, 32, vocab_size=32000, rope_theta=10000.0, max_position_embeddings=4096),
        6_738_415_616,
    ),
    "Llama-3.2-1B": (
        _LLAMA3 | _shape(2048, 8192, 16, 32, 8, head_dim=64, tie_word_embeddings=True) | _llama3_rope(32.0),
        1_235_814_400,
    ),
    "Mistral-7B-v0.1": (
        _shape(4096, 14336, 32, 32, 8, vocab_size=32000, rms_norm_eps=1e-5, rope_theta=10000.0, sliding_window=4096)
        | {"model_type": "mistral", "tie_word_embeddings": False, "max_position_embeddings": 32768},
        7_241_732_096,
    ),
    "gemma-3-1b": (
        _shape(1152, 6912, 26, 4, 1, head_dim=256, vocab_size=262144, rms_norm_eps=1e-6, rope_theta=1000000)
        | {
            "model_type": "gemma3_text",
            "hidden_activation": "gelu_pytorch_tanh",
            "max_position_embeddings": 32768,
            "query_pre_attn_scalar": 256,
            "rope_local_base_freq": 10000,
            "rope_scaling": None,
            "sliding_window": 512,
            "sliding_window_pattern": 6,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
        },
        999_885_952,
    ),
    "SmolLM3-3B": (
        _shape(2048, 11008, 36, 16, 4, vocab_size=128256, rms_norm_eps=1e-6, rope_theta=5000000.0)
        | {
            "model_type": "smollm3",
            "max_position_embeddings": 65536,
            "no_rope_layer_interval": 4,
            "pad_token_id": 128004,
            "use_sliding_window": False,
            "sliding_window": None,
            "tie_word_embeddings": True,
        },
        3_075_098_624,
    ),
}
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = R1_DISTILL | QWEN3 | OTHERS
