"""Kills the rounds of `jaxdistill star` with SIGKILL, goes on each time, and compares the end with undisturbed rounds.

    python tools/kill_test_star.py CONFIG [--set KEY=VALUE ...] [--kills 12] [--folder FOLDER] [--seed 0]

CONFIG has a section `star`. It is run once undisturbed; then again, and killed `--kills` times, each at a random moment
of one of the stages of its rounds, drawn without replacement and gone through in their order. Every process dies at
once, and the same command is given again. At the end traces, verdicts, packed rows, exported parameters, scores and the
table of the rounds are compared, byte for byte. Exit code 0 exactly if all are equal.
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
from typing import NamedTuple

from jaxdistill.config import load
from jaxdistill.methods.star import TABLE
from jaxdistill.records import Score, Trace, Verdict, read_manifest, read_records

FOLDERS = {"traces": Trace, "verdicts": Verdict, "evaluation/student": Score}
"""Below a round's folder: what is compared record by record, as the number of files goes by how often it was killed."""
FILES = ("tokens/rows.arrayrecord", "export/model.safetensors")


class Stage(NamedTuple):
    """A stage of a round, as an undisturbed run did it."""

    name: str
    folder: Path
    """Below the folder of all rounds."""
    seconds: float


def stages_of(root: Path) -> list[Stage]:
    """Every stage of every round that says where it begins, in the order in which they were done."""
    found = []
    for path in root.glob("rounds/**/manifest.json"):
        manifest = read_manifest(path.parent)
        assert manifest is not None
        if "wall_seconds" in manifest["counts"]:  # not of what is left of the rationalized traces
            stage = Stage(manifest["stage"], path.parent.relative_to(root), manifest["counts"]["wall_seconds"])
            found.append((path.stat().st_mtime_ns, stage))
    return [stage for _, stage in sorted(found)]


def differences(a: Path, b: Path) -> list[str]:
    """What differs between the folders of two finished calls of `star`; empty if nothing does."""
    found = [] if (a / TABLE).read_bytes() == (b / TABLE).read_bytes() else [TABLE]
    runs = {path.parent.parent.relative_to(root) for root in (a, b) for path in root.glob("rounds/**/verdicts/*.json")}
    for run in sorted(runs):
        for name, record in FOLDERS.items():
            left, right = (
                list(read_records(root / run / name, record)) if any((root / run / name).glob("*.parquet")) else None
                for root in (a, b)
            )
            if left != right:
                found.append(f"{run}/{name}")
        for name in FILES:
            files = [root / run / name for root in (a, b)]
            left, right = (file.read_bytes() if file.is_file() else None for file in files)
            if left != right:
                found.append(f"{run}/{name}")
    return found


def start(config: Path, run_dir: Path, overrides: Sequence[str], log: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "jaxdistill", "star", str(config), "--set", f"run_dir={run_dir}"]
    for override in overrides:
        command += ["--set", override]
    with open(log, "ab") as out:
        return subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)


def kill_everything(process: subprocess.Popen) -> None:
    """SIGKILL to a process and all below it; returns when the last of them, and the lock that it held, is gone."""
    import psutil

    family = []
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
    for pid in (process.pid, *(child.pid for child in family)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    psutil.wait_procs(family, timeout=60)


def kill_in(stage: Stage, root: Path, process: subprocess.Popen, log: Path, read: int, after_s: float) -> str:
    """Waits until a stage says that it begins, and `after_s` longer, then kills everything; says what was found.

    Args:
      read: so many bytes of the log are of earlier calls.
    """
    begins = f": {root / stage.folder}\n".encode()
    while process.poll() is None and begins not in log.read_bytes()[read:]:
        time.sleep(0.01)
    deadline = time.monotonic() + after_s
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    over, finished = process.poll() is not None, read_manifest(root / stage.folder) is not None
    kill_everything(process)
    return "the rounds had ended" if over else "just after its end" if finished else f"after {after_s:.2f} s of it"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--folder", type=Path, help="where the two runs go; a temporary folder if absent")
    parser.add_argument("--seed", type=int, default=0, help="of the moments at which it kills")
    options = parser.parse_args(arguments)
    folder = options.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    # one place for both, as a round's traces name the checkpoint that they are sampled from
    root, undisturbed, log = folder / "run", folder / "undisturbed", folder / "log"
    log.touch()
    load(options.config, options.overrides)  # a wrong config is said here
    for old in (root, undisturbed):
        shutil.rmtree(old, ignore_errors=True)

    def go() -> subprocess.Popen:
        return start(options.config, root, options.overrides, log)

    begun = time.monotonic()
    if go().wait():
        print(f"the undisturbed rounds failed; see {log}")
        return 1
    root.rename(undisturbed)
    stages = stages_of(undisturbed)
    print(f"undisturbed: {time.monotonic() - begun:.0f} s, {len(stages)} stages", flush=True)
    rng = random.Random(options.seed)
    for i in sorted(rng.sample(range(len(stages)), min(options.kills, len(stages)))):
        read = log.stat().st_size
        what = kill_in(stages[i], root, go(), log, read, stages[i].seconds * rng.uniform(0.0, 1.0))
        print(f"killed -9 in {stages[i].folder} (which takes {stages[i].seconds:.1f} s): {what}", flush=True)
    if go().wait():
        print(f"the last call failed; see {log}")
        return 1
    found = differences(undisturbed, root)
    print(f"differences from the undisturbed rounds: {'; '.join(found) or 'none, byte for byte'}")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
