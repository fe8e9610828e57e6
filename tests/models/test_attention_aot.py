"""Attention's kernels compile for GPUs that are not here: one that no longer builds or fits fails these tests.

They need the compiler's environment: `jaxdistill plan CONFIG --make-environment gpu` makes it.
"""

import subprocess
from pathlib import Path

import pytest

from jaxdistill.plan import environments

pytestmark = pytest.mark.aot
TOOL = Path(__file__).parents[2] / "tools" / "compile_attention.py"


@pytest.mark.parametrize(
    ("chip", "heads", "options"),
    [("h100", "14,2,64", ()), ("h100", "4,4,80", ("--window", "700")), ("b200", "2,1,256", ())],
)
def test_triton_compiles_and_runs_forward_once(chip, heads, options):
    python = environments.find("gpu")
    if python is None:
        pytest.skip("no compiler for NVIDIA GPUs: jaxdistill plan CONFIG --make-environment gpu")
    shape = ["--tokens", "1024", "--heads", heads, *options]
    command = [python, TOOL, "--topology", f"{chip}:1", "--kernels", "auto", *shape]
    ran = subprocess.run(command, env=environments.variables(), capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "kernels {'attention_forward': 1, 'attention_keys': 1, 'attention_queries': 1}" in ran.stdout
