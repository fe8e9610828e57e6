"""Model FLOPs, counted from the shape, and what share of the devices' peak they are (MFU).

What a model of this shape needs, whatever the hardware does besides (rematerialisation, padding, masked blocks):
- a token: 2 FLOPs a weight of every matrix that multiplies it forward, 2 for the gradient of its inputs, and 2 for
  that of the weight if it is trained; embedding look-ups are none, the vocabulary projection is a matrix;
- a pair of query and key that sees it (causal, inside its segment and window): 4 * H * D a layer forward, for scores
  and weighted values, and twice that backward.
Source: Chowdhery et al. 2022 (PaLM), arXiv:2204.02311, appendix B, with causal pairs in place of all pairs.
"""

from __future__ import annotations

import math
from typing import Any

import jax

from jaxdistill.models import Lora, ModelConfig, abstract_model, params_of
from jaxdistill.models.lora import MATRICES, is_adapter

# dense bf16 TFLOP/s of one device as JAX counts them, by the start of its `device_kind`, from the vendors' data sheets
PEAK_TFLOPS = {
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5e": 197.0,
    "TPU v5p": 459.0,
    "TPU v5": 459.0,
    "TPU v6 lite": 918.0,
    "TPU v6e": 918.0,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H100": 989.0,
    "NVIDIA H200": 989.0,
    "NVIDIA GH200": 989.0,
    "NVIDIA B200": 2250.0,
    "NVIDIA A100": 312.0,
    "NVIDIA L40S": 362.0,
    "NVIDIA L4": 121.0,
}


class FlopCounter:
    """Model FLOPs of training a model, from how many tokens and pairs there were."""

    def __init__(self, config: ModelConfig, lora: Lora | None = None):
        trained = frozen = 0
        for path, p in jax.tree.leaves_with_path(params_of(abstract_model(config, lora=lora))):
            name = path[-1].key
            if name in MATRICES or name == "head" or (name == "embed" and config.tie_embeddings):
                trained, frozen = (trained, frozen + p.size) if lora else (trained + p.size, frozen)
            elif is_adapter(name):
                trained += p.size
        self.per_token = 6.0 * trained + 4.0 * frozen
        """FLOPs a token, without attention's pairs."""
        self.per_pair = 12.0 * config.num_heads * config.head_dim
        """FLOPs a pair in one layer."""

    def of(self, tokens: float, pairs: float) -> float:
        """FLOPs of these tokens; `pairs` are added up over layers."""
        return self.per_token * tokens + self.per_pair * pairs


def peak_flops(device: Any, given_tflops: float | None = None) -> float | None:
    """Peak of one device in FLOP/s, as given or as its kind is known for; None if neither is (a CPU, say)."""
    if given_tflops is not None:
        return given_tflops * 1e12
    kinds = [kind for kind in PEAK_TFLOPS if device.device_kind.startswith(kind)]
    return PEAK_TFLOPS[max(kinds, key=len)] * 1e12 if kinds else None


def mfu(flops: float, seconds: float, peak: float | None, devices: int) -> float | None:
    """The share of the peak of all devices that went into the model; None if the peak is not known."""
    if peak is None or seconds <= 0 or not math.isfinite(flops):
        return None
    return flops / seconds / (peak * devices)
