"""Verification: which traces may be learned from, and why the others may not."""

from jaxdistill.verify.answers import Check, check_math, compare_math

__all__ = ["Check", "check_math", "compare_math"]
