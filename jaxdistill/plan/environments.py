"""The compilers' own environments: JAX for TPUs and JAX for NVIDIA GPUs cannot share one.

Each is a virtual environment below `~/.cache/jaxdistill` (or `$JAXDISTILL_PLAN_HOME`), made at first use, with the
versions of JAX and its friends that are in use here, and made anew when those change. No accelerator is needed, and no
driver.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from jaxdistill import progress

# what tracing the train step imports
COMMON = ("jax", "jaxlib", "flax", "optax", "qwix", "pydantic", "PyYAML", "jaxtyping", "numpy", "ml_dtypes", "pyarrow")
COMPILERS = {
    "tpu": ("jax[tpu]=={jax}",),
    # what is needed without a device: the plugin and ptxas, and none of the gigabytes of libraries that it would call
    "gpu": ("jax-cuda13-plugin=={jax}", "nvidia-cuda-nvcc>=13.0.48,<14"),
}
GIB_NEEDED = {"tpu": 3.0, "gpu": 3.0}
"""Disk space: of the environment, and of its packed form while it is installed."""
READY = "ready.json"
TITLES = {"tpu": "TPUs", "gpu": "NVIDIA GPUs"}


def home() -> Path:
    """Where the environments lie."""
    given = os.environ.get("JAXDISTILL_PLAN_HOME")
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(given) if given else Path(cache) / "jaxdistill"


def requirements(platform: str) -> list[str]:
    """What is installed, with the versions that are in use here."""
    pinned = [f"{name}=={metadata.version(name)}" for name in COMMON]
    return pinned + [name.format(jax=metadata.version("jax")) for name in COMPILERS[platform]]


def find(platform: str) -> Path | None:
    """The interpreter of a ready environment; None if there is none, or one of other versions."""
    if platform == "cpu":
        return Path(sys.executable)
    folder = home() / f"plan-{platform}"
    with contextlib.suppress(FileNotFoundError):
        if json.loads((folder / READY).read_text()) == requirements(platform):
            return folder / "bin" / "python"
    return None


def make(platform: str) -> Path:
    """The interpreter of a ready environment, which is made first if it is not there.

    Raises:
      ValueError: no room on the disk, or pip failed.
    """
    with _locked(platform):
        found = find(platform)
        if found is not None:
            return found
        folder, need = home() / f"plan-{platform}", GIB_NEEDED[platform]
        free = shutil.disk_usage(home()).free / 2**30
        if free < need:
            raise ValueError(
                f"{folder}: the compiler for {TITLES[platform]} needs {need:.0f} GiB of disk, {free:.1f} are free; "
                "make room, or set JAXDISTILL_PLAN_HOME to a folder on another disk."
            )
        progress.say(f"making the environment that compiles for {TITLES[platform]}, once, in {folder}")
        shutil.rmtree(folder, ignore_errors=True)
        _run([sys.executable, "-m", "venv", str(folder)], folder)
        python = folder / "bin" / "python"
        _run([str(python), "-m", "pip", "install", "--quiet", "--no-input", *requirements(platform)], folder)
        (folder / READY).write_text(json.dumps(requirements(platform)))
        return python


def variables() -> dict[str, str]:
    """Of a compiler's process: this package in its path, and nothing that would change what it makes."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHONPATH", "JAX_", "TPU_", "LIBTPU"))}
    return kept | {"PYTHONPATH": str(Path(__file__).parents[2])}


@contextlib.contextmanager
def _locked(platform: str) -> Iterator[None]:
    """Two plans that start at once make one environment."""
    home().mkdir(parents=True, exist_ok=True)
    with open(home() / f".plan-{platform}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _run(command: list[str], folder: Path) -> None:
    # what the user's shell has set must not leak into the environment that is made here
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "PIP_TARGET", "PIP_PREFIX")}
    ran = subprocess.run(command, env=kept, capture_output=True, text=True)
    if ran.returncode:
        last = [line for line in (ran.stderr or ran.stdout).splitlines() if line.strip()][-1:]
        raise ValueError(
            f"{folder}: could not be made ({' '.join(last)[:300] or f'exit code {ran.returncode}'}); look at the "
            "network and the disk, then run the same command again."
        )
