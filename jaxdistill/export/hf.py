"""A student in Hugging Face format: safetensors with an index, configs, tokenizer, chat template and model card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxdistill.models import Decoder, params_of
from jaxdistill.models.load import get
from jaxdistill.models.names import entries
from jaxdistill.records import atomic_folder

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
TOKENIZER_FILES = (".jinja", ".txt", ".model")


def export_hf(
    model: Decoder,
    path: Path,
    *,
    tokenizer: Path,
    card: str,
    dtype: str = "float32",
    max_shard_bytes: int = 4 << 30,
    check: Any = None,
) -> dict[str, Any]:
    """Writes a checkpoint that transformers and vLLM load.

    The folder is written beside its place and renamed last, so that nothing partial is ever found there.

    Args:
      tokenizer: folder with the tokenizer's files, which are copied as they are.
      check: called with the folder before it is renamed; what it raises stops the export, what it returns is passed on.
    Returns:
      {"tensors", "bytes", "files", "check"}.
    """
    with atomic_folder(path) as folder:
        counts = _write_tensors(model, folder, DTYPES[dtype], max_shard_bytes)
        _write_configs(model, folder, tokenizer, dtype)
        (folder / "README.md").write_text(card)
        for file in sorted(tokenizer.iterdir()):
            if file.suffix in TOKENIZER_FILES or file.suffix == ".json":
                shutil.copyfile(file, folder / file.name)
        counts["check"] = check(folder) if check else None
    return counts


def _write_tensors(model: Decoder, folder: Path, dtype: np.dtype, max_shard_bytes: int) -> dict[str, Any]:
    """Plans the shards from shapes, then fetches and writes one shard at a time."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    params, config = params_of(model), model.config
    plan: list[list[tuple[str, Any, int | None]]] = [[]]
    size = total = 0
    for entry in entries(config):
        array = get(params, entry.path)
        for layer, name in enumerate(entry.hf_names(config)):
            needs = int(np.prod(array.shape[1:] if entry.stacked else array.shape)) * dtype.itemsize
            if size and size + needs > max_shard_bytes:
                plan.append([])
                size = 0
            plan[-1].append((name, entry, layer if entry.stacked else None))
            size, total = size + needs, total + needs
    weight_map = {}
    for number, shard in enumerate(plan, start=1):
        file = "model.safetensors" if len(plan) == 1 else f"model-{number:05d}-of-{len(plan):05d}.safetensors"
        tensors = {}
        for name, entry, layer in shard:
            array = get(params, entry.path)
            value = np.asarray(array if layer is None else array[layer])
            tensors[name] = np.ascontiguousarray(value.T if entry.transposed else value).astype(dtype)
            weight_map[name] = file
        try:
            save_file(tensors, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:  # its words for a full or read-only disk
            raise ValueError(f"{folder}/{file}: {error}; nothing was exported.") from None
    if len(plan) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return {"tensors": len(weight_map), "bytes": total, "files": len(plan)}


def _write_configs(model: Decoder, folder: Path, tokenizer: Path, dtype: str) -> None:
    from jaxdistill.tokenization import load_tokenizer

    loaded = load_tokenizer(str(tokenizer))
    tokens = {
        "eos_token_id": loaded.eos_token_id,
        "pad_token_id": loaded.pad_token_id,
        "bos_token_id": loaded.bos_token_id,
    }
    config = model.config.to_hf() | tokens | {"dtype": dtype, "torch_dtype": dtype}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "generation_config.json").write_text(
        json.dumps({k: v for k, v in tokens.items() if v is not None}, indent=2) + "\n"
    )
