"""Is a checkpoint read here as transformers reads it? Asked once, before anything is learned from it."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxdistill import __version__, hub, progress
from jaxdistill.models.adapters import base_of
from jaxdistill.models.decoder import Decoder
from jaxdistill.models.load import load_hf, params_of
from jaxdistill.models.parity import Comparison, compare_files, compare_with_transformers
from jaxdistill.models.tensor_files import open_tensors
from jaxdistill.parallel import mesh as meshes
from jaxdistill.parallel import processes
from jaxdistill.records import atomic_file

REMEMBERED = 500
"""Checkpoints that the file remembers; the newest are kept."""


def load_checked(
    name: str | Path,
    mesh: Mesh | None = None,
    rules: Mapping[str, Any] = meshes.RULES,
    dtype: Any = "float32",
    *,
    check: bool,
    param_dtype: str = "float32",
    revision: str | None = None,
) -> Decoder:
    """`load_hf`, whose arguments these are, and `check_start` of what was loaded.

    Raises:
      ValueError: as those two; what can be said before loading is said before.
    """
    folder = hub.fetch(str(name), revision)
    check = check and needs_check(folder)
    model = load_hf(folder, mesh, rules, dtype, param_dtype=param_dtype)
    if check:
        check_start(folder, model)
    return model


def check_start(folder: Path, model: Decoder | None = None, *, seen: Path | None = None) -> Comparison | None:
    """Compares a checkpoint with transformers before anything is trained from it, once for every content.

    Every process calls this, and the folder is seen by all. What agreed is remembered by the files' names, sizes and
    times, and by the versions and the code that computed it.

    Args:
      model: what `load_hf` made of the folder. It is computed where it lies, over its mesh. One that was rounded or
        quantized when it was loaded is left alone, and the files are computed instead, layer by layer, in the first
        process; so they are without a model.
      seen: see `needs_check`.
    Returns:
      What was found; None if it was compared before.
    Raises:
      ValueError: in every process: they differ, transformers does not load it, or torch is not installed.
    """
    seen = seen or _cache_folder() / "checked.json"
    if not needs_check(folder, seen=seen):
        return None
    begun, mark = time.monotonic(), processes.by_first(lambda: _fingerprint(folder))  # of what is compared now
    if model is not None and is_exact(model, folder):
        found = compare_with_transformers(model, folder)
    else:
        found = compare_files(folder)
    if not found.agrees:
        raise ValueError(
            f"{folder}: {found}: it is another model here than there, and training would start from it; look for what "
            "its config.json says twice or in an unusual way, or set student.check: false if you know why."
        )
    processes.by_first(lambda: _remember(seen, str(mark), folder, found))
    progress.say(
        f"  {folder} is what transformers makes of it: logits differ by at most {found.max_difference:.1e} of "
        f"{found.logit_scale:.1f} ({time.monotonic() - begun:.0f} s)"
    )
    return found


def needs_check(folder: Path, *, seen: Path | None = None) -> bool:
    """Whether a checkpoint has not been compared before; all processes call this, and the first one decides.

    The demo teacher needs none: it is this package's, whose tests compare it.

    Args:
      seen: the file that remembers; `checked.json` in the user's cache folder if absent.
    Raises:
      ValueError: it has to be compared, and torch is not installed where the first process runs.
    """
    if folder == hub.demo_teacher():
        return False
    seen = seen or _cache_folder() / "checked.json"

    def decide() -> bool:
        if _fingerprint(folder) in _read_seen(seen):
            return False
        if importlib.util.find_spec("torch") is None:
            # a check that is left out in silence is none, and the export's at the end of the run needs torch as well
            raise ValueError(
                f"{folder}: before anything is learned from it, it is compared with transformers, which needs torch "
                "(of any kind; processors will do), and that is not installed; pip install 'jaxdistill[torch]' where "
                "the first process runs, or set student.check: false."
            )
        return True

    needed = processes.by_first(decide)
    return bool(needed if jax.process_count() == 1 else processes.tell(np.array(bool(needed))))


def is_exact(model: Decoder, folder: Path) -> bool:
    """Whether a model holds the very numbers of a folder's files."""
    dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(params_of(model))}
    if dtypes == {"float32"}:
        return True  # a superset of what files are stored in
    if dtypes != {"bfloat16"} or hub.is_adapter(folder):
        return False
    return all(tensor.dtype == "BF16" for tensor in open_tensors(folder).values())


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxdistill"


def _fingerprint(folder: Path) -> str:
    """Of a checkpoint's files, and of what computes with them here."""
    digest = hashlib.sha256()
    versions = [f"{name} {metadata.version(name)}" for name in ("jax", "transformers")]
    digest.update(repr((__version__, versions, jax.default_backend())).encode())
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    for place in dict.fromkeys((folder, base_of(folder))):
        for file in sorted([*place.glob("*.safetensors"), *place.glob("*.json")]):
            known = file.stat()
            digest.update(repr((str(file.resolve()), known.st_size, known.st_mtime_ns)).encode())
    return digest.hexdigest()[:32]


def _read_seen(seen: Path) -> dict[str, Any]:
    """Empty if there is none, or it is broken: then it is compared again."""
    try:
        found = json.loads(seen.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _remember(seen: Path, mark: str, folder: Path, found: Comparison) -> None:
    entry = {"folder": str(folder), "max_difference": found.max_difference, "logit_scale": found.logit_scale}
    known = list((_read_seen(seen) | {mark: entry}).items())
    try:
        seen.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(seen) as temporary:
            temporary.write_text(json.dumps(dict(known[-REMEMBERED:]), indent=1) + "\n")
    except OSError as error:  # a home that cannot be written costs another comparison, nothing else
        progress.say(f"  {seen}: {error.strerror or error}; {folder} will be compared with transformers again")
