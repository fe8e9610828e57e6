"""Is a model the one that transformers makes of a folder? Logits and hidden states, compared in fp32.

Both sides are computed layer by layer, so that a model of any size can be compared: ours where its parameters lie, or
from the files (`layerwise`), transformers' from the files (`reference`). Processes that share a model all take part in
computing it; the first one asks transformers, and all are told what came out.

A few tokens use all weights but the rows of an embedding that is not the vocabulary projection too: these are compared
with the file's, number by number.

Dimension key: B rows, T tokens, N kept positions, E width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

from jaxdistill import hub
from jaxdistill.models.adapters import base_of, read_adapter, read_peft
from jaxdistill.models.config import ModelConfig
from jaxdistill.models.decoder import Decoder
from jaxdistill.models.layerwise import FromFiles, FromModel, Outputs, forward, host_layers
from jaxdistill.models.lora import Lora, is_adapter
from jaxdistill.models.names import EMBEDDING
from jaxdistill.models.tensor_files import open_tensors
from jaxdistill.parallel import processes

TOLERANCE = 1e-4
"""Of the largest number on transformers' side: what fp32 sums in another order may differ by."""
TOKENS, MOST_TOKENS = 64, 1088
"""Random tokens a row: so many, or more where that shows a sliding window at work, but no more than the second."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Largest absolute differences of our numbers from transformers', and the largest numbers on their side."""

    max_difference: float
    """Of the logits."""
    logit_scale: float
    states: tuple[tuple[float, float], ...]
    """(difference, scale) of the hidden states at the last positions: of the embedding, then after every layer."""
    wrong_rows: int = 0
    """Rows of an untied embedding that are not the file's."""

    @property
    def agrees(self) -> bool:
        return _near(self.max_difference, self.logit_scale) and not self.wrong_rows

    @property
    def place(self) -> str:
        """Where the two first differ."""
        first = next((i for i, found in enumerate(self.states) if not _near(*found)), None)
        if self.wrong_rows:
            return "from the embedding on"
        if first is None:
            return "only in the final norm or the vocabulary projection"
        return "from the embedding on" if first == 0 else f"first after layer {first} of {len(self.states) - 1}"

    def __str__(self) -> str:
        rows = f": {self.wrong_rows:,} of its rows are not the file's" if self.wrong_rows else ""
        return (
            f"transformers' logits differ by {self.max_difference:.2e} (largest logit {self.logit_scale:.1f}), "
            f"{self.place}{rows}"
        )


def compare_with_transformers(model: Decoder, folder: Path | None, *, dtype: str = "float32") -> Comparison:
    """Compares a model with what transformers computes from a folder. Every process that shares the model calls this.

    Args:
      model: without adapters, or with those that the folder holds alone, as PEFT has them.
      folder: with safetensors; None in processes other than the first, which need not see it.
      dtype: what the folder's weights were rounded to: ours are rounded likewise where they are used.
    Raises:
      ValueError: in every process: transformers does not load the folder, or torch (or PEFT) is not installed.
    """
    ids_BT = token_ids(model.config)
    if model.lora is None:
        source = FromModel(model, bf16=dtype == "bfloat16")
        ours, wrong_rows = forward(source, ids_BT), _wrong_rows(source, folder)

        def compare() -> Comparison:
            found = _compare(ours, _existing(folder), ids_BT)
            return dataclasses.replace(found, wrong_rows=wrong_rows())

        return _told(compare, model.config)
    # the base of adapters may be rounded or quantized here, which is no fault of theirs: its files are taken
    adapters = host_layers({name: x for name, x in model.layer_params().items() if is_adapter(name)})
    return _told(lambda: _compare_adapters(_existing(folder), ids_BT, model.lora, adapters), model.config)


def compare_files(folder: Path) -> Comparison:
    """Compares what we and transformers compute from the files of a folder: a whole model, or adapters on their base.

    Beside the activations of a few tokens, memory holds one layer. Every process may call this: the first one computes.

    Raises:
      ValueError: as `load_hf`, or transformers does not load it.
    """
    if jax.process_count() == 1:
        return _compare_files(folder)
    config = ModelConfig.from_hf(hub.read_config(base_of(folder)), str(folder))
    return _told(lambda: _compare_files(folder), config)


def _compare_files(folder: Path) -> Comparison:
    if hub.is_adapter(folder):
        lora, base = read_peft(folder)[0], base_of(folder)
        config = ModelConfig.from_hf(hub.read_config(base), f"{base}/config.json")
        adapters = {name: np.asarray(x) for name, x in read_adapter(folder, config, lora).items()}
        return _compare_adapters(folder, token_ids(config), lora, adapters)
    source = FromFiles(folder)
    ids_BT = token_ids(source.how.config)
    return _compare(forward(source, ids_BT), folder, ids_BT)


def token_ids(config: ModelConfig) -> np.ndarray:
    """Random tokens [B, T], the same for the same config: as many as show its sliding windows at work, if they can."""
    windows = [kind.window + TOKENS // 2 for kind in config.kinds if kind.window]
    T = max([TOKENS, *(n for n in windows if n <= MOST_TOKENS)])
    T = min(T, max(config.max_position_embeddings, TOKENS))
    return np.random.default_rng(0).integers(0, config.vocab_size, (2 if T <= 2 * TOKENS else 1, T), np.int32)


def _existing(folder: Path | None) -> Path:
    assert folder is not None, "the first process has the folder"
    return folder


def _compare(ours: Outputs, folder: Path, ids_BT: np.ndarray) -> Comparison:
    from jaxdistill.models.reference import reference

    theirs = reference(folder, ids_BT)
    logits, scale = _difference(ours.logits, theirs.logits)
    states = tuple(_difference(a, b) for a, b in zip(ours.hidden, theirs.hidden, strict=True))
    return Comparison(logits, scale, states)


def _compare_adapters(folder: Path, ids_BT: np.ndarray, lora: Lora, adapters: Mapping[str, np.ndarray]) -> Comparison:
    return _compare(forward(FromFiles(base_of(folder), lora, adapters), ids_BT), folder, ids_BT)


def _wrong_rows(source: FromModel, folder: Path | None) -> processes.Step[int]:
    """How many rows of an untied embedding are not the file's, to be asked in the first process, which compares.

    All processes gather the rows, block by block, so what goes wrong with the file is raised only when it is asked for.
    """
    wrong, error, tensor, start = 0, None, None, 0
    for block in () if source.how.config.tie_embeddings else source.embedding_blocks():
        if jax.process_index() == 0 and error is None:
            try:
                tensor = tensor or open_tensors(base_of(_existing(folder)))[EMBEDDING]
                theirs = tensor.read((slice(start, start + len(block)), slice(None)))
                wrong += int(np.any(_number(block, source.how.bf16) != _number(theirs), axis=1).sum())
            except Exception as failed:  # any: the others are about to gather the next block
                error = failed
        start += len(block)

    def tell() -> int:
        if error is not None:
            raise error
        return wrong

    return tell


def _number(x: np.ndarray, bf16: bool = False) -> np.ndarray:
    """In fp32, without the subnormal numbers, which accelerators may flush to 0."""
    x = x.astype(ml_dtypes.bfloat16) if bf16 else x
    x = x.astype(np.float32)
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.float32(0), x)


def _difference(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    # position by position: logits are large
    pairs = [(np.abs(a - b).max(), np.abs(b).max()) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y)]  # noqa: B905
    difference, scale = np.max(pairs, axis=0)
    return float(difference), float(scale)


def _near(difference: float, scale: float) -> bool:
    return difference <= TOLERANCE * scale < math.inf  # False for NaN, and where transformers gives infinity


def _told(compare: processes.Step[Comparison], config: ModelConfig) -> Comparison:
    """What the first process finds, in all of them."""
    found = processes.by_first(compare)
    if jax.process_count() == 1:
        assert found is not None
        return found
    pairs = np.zeros((config.num_layers + 3, 2))
    if found is not None:
        pairs[:] = [(found.wrong_rows, 0), (found.max_difference, found.logit_scale), *found.states]
    (rows, _), (difference, scale), *states = processes.tell(pairs).tolist()
    return Comparison(difference, scale, tuple((d, s) for d, s in states), int(rows))
