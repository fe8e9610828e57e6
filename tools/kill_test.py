"""Kills a run with SIGKILL once in every stage, goes on each time, and compares the end with an undisturbed run's.

    python tools/kill_test.py [CONFIG] [--set KEY=VALUE ...] [--folder FOLDER] [--seed 0]

Every process of the run dies at once (the command, the stage's process, vLLM's), at a random moment of the stage. The
same command is then given again, and killed in the next stage. At the end the two runs' traces, verdicts, packed rows,
exported parameters and scores are compared, byte for byte. Exit code 0 exactly if all are equal.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from jaxdistill import pipeline
from jaxdistill.config import RunConfig, load
from jaxdistill.records import RunDir, Score, Trace, Verdict, read_manifest, read_records

ROOT = Path(__file__).parent.parent


def start(config: Path, run_dir: Path, overrides: Sequence[str], log: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "jaxdistill", "run", str(config), "--set", f"run_dir={run_dir}"]
    for override in overrides:
        command += ["--set", override]
    with open(log, "ab") as out:
        return subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)


def kill_everything(process: subprocess.Popen) -> None:
    """SIGKILL to every process below `process`, children first seen included."""
    import psutil

    family = [process.pid]
    with contextlib.suppress(psutil.NoSuchProcess):
        family += [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    for pid in family:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def kill_in(task: pipeline.Task, process: subprocess.Popen, log: Path, after_s: float) -> str:
    """Waits until a stage says that it begins, and `after_s` longer, then kills the run; says what was found."""
    read = log.stat().st_size
    begins = f"{task.title}: {task.folder}".encode()
    while process.poll() is None and begins not in log.read_bytes()[read:]:
        time.sleep(0.01)
    deadline = time.monotonic() + after_s
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    over, finished = process.poll() is not None, read_manifest(task.folder) is not None
    kill_everything(process)
    return "the run had ended" if over else "just after its end" if finished else f"after {after_s:.2f} s of it"


def differences(config: RunConfig, a: RunDir, b: RunDir) -> list[str]:
    """What differs between two finished runs; empty if nothing does."""
    found = []
    for name, record, folder in (("traces", Trace, "traces"), ("verdicts", Verdict, "verdicts")):
        left, right = (list(read_records(run.root / folder, record)) for run in (a, b))
        changed = sum(x != y for x, y in zip(left, right, strict=False)) + abs(len(left) - len(right))
        if changed:
            found.append(f"{changed} of {len(left)} {name}")
    for student in ("", *(f"baselines/{name}" for name in config.baselines)):
        for file in ("tokens/rows.arrayrecord", "export/model.safetensors"):
            if (a.root / student / file).read_bytes() != (b.root / student / file).read_bytes():
                found.append(f"{student}/{file}".lstrip("/"))
    for folder in sorted(a.evaluation.iterdir() if a.evaluation.exists() else ()):
        if folder.is_dir():
            left, right = (list(read_records(run.evaluation / folder.name, Score)) for run in (a, b))
            if left != right:
                found.append(f"{sum(x != y for x, y in zip(left, right, strict=False))} scores of {folder.name}")
    return found


def disturbed_to_undisturbed(path: Path, disturbed: Path, undisturbed: Path) -> Path:
    return undisturbed / path.relative_to(disturbed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", type=Path, default=ROOT / "configs" / "quickstart.yaml")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--folder", type=Path, help="where the two runs go; a temporary folder if absent")
    parser.add_argument("--seed", type=int, default=0, help="of the moments at which it kills")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    folder = arguments.folder or Path(tempfile.mkdtemp())
    undisturbed, disturbed = folder / "undisturbed", folder / "disturbed"
    shutil.rmtree(disturbed, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)

    def go(run_dir: Path) -> subprocess.Popen:
        return start(arguments.config, run_dir, arguments.overrides, folder / f"{run_dir.name}.log")

    begun = time.monotonic()
    if go(undisturbed).wait():  # goes on, if an earlier call made it already
        print(f"the undisturbed run failed; see {folder / 'undisturbed.log'}")
        return 1
    print(f"undisturbed: {time.monotonic() - begun:.0f} s")
    config = load(arguments.config, [*arguments.overrides, f"run_dir={disturbed}"])
    for task in pipeline.tasks_of(config, tuple(pipeline.STAGES)):
        manifest = read_manifest(disturbed_to_undisturbed(task.folder, disturbed, undisturbed))
        assert manifest is not None
        takes = manifest["counts"]["wall_seconds"]
        log = folder / f"{disturbed.name}.log"
        log.touch()
        what = kill_in(task, go(disturbed), log, takes * rng.uniform(0.1, 0.9))
        print(f"killed -9 in {task.title} (which takes {takes:.1f} s): {what}", flush=True)
    if go(disturbed).wait():
        print(f"the last run failed; see {folder / 'disturbed.log'}")
        return 1
    found = differences(config, RunDir(undisturbed), RunDir(disturbed))
    print(f"differences from the undisturbed run: {'; '.join(found) or 'none, byte for byte'}")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
