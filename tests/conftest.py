"""What holds for every test: eight virtual CPU devices, strict JAX, no network, and types checked at every call.

Types and shapes are checked through `--jaxtyping-packages`, see pyproject.toml.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

_OUTSIDE = "JAXDISTILL_TESTS_OUTSIDE"
OUTSIDE: dict[str, str] = json.loads(os.environ.get(_OUTSIDE, "null")) or dict(os.environ)
"""The environment as it was before the settings below, which a worker of pytest-xdist finds already made."""
os.environ[_OUTSIDE] = json.dumps(OUTSIDE)

# JAX reads these when it is imported, so they have to be set before anything imports it
if "jax" in sys.modules:
    raise RuntimeError("jax was imported before tests/conftest.py; a pytest plugin does it: run with -p no:NAME.")
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
XLA = [
    "--xla_force_host_platform_device_count=8",
    # eight devices that wait for each other on a busy machine need more than XLA's 40 s before it ends the process
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds=300",
    "--xla_cpu_collective_call_terminate_timeout_seconds=600",
]
os.environ["XLA_FLAGS"] = " ".join([*OUTSIDE.get("XLA_FLAGS", "").split(), *XLA])
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # most of the tests' time is compiling
os.environ["MPLBACKEND"] = "agg"
# what one process compiled, the others load: workers, and the many children that train the same tiny model
CACHE = "JAX_COMPILATION_CACHE_DIR"
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

# these hold for child processes too
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_NO_USAGE_STATS": "1",
}
os.environ.update(OFFLINE)

# examples are the same in every run, and compiling on a busy machine is no failure
hypothesis.settings.register_profile("jaxdistill", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("jaxdistill")


def pytest_configure(config: pytest.Config) -> None:
    if CACHE not in os.environ:  # a worker of pytest-xdist has its parent's
        folder = os.environ[CACHE] = tempfile.mkdtemp(prefix="jaxdistill-compiled-")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
        # the compilers of `plan` are where they were made
        home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        os.environ.setdefault("JAXDISTILL_PLAN_HOME", str(Path(home) / "jaxdistill"))
    # what has been compared with transformers is remembered there, and not in the home of who runs the tests
    os.environ["XDG_CACHE_HOME"] = os.environ[CACHE]


@pytest.fixture(autouse=True, scope="module")
def _forget_compiled() -> Iterator[None]:
    """Programs that one file's tests compiled are of no use to the next, and would add up to gigabytes."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()


@pytest.fixture
def one_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Code that asks how many devices there are takes the path for one; nothing traced for eight is used again."""
    import jax

    jax.clear_caches()
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    yield
    jax.clear_caches()


@pytest.fixture
def user_environment() -> dict[str, str]:
    """For child processes that stand for a user's command (`jaxdistill run`, vLLM): without the tests' JAX settings."""
    return OUTSIDE | OFFLINE
