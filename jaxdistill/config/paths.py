"""The files and folders that a config names. They are relative to the working folder, as on the command line.

A YAML file in another folder may be meant otherwise by who wrote it; `conflict` says so where it makes a difference.
"""

from __future__ import annotations

import dataclasses
import filecmp
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FIELDS = {
    "RunConfig": ("run_dir",),
    "ProblemsConfig": ("path",),
    "BenchmarkConfig": ("path",),
    "TracesConfig": ("teacher", "styles_file"),
    "DecontaminateConfig": ("files",),
    "JudgeConfig": ("model",),
    "SourceConfig": ("run",),
    "DataConfig": ("chat_template",),
    "StudentConfig": ("init", "tokenizer"),
    "DistillConfig": ("teacher",),
}
"""Section -> keys that hold a path, or the name of something that need not be one."""
NAMES = ("teacher", "model", "init", "tokenizer", "chat_template")
"""Keys that may name a repository of the hub, or what is built in, as well."""


@dataclasses.dataclass(frozen=True)
class NamedPath:
    """A path in a config."""

    key: str
    value: str

    @property
    def where(self) -> Path:
        """The absolute path."""
        return Path(self.value).expanduser().absolute()

    @property
    def is_output(self) -> bool:
        return self.key == "run_dir"

    @property
    def may_be_name(self) -> bool:
        return self.key.split(".")[-1] in NAMES

    @property
    def is_relative(self) -> bool:
        return not Path(self.value).expanduser().is_absolute()


def paths_of(section: Any, prefix: str = "") -> Iterator[NamedPath]:
    """Every path in a config, in the order of its keys; those of the hub (`hf://`) are none."""
    wanted = FIELDS.get(type(section).__name__, ())
    for field in dataclasses.fields(section):
        value, key = getattr(section, field.name), prefix + field.name
        if field.name in wanted:
            found = value if isinstance(value, dict) else {"": value}
            for name, text in found.items():
                if isinstance(text, str) and "://" not in text:
                    yield NamedPath(f"{key}.{name}" if name else key, text)
        elif dataclasses.is_dataclass(value):
            yield from paths_of(value, f"{key}.")
        elif isinstance(value, tuple):
            for number, each in enumerate(value):
                if dataclasses.is_dataclass(each):
                    yield from paths_of(each, f"{key}.{number}.")


def conflict(path: NamedPath, yaml_folder: Path) -> str | None:
    """What to say where the folder of the YAML file has something of that name too, and it is something else.

    Returns:
      None where there is nothing to say: most often.
    """
    if path.is_output or not path.is_relative:
        return None
    beside = (yaml_folder / Path(path.value)).absolute()
    if beside.resolve() == path.where.resolve() or not beside.exists():
        return None
    if not path.where.exists():
        if path.may_be_name and not path.value.startswith("."):
            return f"{path.key}: {beside} is there, beside the YAML file, and is not taken; name it by that path."
        return (
            f"{path.key}: {path.where} is not there, and paths are relative to the working folder; {beside} is there, "
            "beside the YAML file: name it by that path, or give the command there."
        )
    if beside.is_file() and path.where.is_file() and filecmp.cmp(beside, path.where, shallow=False):
        return None
    return (
        f"{path.key}: {path.where} is taken, as paths are relative to the working folder; {beside}, beside the YAML "
        "file, is another one."
    )
