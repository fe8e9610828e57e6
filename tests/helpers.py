"""A run small enough for tests: the real stages, on a few demo problems and a student of some thousand parameters."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import yaml

from jaxdistill import pipeline
from jaxdistill.config import load

TINY: dict[str, Any] = {
    "name": "tiny",
    "problems": {"source": "demo", "count": 40, "seed": 1},
    "traces": {"engine": "import"},
    "data": {"row_tokens": 160},
    "student": {
        "tokenizer": "train",
        "tokenizer_vocab": 400,
        "architecture": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "max_position_embeddings": 256,
        },
    },
    "train": {
        "batch_rows": 8,
        "steps": 30,
        "checkpoint_every": 5,
        "log_every": 2,
        "optimizer": {"name": "adamw", "learning_rate": 3e-3},
    },
    "evaluate": {"problems": {"source": "demo", "count": 12, "seed": 9}, "max_tokens": 16, "batch": 12},
}


def tiny_config(folder: Path, **sections: Any) -> Path:
    """Writes `config.yaml` into the folder, whose run is `folder/run`; `sections` replace those of `TINY`."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(TINY | {"run_dir": str(folder / "run")} | sections))
    return path


def prepared_run(folder: Path, **sections: Any) -> Path:
    """A tiny run with everything before `train` done."""
    path = tiny_config(folder, **sections)
    config = load(path)
    for command in ("generate", "verify", "prepare"):
        pipeline.run_command(command, config)
    return path


def load_tool(name: str) -> Any:
    """A program of tools/, as a module."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module
