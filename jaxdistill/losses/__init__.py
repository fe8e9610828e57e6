"""Losses: pure functions of arrays, without any knowledge of models."""

from jaxdistill.losses.sequence import cross_entropy, shift

__all__ = ["cross_entropy", "shift"]
