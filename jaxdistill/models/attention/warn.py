"""Warnings that are given once a process."""

from __future__ import annotations

import functools
import warnings


@functools.cache
def warn_once(message: str) -> None:
    """One warning for each message."""
    warnings.warn(message, stacklevel=3)
