"""Kills a training with SIGKILL at random moments, goes on each time, and compares the end with an undisturbed one's.

    python tools/kill_test_train.py [CONFIG] [--set KEY=VALUE ...] [--kills 20] [--folder FOLDER] [--seed 0]

Everything before `train` is done once, if it has not been. Every other moment is uniform over start, compilation and
some steps; the others come after the first new line of the log and some steps more, so that some fall into a save. How
many steps is drawn from those that are left, not from the undisturbed run's seconds, for a machine may become faster. A
training that ends before its last kill all the same is said. At the end parameters, optimizer state, guard and step are
compared bit for bit, and the log's numbers without its times. Exit code 0 exactly if all were killed and all is equal.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from jaxdistill.config import load
from jaxdistill.records import RunDir

ROOT = Path(__file__).parent.parent
TIMES = (
    "seconds",
    "tokens_per_second",
    "mfu",
    "data_wait_share",
    "sampling_share",
    "host_memory_gib",
    "device_memory_gib",
)


def start(command: str, config: Path, run_dir: Path, overrides: list[str], log: Path) -> subprocess.Popen:
    call = [sys.executable, "-m", "jaxdistill", command, str(config), "--set", f"run_dir={run_dir}"]
    for override in overrides:
        call += ["--set", override]
    with open(log, "ab") as out:
        return subprocess.Popen(call, stdout=out, stderr=out)


def wait_for_line(process: subprocess.Popen, run: RunDir) -> None:
    """Returns once the process has written a line of the log, or has ended."""
    path = run.checkpoints / "metrics.jsonl"
    # a process that goes on first drops lines, then it adds some
    size = least = path.stat().st_size if path.exists() else 0
    while process.poll() is None and size <= least:
        time.sleep(0.01)
        size = path.stat().st_size if path.exists() else 0
        least = min(least, size)


def wait_until(process: subprocess.Popen, run: RunDir, step: float, deadline: float) -> None:
    """Returns once the log has come to `step`, at the deadline, or when the process has ended."""
    while process.poll() is None and time.monotonic() < deadline and logged_step(run) < step:
        time.sleep(0.02)


def logged_step(run: RunDir) -> int:
    """The last whole line's; 0 if there is none."""
    path = run.checkpoints / "metrics.jsonl"
    whole = path.read_bytes().rpartition(b"\n")[0] if path.exists() else b""
    return json.loads(whole.splitlines()[-1])["step"] if whole else 0


def last_step(run: RunDir) -> int | None:
    steps = [int(f.name) for f in run.checkpoints.glob("*") if f.name.isdigit()]
    return max(steps, default=None)


def arrays_of(run: RunDir) -> dict[str, np.ndarray]:
    """Every array of the newest checkpoint, by name."""
    import jax
    import orbax.checkpoint as ocp

    step = last_step(run)
    assert step is not None, f"{run.checkpoints}: no checkpoint"
    with ocp.StandardCheckpointer() as reader:
        found: dict[str, Any] = reader.restore(run.checkpoints.absolute() / str(step) / "state")
    return {"step": np.asarray(step)} | {name: np.asarray(jax.device_get(x)) for name, x in found.items()}


def lines_of(run: RunDir) -> list[dict[str, Any]]:
    """The log without times: the first line of a process says nothing of speeds."""
    lines = [json.loads(line) for line in (run.checkpoints / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def differences(a: RunDir, b: RunDir) -> list[str]:
    """What differs between two finished trainings; empty if nothing does."""
    left, right = arrays_of(a), arrays_of(b)
    found = [name for name in sorted(left.keys() | right.keys()) if not _same(left.get(name), right.get(name))]
    lines = [x != y for x, y in zip(lines_of(a), lines_of(b), strict=False)]
    if any(lines) or len(lines_of(a)) != len(lines_of(b)):
        found.append(f"{sum(lines)} lines of metrics.jsonl")
    return found


def _same(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    return a is not None and b is not None and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", type=Path, default=ROOT / "configs" / "quickstart.yaml")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--folder", type=Path, help="where the two runs go; a temporary folder if absent")
    parser.add_argument("--seed", type=int, default=0, help="of the moments at which it kills")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    undisturbed, disturbed = folder / "undisturbed", folder / "disturbed"
    log = folder / "log"

    def go(command: str, run_dir: Path) -> subprocess.Popen:
        # a line a step: the log tells how far a training has come
        overrides = ["baselines={}", "train.log_every=1", *arguments.overrides]
        return start(command, arguments.config, run_dir, overrides, log)

    load(arguments.config, arguments.overrides)  # a wrong config is said here
    for command in ("generate", "verify", "prepare"):
        if go(command, undisturbed).wait():
            print(f"{command} failed; see {log}")
            return 1
    shutil.rmtree(disturbed, ignore_errors=True)
    shutil.copytree(undisturbed, disturbed, ignore=shutil.ignore_patterns("checkpoints"))
    shutil.rmtree(undisturbed / "checkpoints", ignore_errors=True)
    begun = time.monotonic()
    process = go("train", undisturbed)
    wait_for_line(process, RunDir(undisturbed))
    starts = time.monotonic() - begun
    if process.wait():
        print(f"the undisturbed training failed; see {log}")
        return 1
    steps = time.monotonic() - begun - starts
    print(f"undisturbed: {starts:.0f} s until the first line of the log, {steps:.0f} s from there", flush=True)
    rng, run = random.Random(arguments.seed), RunDir(disturbed)
    lines = lines_of(RunDir(undisturbed))
    total = lines[-1]["step"]
    done = 0
    for kill in range(1, arguments.kills + 1):
        begun = time.monotonic()
        left = total - (last_step(run) or 0)
        some = 1.5 * left / (arguments.kills - kill + 2)  # of the last kill, three quarters of what is left
        process = go("train", disturbed)
        if kill % 2:
            wait_for_line(process, run)
            wait_until(process, run, logged_step(run) + rng.uniform(0, some), float("inf"))
            pause = rng.uniform(0, 2 * steps / len(lines))  # anywhere between two lines
        else:
            deadline = begun + rng.uniform(0, starts + steps * some / total)
            # lines of steps that were lost are there until the process drops them
            wait_until(process, run, max(total - left + some, logged_step(run) + 1), deadline)
            pause = 0.0
        try:
            process.wait(pause)
            print("it had ended before the next kill", flush=True)
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            done += 1
            saving = any(run.checkpoints.glob("*.orbax-checkpoint-tmp"))
            what = f"newest checkpoint {last_step(run)}{', within a save' if saving else ''}"
        print(f"kill -9 number {kill} after {time.monotonic() - begun:.1f} s: {what}", flush=True)
    if go("train", disturbed).wait():
        print(f"the last training failed; see {log}")
        return 1
    found = differences(RunDir(undisturbed), run)
    print(f"{done} kills; differences from the undisturbed training: {'; '.join(found) or 'none, bit for bit'}")
    return int(bool(found) or done < arguments.kills)


if __name__ == "__main__":
    sys.exit(main())
