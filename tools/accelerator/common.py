"""What the sections share: shapes, packed rows, timing, and how a row of the table is handed to the parent."""

from __future__ import annotations

import gc
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
ROW = "bench-accelerator-row: "
GIB = 2**30
ROW_TOKENS, SEGMENTS = 8192, 6
TINY_TOKENS = 256
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 512,
}


def say(**row: Any) -> None:
    """Hands a row to the parent: at once, so that it is there even if the process dies later."""
    kept = {k: round(v, 6) if isinstance(v, float) else v for k, v in row.items() if v is not None}
    print(ROW + json.dumps(kept), flush=True)


def timed(f: Callable[[], Any], *, steps: int = 5, warm: int = 2) -> float:
    """Median seconds of some calls, after a few; `f` returns once all is done."""
    seconds = []
    for _ in range(warm + steps):
        begun = time.perf_counter()
        f()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds[warm:])


def shape_of(name: str, tiny: bool) -> dict[str, Any]:
    """A published student's config by its name, or a few thousand parameters in its stead."""
    from jaxdistill.models import published

    tables = [v for k, v in vars(published).items() if isinstance(v, dict) and not k.startswith("_")]
    found = {k: v[0] for table in tables for k, v in table.items() if isinstance(v, tuple)}
    return found[name] | (TINY if tiny else {})


def packed_rows(rows: int, tokens: int, vocabulary: int, segments: int) -> dict[str, np.ndarray]:
    """Rows of random tokens, each cut into segments at random places: a fifth prompt, the rest reasoning and answer."""
    rng = np.random.default_rng(0)
    ids, positions, regions = (np.zeros((rows, tokens), np.int32) for _ in range(3))
    for row in range(rows):
        real = tokens - tokens // 80  # the end is padding, as in most packed rows
        inner = np.sort(rng.choice(np.arange(8, real - 8), segments - 1, replace=False))
        cuts = [0, *inner.tolist(), real]
        for number, (start, end) in enumerate(itertools.pairwise(cuts), 1):
            length = end - start
            ids[row, start:end], positions[row, start:end] = number, np.arange(length)
            regions[row, start + length // 5 : end] = 1
            regions[row, end - length // 20 : end] = 2
    found = rng.integers(0, vocabulary, (rows, tokens)).astype(np.int32)
    return {"tokens": found, "segment_ids": ids, "positions": positions, "regions": regions.astype(np.uint8)}


def free_device() -> str:
    """PyTorch's device, without what earlier jobs of this process have left there."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return "cuda"


def peak_of(name: str) -> float | None:
    """A device's FLOP/s in bf16 by its name; None if it is not known."""
    from jaxdistill.train.flops import peak_flops

    return peak_flops(SimpleNamespace(device_kind=name))


def short(error: BaseException) -> str:
    """One line about an error; a missing package by its name."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"the package {error.name.split('.')[0]} is missing"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
