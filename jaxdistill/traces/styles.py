"""How the teacher is asked: system prompts, the frame around a problem and few-shot turns, all of them data (YAML)."""

from __future__ import annotations

import dataclasses
import difflib
import re
from pathlib import Path
from typing import Any

import yaml

PACKAGED = Path(__file__).with_name("styles.yaml")
HOLE = "{problem}"
_KEYS = {"system", "prompt", "examples", "source"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Style:
    """One way to ask; `styles.yaml` says what its parts are."""

    name: str
    system: str | None = None
    prompt: str = HOLE
    examples: tuple[tuple[str, str], ...] = ()
    """(problem, response) turns before the problem."""
    source: str = ""

    def messages(self, problem: str, *, system: str | None = None, suffix: str = "") -> list[dict[str, str]]:
        """The chat that asks for one problem.

        Args:
          system: the system prompt of a style that has none.
          suffix: added to the user's turn.
        """
        chat = []
        if self.system or system:
            chat.append({"role": "system", "content": self.system or system or ""})
        for question, response in self.examples:
            chat += [{"role": "user", "content": question}, {"role": "assistant", "content": response}]
        # not str.format: a prompt may hold other braces, as \boxed{} does
        return [*chat, {"role": "user", "content": self.prompt.replace(HOLE, problem) + suffix}]


def load_styles(names: tuple[str, ...], file: str | None = None) -> list[Style]:
    """Styles by name, from the package's file and from one's own.

    Raises:
      ValueError: no such file or style (the nearest is named), or an entry that is no style.
    """
    known = read_styles(PACKAGED) | (read_styles(Path(file).expanduser()) if file else {})
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}."
            raise ValueError(f"traces.styles: {name!r} is not known; {hint}")
    return [known[name] for name in names]


def read_styles(path: Path) -> dict[str, Style]:
    """All styles of one file, by name."""
    try:
        data = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ValueError(f"{path}: {str(error.strerror).lower()}; name a YAML file in traces.styles_file.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected a mapping of style names, found {type(data).__name__}.")
    return {str(name): _style(str(name), entry, f"{path}: {name}") for name, entry in data.items()}


def _style(name: str, entry: Any, where: str) -> Style:
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ValueError(f"{where}: a style's name has only letters, digits, - and _; it becomes part of trace ids.")
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: expected a mapping of {', '.join(sorted(_KEYS))}, found {type(entry).__name__}.")
    unknown = sorted(map(str, entry.keys() - _KEYS))
    if unknown:
        raise ValueError(f"{where}: unknown key {unknown[0]}; known are {', '.join(sorted(_KEYS))}.")
    for key in ("system", "prompt", "source"):
        if key in entry and not (isinstance(entry[key], str) and entry[key].strip()):
            raise ValueError(f"{where}.{key} is {entry[key]!r}; write text, or leave the key out.")
    prompt = entry.get("prompt", HOLE)
    if prompt.count(HOLE) != 1:
        raise ValueError(f"{where}.prompt holds {HOLE} {prompt.count(HOLE)} times; the problem goes in exactly once.")
    return Style(
        name=name,
        system=entry.get("system"),
        prompt=prompt,
        examples=tuple(_example(example, where) for example in entry.get("examples") or ()),
        source=entry.get("source", ""),
    )


def _example(example: Any, where: str) -> tuple[str, str]:
    if not isinstance(example, dict) or set(example) != {"problem", "response"}:
        raise ValueError(f"{where}.examples: each is a mapping of `problem` and `response`.")
    if not all(isinstance(text, str) and text.strip() for text in example.values()):
        raise ValueError(f"{where}.examples: `problem` and `response` are texts; quote numbers.")
    return example["problem"], example["response"]
