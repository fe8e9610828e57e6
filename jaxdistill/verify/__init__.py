"""Verification: which traces may be learned from, and why the others may not."""

from jaxdistill.verify.answers import Check, check_math, compare_math
from jaxdistill.verify.code import check_code
from jaxdistill.verify.pool import MathPool, check_math_many

__all__ = ["Check", "MathPool", "check_code", "check_math", "check_math_many", "compare_math"]
