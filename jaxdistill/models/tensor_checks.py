"""Are the tensors of a checkpoint those of the model that its config describes, each once, whole, and no others?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jaxdistill.models.config import ModelConfig
from jaxdistill.models.names import EMBEDDING, HEAD, entries
from jaxdistill.models.tensor_files import BLOCK, FLOATS, Tensor


def check_tensors(
    tensors: Mapping[str, Tensor], shapes: Mapping[tuple[str, ...], tuple[int, ...]], config: ModelConfig, folder: Path
) -> None:
    """Raises ValueError unless the checkpoint holds exactly the model's tensors, before any of them is loaded.

    Args:
      shapes: of the parameters, by path (`load.param_shapes`).
    """
    expected: dict[str, tuple[int, ...]] = {}
    for entry in entries(config):
        shape = shapes[entry.path][1 if entry.stacked else 0 :]
        expected |= dict.fromkeys(entry.hf_names(config), shape[::-1] if entry.transposed else shape)
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise ValueError(f"{folder}: {_why_missing(missing, len(expected), tensors, config)}")
    repeated = {HEAD: tensors[EMBEDDING].shape} if config.tie_embeddings and HEAD in tensors else {}
    for name, shape in (expected | repeated).items():
        found = tensors[name]
        if found.dtype not in FLOATS:
            raise ValueError(
                f"{found.file}: tensor {name} is {found.dtype}, and weights must be {'/'.join(FLOATS)}; "
                "take the checkpoint that is not quantized, or save it in one of these."
            )
        if found.shape != shape:
            raise ValueError(
                f"{found.file}: tensor {name} has shape {list(found.shape)}, and config.json asks for {list(shape)}; "
                "the two are not of one model."
            )
    # tied checkpoints may repeat the embedding; old ones hold the rotary frequencies, which follow from the config
    extra = sorted(n for n in set(tensors) - set(expected) - {HEAD} if not n.endswith("rotary_emb.inv_freq"))
    if extra:
        raise ValueError(
            f"{tensors[extra[0]].file}: tensor {extra[0]} ({len(extra)} such in all) has no place in a "
            f"{config.model_type} model and would be ignored; config.json is of another model."
        )
    if config.tie_embeddings and HEAD in tensors and not _same(tensors[HEAD], tensors[EMBEDDING]):
        raise ValueError(
            f"{tensors[HEAD].file}: {HEAD} differs from {EMBEDDING}, and config.json says tie_word_embeddings: true; "
            "some programs would use the one and some the other. Set it to false if the model has a head of its own, "
            f"or take {HEAD} out of the file."
        )


def _why_missing(missing: list[str], count: int, tensors: Mapping[str, Tensor], config: ModelConfig) -> str:
    """What a checkpoint lacks, why that may be, and what to do."""
    if missing == [HEAD]:
        return (
            f"no {HEAD}, and config.json says tie_word_embeddings: false; set it to true if the embedding is the head "
            "too, or save the checkpoint with its head."
        )
    lacks = f"tensor {missing[0]} is missing ({len(missing)} of {count} are)"
    plain = EMBEDDING.removeprefix("model.")
    near = next((name for name in sorted(tensors) if name.endswith(plain) and name != EMBEDDING), None)
    if near is not None and EMBEDDING in missing:
        return (
            f"{lacks}, and there is {near} instead of {EMBEDDING}: names as a wrapper or another class writes them; "
            f"save it again as transformers' {config.family.architecture} does: save_pretrained of the unwrapped model."
        )
    if any(".base_layer." in name or ".lora_" in name for name in tensors):
        return f"{lacks}, and there are adapters in it; merge them with PEFT (merge_and_unload) before it is saved."
    return f"{lacks}; the checkpoint is not complete, download or export it again."


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same numbers; memory beside them stays below two blocks."""
    if a.shape != b.shape:
        return False
    at_once = max(1, BLOCK // (4 * math.prod(a.shape[1:])))
    return all(
        np.array_equal(a.read(rows).astype(np.float32), b.read(rows).astype(np.float32))
        for start in range(0, a.shape[0], at_once)
        for rows in [(slice(start, start + at_once), *[slice(None)] * len(a.shape[1:]))]
    )
