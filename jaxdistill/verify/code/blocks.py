"""Finds the program of a response: its last fenced block of Python, after its thinking."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass

MAX_PROGRAM = 100_000
"""Characters; a longer program is not run."""

_FENCE = re.compile(r"[ \t>]*(`{3,}|~{3,})[ \t]*([^`\n]*)")
_PYTHON = {"python", "python3", "py", "py3", "python 3", "{python}"}


@dataclass(frozen=True)
class Block:
    """A program, or the reason why there is none."""

    code: str | None
    reason: str = ""


def extract_code(response: str) -> Block:
    """The last Python block behind the last `</think>`, or the last block without a language if none says Python.

    A block that names another language (`text`, `bash`) is output or a command, and passed over. A last block that is
    not closed was cut off, and no earlier one is taken in its place.
    """
    content = response.rpartition("</think>")[2]
    if "<think>" in content:
        return Block(None, "truncated")
    tagged: list[str] = []
    plain: list[str] = []
    fence, lines, target = "", [], None
    for line in content.split("\n"):
        match = _FENCE.match(line)
        if fence:
            if match and match[1].startswith(fence) and not match[2].strip():
                if target is not None:
                    target.append("\n".join(lines))
                fence = ""
            else:
                lines.append(line)
        elif match:
            language = match[2].strip().lower()
            target = tagged if language in _PYTHON else plain if not language else None
            fence, lines = match[1], []
    if fence:
        return Block(None, "unclosed code block")
    found = tagged or plain
    if not found or not found[-1].strip():
        return Block(None, "no code block")
    if len(found[-1]) > MAX_PROGRAM:
        return Block(None, "too long")
    return Block(textwrap.dedent(found[-1]).strip("\n") + "\n")
