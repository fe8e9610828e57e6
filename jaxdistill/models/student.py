"""The student before its first step: a checkpoint or a model from scratch, with adapters if the config asks for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jaxdistill import hub
from jaxdistill.config import StudentConfig, to_dict
from jaxdistill.models import orbax
from jaxdistill.models.adapters import base_of
from jaxdistill.models.config import ModelConfig
from jaxdistill.models.decoder import Decoder
from jaxdistill.models.load import (
    abstract_model,
    init_model,
    param_shardings,
    params_of,
    with_lora,
    with_params,
)
from jaxdistill.models.lora import Lora
from jaxdistill.models.start import load_checked


def student_shape(student: StudentConfig, vocabulary: int, row_tokens: int) -> ModelConfig:
    """The student's shape.

    Args:
      vocabulary: tokens of its tokenizer.
      row_tokens: of the packed rows that it will train on.
    Raises:
      ValueError: the tokenizer has ids that the checkpoint has no row for, or rows are longer than the context.
    """
    if student.init is not None:
        checkpoints = hub.is_checkpoints(student.init)
        folder = hub.local(student.init) if checkpoints else hub.fetch(student.init, student.revision)
        config = orbax.read_shape(folder) if checkpoints else hub.read_config(base_of(folder))
        shape = ModelConfig.from_hf(config, f"{folder}/{hub.SHAPE if checkpoints else 'config.json'}")
        if vocabulary > shape.vocab_size:
            raise ValueError(
                f"{folder}: {shape.vocab_size} embeddings for a tokenizer of {vocabulary} tokens; "
                "use the checkpoint's own tokenizer."
            )
    else:
        given = {k: v for k, v in to_dict(student.architecture).items() if v is not None}
        shape = ModelConfig.from_hf(given | {"vocab_size": vocabulary}, "student.architecture")
    if row_tokens > shape.max_position_embeddings:
        # packed segments restart their positions, so this is about the longest example, which a row bounds
        raise ValueError(
            f"data.row_tokens={row_tokens} is beyond the student's context of "
            f"{shape.max_position_embeddings}; lower it."
        )
    return shape


def lora_of(student: StudentConfig) -> Lora | None:
    """The adapters that the config asks for.

    Raises:
      ValueError: an unknown target, or numbers that make no sense.
    """
    c = student.lora
    return None if c is None else Lora.of(c.rank, c.alpha, c.dropout, c.targets)


def start_student(
    student: StudentConfig, shape: ModelConfig, seed: int, mesh: Mesh | None, *, check: bool = False
) -> Decoder:
    """Parameters before the first step, sharded; the same for the same config and seed, on any mesh.

    Args:
      check: compare a Hugging Face checkpoint with transformers first, see `start.check_start`.
    Raises:
      ValueError: as `load_hf` and `check_start`.
    """
    lora = lora_of(student)
    base: Any = student.lora.base_dtype if student.lora else "float32"
    if student.init is not None and hub.is_checkpoints(student.init):
        model = _from_checkpoints(hub.local(student.init), shape, mesh, base)
    elif student.init is not None:
        model = load_checked(student.init, mesh, check=check, revision=student.revision, param_dtype=base)
    else:
        model = init_model(shape, seed, mesh=mesh, param_dtype=base)
    return model if lora is None else with_lora(model, lora, seed)


def _from_checkpoints(folder: Path, shape: ModelConfig, mesh: Mesh | None, base: str) -> Decoder:
    """The newest parameters of another run, as they were trained: fp32."""
    if base != "float32":
        raise ValueError(
            f"student.lora.base_dtype: {base} starts from a Hugging Face checkpoint; export {folder} and name the "
            "export in student.init."
        )
    model = abstract_model(shape, mesh=mesh)
    _, params = orbax.load_params(folder, params_of(model), param_shardings(shape, mesh))
    return with_params(model, params)
