"""Adapters in PEFT's format: their name map, their config, and a base checkpoint loaded with them.

Source: https://github.com/huggingface/peft (LoraConfig, and `base_model.model.` before every name of a tensor)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxdistill import hub
from jaxdistill.models.config import ModelConfig
from jaxdistill.models.lora import LORA_A, LORA_B, Lora
from jaxdistill.models.names import Entry, entries
from jaxdistill.models.tensor_files import Tensor, read_header

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# Every other setting has to be absent or off, for PEFT has many that change what an adapter computes, or its base, and
# more with every release. These may have other values: those under which it is a plain LoRA on linear layers, ...
_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    # others (pissa, olora, corda, ...) change the base's matrices too
    "init_lora_weights": (True, False, None, "gaussian"),
}
# ... what is read below, and what changes nothing by itself
_ANY = frozenset({
    "r", "lora_alpha", "lora_dropout", "target_modules", "base_model_name_or_path", "revision",
    "task_type", "auto_mapping", "peft_version", "inference_mode", "layers_pattern", "megatron_core", "megatron_config",
    "qalora_group_size", "loftq_config", "runtime_config",
})  # fmt: skip
_OFF: tuple[Any, ...] = (None, False, [], {})


def adapter_entries(config: ModelConfig, lora: Lora) -> list[Entry]:
    """Every adapter parameter: our stacked arrays, and PEFT's tensor in each layer."""
    found = []
    for entry in entries(config):
        if entry.path[-1] in lora.targets:
            stem = "base_model.model." + entry.hf.removesuffix(".weight")
            for ours, theirs in ((LORA_A, "lora_A"), (LORA_B, "lora_B")):
                path = (*entry.path[:-1], entry.path[-1] + ours)
                found.append(Entry(path, f"{stem}.{theirs}.weight", transposed=True))
    return found


def to_peft(lora: Lora, base: str, revision: str | None) -> dict[str, Any]:
    """`adapter_config.json`."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": [f"{name}_proj" for name in lora.targets],
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def read_peft(folder: Path) -> tuple[Lora, str, str | None]:
    """(shape, base checkpoint, its revision) of an adapter folder.

    Raises:
      ValueError: it is no JSON object, or not a plain LoRA on linear layers.
    """
    path = folder / CONFIG
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: a JSON {type(config).__name__} instead of an object; export the adapter again.")
    for key, value in config.items():
        if key not in _ANY and value not in _PLAIN.get(key, _OFF):
            raise ValueError(f"{path}: {key}={value!r} is not supported; merge the adapter with PEFT first.")
    base, targets = config.get("base_model_name_or_path"), config.get("target_modules") or []
    if not base:
        raise ValueError(f"{path}: no base_model_name_or_path; write the base checkpoint's folder or id into it.")
    try:
        lora = Lora.of(int(config["r"]), float(config["lora_alpha"]), float(config.get("lora_dropout") or 0), targets)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: r or lora_alpha is missing or no number ({error}).") from None
    return lora, str(base), config.get("revision")


def fetch_base(folder: Path) -> Path:
    """The folder of the checkpoint that adapters belong to.

    Raises:
      ValueError: it is not to be had, or has adapters itself.
    """
    _, name, revision = read_peft(folder)
    where = f"{folder / CONFIG}: base_model_name_or_path is {name!r}"
    try:
        base = hub.fetch(name, revision)
    except ValueError as error:
        raise ValueError(
            f"{where}, and the base cannot be had ({error}); write the base checkpoint's repository id, or its folder "
            "as an absolute path, into it."
        ) from None
    if hub.is_adapter(base):
        raise ValueError(f"{where}, which is an adapter itself; merge that one into its base with PEFT first.")
    return base


def read_adapter(folder: Path, config: ModelConfig, lora: Lora) -> dict[str, Any]:
    """The adapter's parameters, fp32, stacked over layers, by our names.

    Raises:
      ValueError: a tensor is missing, left over or of another shape.
    """
    tensors = read_header(folder / WEIGHTS)
    found: dict[str, Any] = {}
    expected = set()
    for entry in adapter_entries(config, lora):
        names = entry.hf_names(config)
        expected |= set(names)
        layers = [_read(tensors, name, folder) for name in names]
        shapes = {layer.shape for layer in layers}
        if len(shapes) > 1 or lora.rank not in next(iter(shapes)):
            raise ValueError(
                f"{folder / WEIGHTS}: {names[0]} and its like have shapes {sorted(shapes)}; expected rank {lora.rank}."
            )
        found[entry.path[-1]] = jnp.asarray(np.stack(layers).swapaxes(1, 2))
    extra = sorted(set(tensors) - expected)
    if extra:
        raise ValueError(f"{folder / WEIGHTS}: tensor {extra[0]} has no place in an adapter of {config.model_type}.")
    return found


def _read(tensors: Mapping[str, Tensor], name: str, folder: Path) -> np.ndarray:
    if name not in tensors:
        raise ValueError(f"{folder / WEIGHTS}: tensor {name} is missing; export the adapter again.")
    return tensors[name].read().astype(np.float32)
