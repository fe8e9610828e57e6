"""Code: runs the program of a response where it can do no harm, and judges it where it cannot reach."""

from jaxdistill.config import CodeLimitsConfig as Limits
from jaxdistill.verify.code.blocks import extract_code
from jaxdistill.verify.code.check import check_code
from jaxdistill.verify.code.sandbox import Sandbox, SandboxError

__all__ = ["Limits", "Sandbox", "SandboxError", "check_code", "extract_code"]
