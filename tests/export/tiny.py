"""What every export needs: a small random model, a tokenizer for it, and a look at what came out."""

from __future__ import annotations

import json
from pathlib import Path

from jaxdistill.models import Decoder, ModelConfig, init_model
from tests.traces.tiny import make_tokenizer


def make_model(tokens: int = 448, *, family: str = "qwen3", mesh=None, head_dim: int = 32, **more) -> Decoder:
    """From scratch, with a vocabulary of the tokenizer's size."""
    config = {
        "model_type": family,
        "vocab_size": tokens,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": head_dim,
        "max_position_embeddings": 256,
        **more,
    }
    return init_model(ModelConfig.from_hf(config), 0, mesh=mesh)


def make_tokenizer_folder(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    make_tokenizer(folder)
    return folder


def tensors_of(folder: Path) -> dict:
    """Every tensor of a checkpoint, by the safetensors library."""
    from safetensors.numpy import load_file

    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())
