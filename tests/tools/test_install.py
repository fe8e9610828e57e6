"""tools/install.sh where something is wrong; that it installs is shown by every run of tools/test.sh."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The part of the repository that the script reads."""
    shutil.copytree(ROOT / "tools", tmp_path / "tools", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def install(copy: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    # without an index every step fails at once, so that nothing is downloaded here
    nowhere = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull, "PYTHON": sys.executable}
    return subprocess.run(
        ["bash", str(copy / "tools/install.sh"), "run"],
        env=os.environ | nowhere | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_without_a_fitting_python_it_says_which_it_needs(copy: Path):
    ran = install(copy, PYTHON="/nowhere/python3")
    assert ran.returncode == 1
    assert ran.stderr.count("\n") == 1
    assert ran.stderr.startswith("error: no Python 3.11 to 3.14 found (looked for /nowhere/python3)")
    assert not (copy / ".venv").exists()


def test_an_interrupted_install_starts_anew_and_a_failed_step_stops_with_the_reason(copy: Path):
    venv = copy / ".venv"
    left = venv / "lib/half_a_package.py"
    left.parent.mkdir(parents=True)
    left.touch()
    (venv / "jaxdistill-install-unfinished").touch()
    (venv / "jaxdistill-install.log").write_text("Installing collected packages: a, b\n")
    ran = install(copy)
    assert "The last install was interrupted; making .venv anew." in ran.stdout
    assert not left.exists()

    assert ran.returncode == 1
    assert "error: this step failed: PyTorch" in ran.stderr
    assert "No matching distribution found for torch==2.13.0" in ran.stderr
    assert "run the same command again" in ran.stderr
    assert "Installed." not in ran.stdout
    assert not list(venv.glob("*.stamp"))
    # pip had not begun to install, so the next try builds on what is there
    assert not (venv / "jaxdistill-install-unfinished").exists()


def test_a_venv_of_somebody_elses_is_not_thrown_away(copy: Path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(copy / ".venv")], check=True, timeout=60)
    own = copy / ".venv/mine.txt"
    own.write_text("keep me")
    ran = install(copy)
    assert own.read_text() == "keep me"
    assert "adding pip" not in ran.stderr
    assert "this step failed: PyTorch" in ran.stderr
