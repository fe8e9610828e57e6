"""Data sets of the Hugging Face hub as problems: which files of which commit, fetched one by one as they are read.

    problems: {source: messages, path: "hf://datasets/OWNER/NAME", split: train, revision: main}

Files are found as the `datasets` library finds them (https://huggingface.co/docs/hub/datasets-manual-configuration): by
`configs` in the head of README.md, else by their names. Scripts are never run. The commit that a branch stood for is
written down beside the problems, so that a run that goes on later reads the same rows. Without a network, what the
hub's cache holds is read. A private or gated set is read with the token in HF_TOKEN.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxdistill import hub
from jaxdistill.config import ProblemsConfig
from jaxdistill.progress import say
from jaxdistill.records import write_json
from jaxdistill.traces import hub_files, tables
from jaxdistill.traces.tables import DataFile

PINNED = "hub.json"
"""Beside the problems: what was read of the hub."""
PREFIXES = ("hf://datasets/", "hf://", "https://huggingface.co/datasets/")


@dataclasses.dataclass(frozen=True)
class Address:
    """`hf://datasets/OWNER/NAME@REVISION/FILES`, taken apart."""

    repo: str
    revision: str | None
    inside: str
    """Files in it, with `*` and `**`; empty for all that belong to the split."""


def is_address(path: str) -> bool:
    return path.startswith(PREFIXES)


def parse(config: ProblemsConfig) -> Address:
    """The address in `problems.path`.

    Raises:
      ValueError: it is none, or gives another revision than `problems.revision`.
    """
    path = str(config.path)
    rest = path.removeprefix(next(prefix for prefix in PREFIXES if path.startswith(prefix))).strip("/")
    owner, _, rest = rest.partition("/")
    name, _, inside = rest.partition("/")
    name, _, revision = name.partition("@")
    if not owner or not name or owner in ("models", "spaces", "buckets"):
        raise ValueError(f"{path}: no data set of the hub; write hf://datasets/OWNER/NAME.")
    # a branch may hold a `/`, which an address writes as %2F, and the hub's web page as `tree/BRANCH`
    revision = revision.replace("%2F", "/") or None
    if revision and config.revision and revision != config.revision:
        raise ValueError(f"{path}: it names another revision than problems.revision={config.revision}; name it once.")
    return Address(f"{owner}/{name}", revision or config.revision, inside)


def files(config: ProblemsConfig, pin: Path | None) -> list[DataFile]:
    """The files of the set, in their order; each is fetched when its rows are wanted.

    Args:
      pin: file that says which commit is read; it is written where it is not there or tells of another set.
    Raises:
      ValueError: no such set, split or configuration; or neither a network nor the set in the cache.
    """
    address = parse(config)
    asked = {"path": config.path, "config": config.config, "split": config.split, "revision": config.revision}
    known: dict[str, Any] = pinned(pin) if pin else {}
    if known.get("asked") != asked:
        known = _choose(config, address) | {"asked": asked, "repo": address.repo}
        if pin:
            write_json(pin, known)
        say(f"  {address.repo} at {known['commit'][:12]}: {len(known['files'])} file(s)")
    commit, names = known["commit"], known["files"]
    return [_file(address.repo, commit, name, names) for name in names]


def local_files(config: ProblemsConfig) -> list[DataFile]:
    """The files that `problems.path` names on this machine; of a copy of a hub set those of the split.

    Raises:
      ValueError: a folder without data, or with several splits or configurations and none named.
    """
    path = Path(str(config.path)).expanduser()
    if not path.is_dir() or (tables.has_data(path) and not (config.config or config.split)):
        return tables.local_files(path)
    names = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    readme = path / "README.md"
    card = readme.read_text(errors="replace") if readme.is_file() else ""
    found = hub_files.choose(names, card, config.config, config.split, str(path)).files
    return [DataFile(str(path / name), _stem(name, found), name, lambda name=name: path / name) for name in found]


def pinned(pin: Path) -> dict[str, Any]:
    """What was written down of the hub set that was read: `repo`, `commit`, `files`; empty if none was."""
    try:
        return json.loads(pin.read_text())
    except FileNotFoundError:
        return {}


def _choose(config: ProblemsConfig, address: Address) -> dict[str, Any]:
    commit, names = hub.list_data(address.repo, address.revision, say)
    readme = "README.md" if "README.md" in names and not address.inside else None
    text = hub.fetch_file(address.repo, commit, readme).read_text(errors="replace") if readme else ""
    where = f"{address.repo} at {commit[:12]}"
    if address.inside:
        chosen = hub_files.matching(names, [address.inside])
        if not chosen:
            raise ValueError(f"{where}: no file {address.inside}; it has {hub_files.listed(names)}.")
        return {"commit": commit, "files": chosen}
    found = hub_files.choose(names, text, config.config, config.split, where)
    return {"commit": commit, "config": found.config, "split": found.split, "files": list(found.files)}


def _stem(name: str, names: Sequence[str]) -> str:
    """A file's path without its endings, where no other one is called so, too."""
    stem = str(Path(name).with_name(Path(name).name.partition(".")[0] or Path(name).name))
    return stem if sum(other.startswith(f"{stem}.") for other in names) == 1 else name


def _file(repo: str, commit: str, name: str, names: list[str]) -> DataFile:
    return DataFile(
        name=f"hf://datasets/{repo}@{commit[:12]}/{name}",
        stem=_stem(name, names),
        source=f"{repo}@{commit[:12]}/{name}",
        fetch=lambda: hub.fetch_file(repo, commit, name),
    )
