"""What a check finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "unchecked", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One sentence about one thing that was checked."""

    what: str
    """A key of the config, or a thing such as `disk`."""
    level: Level
    """`error`: a later stage would refuse it, or keep nothing. `warning`: it may. `unchecked`: it cannot be known here,
    as where there is no network."""
    text: str = ""
