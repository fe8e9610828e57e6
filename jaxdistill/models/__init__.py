"""Student and teacher models: Hugging Face in, JAX inside."""

from jaxdistill.models.config import ModelConfig
from jaxdistill.models.decoder import Decoder
from jaxdistill.models.load import abstract_model, init_model, load_hf, param_shardings, params_of, with_params

__all__ = [
    "Decoder",
    "ModelConfig",
    "abstract_model",
    "init_model",
    "load_hf",
    "param_shardings",
    "params_of",
    "with_params",
]
