"""Student and teacher models: Hugging Face in, JAX inside."""

from jaxdistill.models.config import ModelConfig
from jaxdistill.models.decoder import AttentionOptions, Decoder
from jaxdistill.models.load import (
    abstract_model,
    init_model,
    load_hf,
    merge_lora,
    param_shardings,
    params_of,
    with_lora,
    with_params,
)
from jaxdistill.models.lora import Lora, join_params, split_params

__all__ = [
    "AttentionOptions",
    "Decoder",
    "Lora",
    "ModelConfig",
    "abstract_model",
    "init_model",
    "join_params",
    "load_hf",
    "merge_lora",
    "param_shardings",
    "params_of",
    "split_params",
    "with_lora",
    "with_params",
]
