"""A student with and without the teacher's distributions: held-out accuracy step by step, from several seeds.

    python tools/compare_kd.py [CONFIG] [--set KEY=VALUE ...] [--seeds 3] [--points 8] [--problems 256]

CONFIG (configs/quickstart_kd.yaml) has `data.topk` and `train.distill`. Everything before `train` is done once, then
`kd` and `plain` (the same config without `train.distill`) are trained on the same rows from each seed, which says how
the student begins and in which order the rows come: two students of one seed differ in nothing but the loss. Accuracy
is measured while they train (`train.evaluate`). What is done is not done again, and what was interrupted goes on. The
table is printed, and written to `compare_kd.json` in the run's folder.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from jaxdistill import pipeline, progress
from jaxdistill.config import RunConfig, TrainEvaluateConfig, load
from jaxdistill.parallel import processes
from jaxdistill.records import RunDir, write_json
from jaxdistill.train.loop import train
from jaxdistill.train.setup import set_up

ROOT = Path(__file__).parent.parent
STUDENTS = ("plain", "kd")
DONE = "done.json"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default=ROOT / "configs" / "quickstart_kd.yaml", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--points", type=int, default=8, help="measurements in a training (%(default)s)")
    parser.add_argument("--problems", type=int, default=256, help="held-out problems of each (%(default)s)")
    options = parser.parse_args(arguments)
    config = load(options.config, options.overrides)
    if config.train.distill is None:
        raise ValueError(f"{options.config}: no train.distill, so there is nothing to compare.")
    for command in ("generate", "verify", "prepare"):
        pipeline.run_command(command, dataclasses.replace(config, baselines={}))
    shared = RunDir(Path(config.run_dir))
    found: dict[str, list[dict[int, float]]] = {student: [] for student in STUDENTS}
    try:
        for seed in range(options.seeds):
            for student in STUDENTS:
                found[student].append(one(config, shared, student, seed, options.points, options.problems))
    except processes.Stopped as stopped:
        print(stopped, file=sys.stderr)
        return processes.STOPPED
    write_json(shared.root / "compare_kd.json", found)
    progress.say("\n" + table(found, options.problems))
    return 0


def one(config: RunConfig, shared: RunDir, student: str, seed: int, points: int, problems: int) -> dict[int, float]:
    """Trains one student; gives its accuracy by step."""
    run = RunDir(shared.root / "compare" / f"{student}-{seed}")
    run.root.mkdir(parents=True, exist_ok=True)
    for part in ("tokens", "tokenizer"):  # all students have the same
        if not (run.root / part).exists():
            (run.root / part).symlink_to(shared.root.absolute() / part)
    if not (run.root / DONE).is_file():
        settings = dataclasses.replace(config.train, distill=config.train.distill if student == "kd" else None)
        mine = dataclasses.replace(config, seed=seed, train=settings)
        every = max(1, set_up(mine, run).steps // points)
        assert config.evaluate is not None
        wanted = TrainEvaluateConfig(every=every, problems=problems, max_tokens=config.evaluate.max_tokens)
        mine = dataclasses.replace(mine, train=dataclasses.replace(settings, evaluate=wanted))
        progress.say(f"train: {run.checkpoints}")
        write_json(run.root / DONE, train(mine, run, shared))
    lines = (run.checkpoints / "evaluations.jsonl").read_text().splitlines()
    return {line["step"]: line["accuracy"] for line in map(json.loads, lines)}


def table(found: dict[str, list[dict[int, float]]], problems: int) -> str:
    """Accuracy by step: the seeds' mean, and each seed's own in brackets."""
    lines = [f"held-out accuracy in %, of {problems} problems: mean (seed by seed)"]
    lines.append(f"{'step':>6}" + "".join(f"  {student:<34}" for student in found))
    for step in next(iter(found.values()))[0]:
        cells = []
        for runs in found.values():
            values = [100 * run[step] for run in runs]
            cells.append(f"{sum(values) / len(values):5.1f} ({', '.join(f'{v:.1f}' for v in values)})")
        lines.append(f"{step:>6}" + "".join(f"  {cell:<34}" for cell in cells))
    return "\n".join(line.rstrip() for line in lines)


if __name__ == "__main__":
    sys.exit(main())
