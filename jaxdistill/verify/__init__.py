"""Verification: which traces may be learned from, and why the others may not."""

from jaxdistill.verify.answers import Check, check_math, compare_math
from jaxdistill.verify.code import check_code

__all__ = ["Check", "check_code", "check_math", "compare_math"]
