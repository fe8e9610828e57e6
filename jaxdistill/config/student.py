"""Config of the student: where it starts from, or how it is shaped, and its adapters."""

from __future__ import annotations

from typing import Literal

from jaxdistill.config.base import require, section


@section
class ArchitectureConfig:
    """YAML section `student.architecture`: a student from scratch, in Hugging Face's names."""

    model_type: Literal["qwen2", "qwen3", "llama", "mistral", "smollm3", "gemma3_text"] = "qwen3"
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int | None = None
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = True


@section
class LoraConfig:
    """YAML section `student.lora`: trains low-rank adapters beside frozen matrices (arXiv:2106.09685)."""

    rank: int = 16
    alpha: float = 32.0
    """The adapters' output is scaled by alpha / rank."""
    dropout: float = 0.0
    """Of the adapters' inputs."""
    targets: str | tuple[str, ...] = "all-linear"
    """Linear layers by Hugging Face's names (q_proj ... down_proj), or all of them."""
    base_dtype: Literal["float32", "bfloat16", "int8", "nf4"] = "float32"
    """Of the frozen model; bfloat16 halves it and loses nothing of a checkpoint that is stored so. int8 and nf4 (as in
    QLoRA, arXiv:2305.14314) quantize the layers' matrices."""


@section
class StudentConfig:
    """YAML section `student`: the model that is trained."""

    init: str | None = None
    """What to start from: a Hugging Face checkpoint (a folder or a repository id), or the folder `checkpoints` of
    another run of ours, whose newest parameters are taken; its tokenizer is the folder `tokenizer` of that run."""
    revision: str | None = None
    architecture: ArchitectureConfig | None = None
    """Instead of `init`: a small student from scratch."""
    tokenizer: str | None = None
    """Folder or repository id; `init`'s own if absent, then the teacher's. `train` trains a new one on the traces."""
    tokenizer_vocab: int = 4096
    """Size of the vocabulary that `tokenizer: train` makes."""
    lora: LoraConfig | None = None
    """Train adapters instead of the whole model."""
    check: bool = True
    """Before anything is learned from a checkpoint that JAX reads, be it `init` or a teacher, compare its logits with
    what transformers computes from the same folder; once for every content. False: take it as it is read."""

    def __post_init__(self):
        require(
            (self.init is None) != (self.architecture is None),
            "student needs exactly one of `init` (a checkpoint) and `architecture` (a student from scratch).",
        )
