"""Which files of a repository are the data of one split, as the `datasets` library decides it. Pure functions of names.

Source: https://huggingface.co/docs/hub/datasets-data-files-configuration
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import yaml

from jaxdistill.traces import tables

_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Words in names of files and folders that say which split they are of."""
_SHARD = re.compile(r"(?:^|/)data/(?P<split>[^/]+?)-\d{5}-of-\d{5}[^/]*$")
_CONVERTED = re.compile(r"^(?P<config>[^/]+)/(?:partial-)?(?P<split>[^/]+)/\d{4}\.parquet$")
"""How the hub's own conversion to Parquet names files (revision `refs/convert/parquet`)."""
_PART = re.compile(r"^(?P<before>.*-)(?P<number>\d{5})-of-(?P<of>\d{5})(?P<behind>.*)$")
_MOST_SHOWN = 12


@dataclass(frozen=True)
class Chosen:
    """The files of one split."""

    config: str | None
    split: str
    files: tuple[str, ...]


def choose(names: list[str], readme: str, config: str | None, split: str | None, where: str) -> Chosen:
    """The files of a split, in the order of their names.

    Args:
      names: all files of the repository.
      readme: README.md, whose head may say which files make which configuration.
      where: what messages call the set.
    Raises:
      ValueError: no such configuration or split, several to choose from, no data, or a shard that is missing.
    """
    configs, default = _configs(readme, names)
    configs = configs or _by_names(names)
    if not configs:
        raise ValueError(_no_data(names, where))
    name = _pick_config(configs, config, default, where)
    splits = configs[name]
    if split is None and len(splits) == 1:
        split = next(iter(splits))
    if split not in splits:
        said = f"no split {split!r}; it has" if split else "it has the splits"
        advice = "for a part of one set count" if split and "[" in split else "name one with problems.split"
        raise ValueError(f"{where}: {said} {', '.join(splits)}; {advice}.")
    files = splits[split]
    _check_whole(files, where)
    suffixes = Counter(tables.suffix_of(file) for file in files)
    if len(suffixes) > 1:
        raise ValueError(
            f"{where}: split {split} has files of several kinds ({', '.join(suffixes)}); name those to read in path, "
            f"such as hf://datasets/OWNER/NAME/**{next(iter(suffixes))}."
        )
    return Chosen(name, split, tuple(files))


def matching(names: list[str], patterns: list[str]) -> list[str]:
    """The data files that any of some patterns names (`*` within a folder, `**` through folders), sorted."""
    found = set()
    for pattern in patterns:
        expression = re.compile(_regular(pattern.removeprefix("./").strip("/")))
        found |= {name for name in names if expression.fullmatch(name)}
        if not any(sign in pattern for sign in "*?["):  # a folder stands for what is in it
            found |= {name for name in names if name.startswith(pattern.removeprefix("./").strip("/") + "/")}
    return sorted(name for name in found if tables.is_data(PurePosixPath(name).name))


def listed(names: list[str]) -> str:
    """The data files for a message, the first of them."""
    data = [name for name in names if tables.is_data(PurePosixPath(name).name)] or names
    more = f" and {len(data) - _MOST_SHOWN} more" if len(data) > _MOST_SHOWN else ""
    return (", ".join(data[:_MOST_SHOWN]) or "none") + more


def _configs(readme: str, names: list[str]) -> tuple[dict[str | None, dict[str, list[str]]], str | None]:
    """Configuration -> split -> files, as the head of README.md has them, and which is the default."""
    found: dict[str | None, dict[str, list[str]]] = {}
    default = None
    for entry in _head(readme).get("configs") or ():
        if not isinstance(entry, dict) or not entry.get("config_name"):
            continue
        name = str(entry["config_name"])
        folder = str(entry.get("data_dir") or "").strip("/")
        inside = [n for n in names if n.startswith(folder + "/")] if folder else names
        if entry.get("data_files"):
            prefix = f"{folder}/" if folder else ""
            splits = {split: matching(inside, [prefix + p for p in ps]) for split, ps in _patterns(entry["data_files"])}
        else:
            splits = _by_words(inside)
        found[name] = {split: files for split, files in splits.items() if files}
        if entry.get("default") or (name == "default" and default is None):
            default = name
    return {name: splits for name, splits in found.items() if splits}, default


def _head(readme: str) -> dict[str, Any]:
    start, _, rest = readme.removeprefix("\ufeff").replace("\r\n", "\n").partition("---\n")
    try:
        found = yaml.safe_load(rest.partition("\n---")[0]) if not start.strip() else None
    except yaml.YAMLError:
        found = None
    return found if isinstance(found, dict) else {}


def _patterns(value: Any) -> list[tuple[str, list[str]]]:
    """(split, patterns) of `data_files`: a pattern, a list of them, a mapping, or a list of {split, path}."""
    if isinstance(value, dict):
        return [(str(split), _list(paths)) for split, paths in value.items()]
    entries = _list(value)
    if all(isinstance(entry, dict) for entry in entries):
        return [(str(entry.get("split", "train")), _list(entry.get("path", []))) for entry in entries]
    return [("train", [entry for entry in entries if isinstance(entry, str)])]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _by_names(names: list[str]) -> dict[str | None, dict[str, list[str]]]:
    """What the names alone say: the hub's own Parquet by configuration, anything else as one."""
    found: dict[str | None, dict[str, list[str]]] = {}
    for name in sorted(names):
        if match := _CONVERTED.match(name):
            found.setdefault(match["config"], {}).setdefault(match["split"], []).append(name)
    if found:
        return found
    splits = _by_words(names)
    return {None: splits} if splits else {}


def _by_words(names: list[str]) -> dict[str, list[str]]:
    """Split -> files: by `data/SPLIT-00000-of-00001`, else by words in their paths, else all are `train`."""
    data = sorted(name for name in names if tables.is_data(PurePosixPath(name).name) and not _hidden(name))
    shards = [(match["split"], name) for name in data if (match := _SHARD.search(name))]
    if not shards:
        shards = [(split, name) for name in data if (split := _split_of(name))]
    if not shards:
        shards = [("train", name) for name in data]
    found: dict[str, list[str]] = {}
    for split, name in shards:
        found.setdefault(split, []).append(name)
    return found


def _split_of(name: str) -> str | None:
    """The split that a path names in its file, else in its folders."""
    path = PurePosixPath(name)
    for part in (path.name, *reversed(path.parts[:-1])):
        words = re.split(r"[^a-zA-Z]+", part.lower())
        for split, known in _WORDS.items():
            if any(word in known for word in words):
                return split
    return None


def _hidden(name: str) -> bool:
    return any(part.startswith((".", "__")) for part in PurePosixPath(name).parts)


def _pick_config(configs: dict[str | None, Any], wanted: str | None, default: str | None, where: str) -> str | None:
    wanted = wanted if wanted is not None or default not in configs else default
    if wanted in configs:
        return wanted
    named = [name for name in configs if name is not None]
    if wanted is not None:
        said = f"it has {', '.join(named)}" if named else "it has none; leave problems.config out"
        raise ValueError(f"{where}: no configuration {wanted!r}; {said}.")
    if len(configs) == 1 or "default" in configs:
        return "default" if "default" in configs else next(iter(configs))
    raise ValueError(f"{where}: it has the configurations {', '.join(named)}; name one with problems.config.")


def _check_whole(files: list[str], where: str) -> None:
    """Of `x-00000-of-00004` all four are there: a cache may hold some, and a listing of one is no whole one."""
    there: dict[tuple[str, str, str], set[int]] = {}
    for file in files:
        if match := _PART.match(file):
            there.setdefault((match["before"], match["of"], match["behind"]), set()).add(int(match["number"]))
    for (before, of, behind), numbers in there.items():
        missing = sorted(set(range(int(of))) - numbers)
        if missing:
            raise ValueError(
                f"{where}: {before}{missing[0]:05d}-of-{of}{behind} is missing, {len(numbers)} of {int(of)} are there; "
                "fetch all of them, or name the files to read in path."
            )


def _no_data(names: list[str], where: str) -> str:
    if any(name.endswith(".py") for name in names):
        return f"{where}: its data comes from a script, which is not run; try problems.revision: refs/convert/parquet."
    suffixes = ", ".join(tables.SUFFIXES)
    return f"{where}: no data in it; expected files that end in {suffixes}, and it has {listed(names)}."


def _regular(pattern: str) -> str:
    """A pattern of paths as a regular expression."""
    parts = re.split(r"(\*\*/?|\*|\?|\[[^\]]+\])", pattern)
    signs = {"**": ".*", "**/": "(?:.*/)?", "*": "[^/]*", "?": "[^/]"}
    return "".join(
        signs.get(part, part.replace("[!", "[^") if part.startswith("[") and part.endswith("]") else re.escape(part))
        for part in parts
    )
