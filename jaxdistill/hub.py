"""Where checkpoints come from: a local folder, the demo teacher in this package, or the Hugging Face hub."""

from __future__ import annotations

import importlib.resources
import json
from pathlib import Path

DEMO = "demo"


def demo_teacher() -> Path:
    """The folder of the demo teacher that ships with the package."""
    return Path(str(importlib.resources.files("jaxdistill") / "demo" / "teacher"))


def fetch(name: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """The local folder of a checkpoint, downloaded first if `name` is a hub repository id.

    Args:
      name: an existing folder, `demo`, or a repository id such as `Qwen/Qwen3-8B`.
      weights: also require safetensors; False where a tokenizer alone is wanted.
    Raises:
      ValueError: nothing there, or no weights in it.
    """
    folder = demo_teacher() if name == DEMO else Path(name)
    if not folder.is_dir():
        if name.startswith((".", "/", "~")) or name.count("/") != 1:
            raise ValueError(
                f"{name}: no such folder; give a Hugging Face checkpoint's folder or a repository id (owner/name)."
            )
        folder = _download(name, revision, weights)
    needed = ["config.json"] if weights else ["tokenizer.json"]
    for file in needed:
        if not (folder / file).is_file():
            raise ValueError(
                f"{folder}: no {file}; it is not a Hugging Face checkpoint"
                + (" with a fast tokenizer." if not weights else ".")
            )
    if weights and not any(folder.glob("*.safetensors")):
        raise ValueError(f"{folder}: no weights (*.safetensors) in it; export or download the checkpoint again.")
    return folder


def revision_of(folder: Path) -> str:
    """What pins a checkpoint's content: the hub's commit, or a hash of a local folder's config and weight files."""
    if folder.parent.name == "snapshots":
        return folder.name
    import hashlib

    digest = hashlib.sha256()
    for file in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        digest.update(file.name.encode())
        # a safetensors header names every tensor; together with the tail of the data it tells checkpoints apart
        with open(file, "rb") as stream:
            digest.update(stream.read(1 << 20))
            stream.seek(max(0, file.stat().st_size - (1 << 20)))
            digest.update(stream.read())
    return "sha256:" + digest.hexdigest()[:16]


def read_config(folder: Path) -> dict:
    """`config.json` of a checkpoint."""
    try:
        return json.loads((folder / "config.json").read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder}/config.json: not valid JSON: {error}") from None


def _download(name: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "*.jinja", "*.txt", "*.model"] + (["*.safetensors"] if weights else [])
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        cause = str(error).strip().splitlines()[0]
        raise ValueError(f"{name}: neither a local folder nor to be had from the hub ({cause}).") from None
