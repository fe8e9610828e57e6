"""What can be known of a run before anything is paid for: no weights are loaded, and only small files are fetched."""

from jaxdistill.preflight.checks import check, refuse
from jaxdistill.preflight.finding import Finding

__all__ = ["Finding", "check", "refuse"]
