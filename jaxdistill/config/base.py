"""What all config sections are made with."""

from __future__ import annotations

from typing import TypeVar, cast, dataclass_transform

import pydantic
from pydantic.dataclasses import dataclass

T = TypeVar("T")
SECTIONS: dict[str, type] = {}
"""Every section by its class's name."""
_STRICT = pydantic.ConfigDict(extra="forbid", validate_default=True)


@dataclass_transform(frozen_default=True, kw_only_default=True)
def section(cls: type[T]) -> type[T]:
    """A frozen, keyword-only dataclass that refuses unknown keys and wrong types."""
    made = cast("type[T]", dataclass(frozen=True, kw_only=True, config=_STRICT)(cls))
    SECTIONS[cls.__name__] = made
    return made


def require(condition: bool, message: str) -> None:
    """Raises ValueError with the message, in one line: what, where, what to do."""
    if not condition:
        raise ValueError(message)
