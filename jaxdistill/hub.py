"""Where checkpoints come from: a local folder, the demo teacher in this package, or the Hugging Face hub."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

DEMO = "demo"
ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""PEFT's."""
SHAPE = "model.json"
"""Beside the checkpoints of a training: the model's shape, in Hugging Face's names."""
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")
"""Suffixes of weights that are not read."""


def demo_teacher() -> Path:
    """The folder of the demo teacher that ships with the package."""
    return Path(str(importlib.resources.files("jaxdistill") / "demo" / "teacher"))


def local(name: str) -> Path:
    """The folder that a checkpoint's name means, if it means one."""
    return demo_teacher() if name == DEMO else Path(name).expanduser()


def fetch(name: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """The local folder of a checkpoint, downloaded first if `name` is a hub repository id.

    Args:
      name: an existing folder, `demo`, or a repository id such as `Qwen/Qwen3-8B`.
      weights: also require safetensors; False where a tokenizer alone is wanted.
    Raises:
      ValueError: nothing there, or no weights in it.
    """
    folder = local(name)
    if not folder.is_dir():
        if name.startswith((".", "/", "~")) or name.count("/") != 1:
            raise ValueError(
                f"{name}: no such folder; give a Hugging Face checkpoint's folder or a repository id (owner/name)."
            )
        folder = _download(name, revision, weights)
    if weights and (folder / ADAPTER).is_file() and not is_adapter(folder):
        raise ValueError(
            f"{folder}: a whole model and {ADAPTER}, and programs differ in what they make of both; move the adapter "
            "to a folder of its own, or merge it into the model with PEFT and remove it."
        )
    needed = ["tokenizer.json"] if not weights else [] if is_adapter(folder) else ["config.json"]
    for file in needed:
        if not (folder / file).is_file():
            if weights and (folder / ADAPTER_WEIGHTS).is_file():
                raise ValueError(
                    f"{folder}: the weights of adapters and no {ADAPTER}, which says what they are and of which base; "
                    "copy it from where they were trained, or save them again with PEFT."
                )
            raise ValueError(
                f"{folder}: no {file}; it is not a Hugging Face checkpoint"
                + (" with a fast tokenizer." if not weights else ".")
            )
    if weights and not any(folder.glob(ADAPTER_WEIGHTS if is_adapter(folder) else "*.safetensors")):
        raise ValueError(_no_weights(folder, downloaded=folder != local(name)))
    return folder


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds adapters in PEFT's format, and no whole model beside them."""
    whole = any(not file.name.startswith("adapter_") for file in folder.glob("*.safetensors"))
    whole |= any(folder.glob("pytorch_model*.bin"))  # others, such as training_args.bin, are left by trainers
    return (folder / ADAPTER).is_file() and not ((folder / "config.json").is_file() and whole)


def is_checkpoints(name: str) -> bool:
    """Whether `name` is a folder of training checkpoints of ours, and no Hugging Face checkpoint."""
    return (local(name) / SHAPE).is_file() and not (local(name) / "config.json").is_file()


def _no_weights(folder: Path, *, downloaded: bool) -> str:
    """Why a checkpoint without safetensors cannot be loaded, and what to do."""
    convert = "AutoModelForCausalLM.from_pretrained(...).save_pretrained(FOLDER)"
    others = sorted(f.name for f in folder.iterdir() if f.suffix in OTHER_WEIGHTS)
    if is_adapter(folder):
        others = [name for name in others if name.startswith("adapter_")]
        found = (
            f"its weights are {others[0]}, and only safetensors are read"
            if others
            else f"an adapter without weights ({ADAPTER_WEIGHTS})"
        )
        return f"{folder}: {found}; save it again with PEFT: PeftModel.from_pretrained(...).save_pretrained(FOLDER)."
    if others:
        return f"{folder}: its weights are {others[0]}, and only safetensors are read; convert them: {convert}."
    if (folder / "model.safetensors.index.json").is_file():
        return f"{folder}: an index, and none of the weights (*.safetensors) it names; download the checkpoint again."
    if downloaded:
        return f"{folder}: the repository has no weights in *.safetensors; if it has others, convert them: {convert}."
    return f"{folder}: no weights (*.safetensors) in it; export or download the checkpoint again."


def revision_of(folder: Path) -> str:
    """What pins a checkpoint's content: the hub's commit, or a hash of a local folder's config and weight files."""
    if folder.parent.name == "snapshots":
        return folder.name
    import hashlib

    digest = hashlib.sha256()
    for file in sorted([folder / (ADAPTER if is_adapter(folder) else "config.json"), *folder.glob("*.safetensors")]):
        digest.update(file.name.encode())
        # a safetensors header names every tensor; together with the tail of the data it tells checkpoints apart
        with open(file, "rb") as stream:
            digest.update(stream.read(1 << 20))
            stream.seek(max(0, file.stat().st_size - (1 << 20)))
            digest.update(stream.read())
    return "sha256:" + digest.hexdigest()[:16]


def read_config(folder: Path) -> dict:
    """`config.json` of a checkpoint.

    Raises:
      ValueError: it is not a JSON object.
    """
    return _read_object(folder / "config.json")


def read_generation_config(folder: Path) -> dict:
    """`generation_config.json` of a checkpoint; empty if there is none.

    Raises:
      ValueError: it is not a JSON object.
    """
    path = folder / "generation_config.json"
    return _read_object(path) if path.is_file() else {}


def _read_object(path: Path) -> dict:
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:  # of the JSON or of the characters in it
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: a JSON {type(found).__name__} instead of an object; download it again.")
    return found


def licence_of(name: str, revision: str | None = None) -> str | None:
    """The licence that a checkpoint's model card states, as `apache-2.0`; None if it is not known here.

    Looks at a folder, the demo teacher, or what has been downloaded before; never downloads.
    """
    import yaml

    folder = local(name)
    card: Any = folder / "README.md"
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            card = try_to_load_from_cache(name, "README.md", revision=revision)
        except HFValidationError:
            return None
    if not isinstance(card, str | Path) or not Path(card).is_file():
        return None
    start, _, rest = Path(card).read_text(errors="replace").partition("---\n")
    if start:
        return None
    try:
        front = yaml.safe_load(rest.partition("\n---")[0])
    except yaml.YAMLError:
        return None
    licence = front.get("license") if isinstance(front, dict) else None
    if licence == "other":  # the name is then given beside it
        licence = front.get("license_name") or licence
    return str(licence) if licence else None


def fetch_data(name: str, patterns: list[str], revision: str | None = None) -> Path:
    """The local folder of a data set of the hub, with the files that the patterns name.

    Raises:
      ValueError: it cannot be had.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        cause = _first_line(error)
        raise ValueError(f"{name}: not to be had from the hub ({cause}); name a local file in `path`.") from None


def _download(name: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "*.jinja", "*.txt", "*.model", "README.md"] + (["*.safetensors"] if weights else [])
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        cause = _first_line(error)
        raise ValueError(f"{name}: neither a local folder nor to be had from the hub ({cause}).") from None


def list_data(name: str, revision: str | None, say: Callable[[str], None]) -> tuple[str, list[str]]:
    """(commit, names of all files) of a data set of the hub; without a network, of what its cache holds.

    Args:
      say: is told where the cache is read instead, which may hold fewer files.
    Raises:
      ValueError: no such data set or revision, one that wants a token, or neither a network nor the set in the cache.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        info = HfApi().dataset_info(name, revision=revision, timeout=30)
    except HFValidationError as error:
        raise ValueError(f"{name}: no name of a data set of the hub ({_first_line(error)}).") from None
    except HfHubHTTPError.__bases__ as error:  # what a connection that fails raises, too
        if said := _refused(name, revision, error):
            raise ValueError(said) from None
        found = _cached_data(name, revision)
        if found is None:
            at = f" at revision {revision}" if revision else ""
            raise ValueError(
                f"{name}{at}: the hub cannot be reached ({_first_line(error)}), and the cache does not have it; try "
                "again with a network, or name local files in path."
            ) from None
        say(
            f"  {name}: the hub cannot be reached ({_first_line(error)}); its cache is read instead: {len(found[1]):,} "
            f"file(s) of commit {found[0][:12]}"
        )
        return found
    assert info.sha is not None
    return info.sha, sorted(file.rfilename for file in info.siblings or ())


def fetch_file(name: str, commit: str, file: str) -> Path:
    """The local path of one file of a data set, fetched if the cache does not have it.

    Raises:
      ValueError: it cannot be had.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    try:
        return Path(hf_hub_download(name, file, repo_type="dataset", revision=commit))
    except (*HfHubHTTPError.__bases__, EntryNotFoundError) as error:
        said = _refused(name, commit, error)
        raise ValueError(
            said
            or f"{name}: {file} of commit {commit[:12]} cannot be fetched ({_first_line(error)}); give the command "
            "again: what the cache has is not fetched anew."
        ) from None


def _refused(name: str, revision: str | None, error: BaseException) -> str | None:
    """What the hub says against giving a data set; None if it was not the hub that spoke."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        page = f"https://huggingface.co/datasets/{name}"
        return f"{name}: a gated data set; ask for access at {page}, and set HF_TOKEN to a token of that account."
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{name}: no revision {revision!r}; name a commit, branch or tag of it."
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{name}: no such data set on the hub, or a private one; check the name, or set HF_TOKEN."
    if isinstance(error, errors.DisabledRepoError):
        return f"{name}: the hub has disabled it."
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", 500)
    if status in (401, 403):
        return f"{name}: the hub refuses it ({_first_line(error)}); set HF_TOKEN to a token that may read it."
    return None


def _cached_data(name: str, revision: str | None) -> tuple[str, list[str]] | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, repo_type="dataset", revision=revision, local_files_only=True))
    except LocalEntryNotFoundError as error:  # an incomplete one is there all the same, and may have what is wanted
        if not (path := getattr(error, "snapshot_path", None)):
            return None
        folder = Path(path)
    return folder.name, sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
