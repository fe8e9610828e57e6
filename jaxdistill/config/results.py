"""Config of what comes after training: export and evaluation."""

from __future__ import annotations

from typing import Literal

from jaxdistill.config.base import require, section
from jaxdistill.config.problems import ProblemsConfig
from jaxdistill.config.traces import VLLMConfig


@section
class ExportConfig:
    """YAML section `export`: the student in Hugging Face format."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    max_shard_gib: float = 4.0
    lora: Literal["merged", "adapter"] = "merged"
    """Of a student with adapters: the whole model, or the adapters alone as PEFT loads them."""
    check: Literal["transformers", "none"] = "transformers"
    """Reload with transformers and compare logits, before the folder gets its final name."""
    serve: bool = False
    """Start vLLM's server on the student's export and let it answer one held-out problem."""
    port: int = 0
    """Of that server; 0 takes a free one."""


@section
class EvaluateConfig:
    """YAML section `evaluate`: held-out accuracy of student, baselines and teacher."""

    problems: ProblemsConfig
    engine: Literal["jax", "vllm"] = "jax"
    models: tuple[str, ...] = ("teacher", "student", "baselines")
    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 512
    seed: int = 0
    batch: int = 256
    vllm: VLLMConfig = VLLMConfig()

    def __post_init__(self):
        known = {"teacher", "student", "baselines"}
        for name in self.models:
            require(name in known, f"evaluate.models has {name!r}; known are {', '.join(sorted(known))}.")
