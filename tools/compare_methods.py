"""The methods of the literature on one task, from one base and with one budget: accuracy, tokens and seconds of each.

    python tools/compare_methods.py [CONFIG] [--set KEY=VALUE ...] [--seeds 3] [--base-problems 1024] [--base-steps 240]

CONFIG (configs/quickstart_methods.yaml) has the methods as `baselines`, with CoT distillation as the run's own
student, and `star`. First a base is made below the run, `base/`: the quickstart's student, from few of the teacher's
traces; all methods start from it. Problems, traces and verdicts are made once. Then every method is trained from
every seed, which says in which order its rows come (`seeds/N/`), and STaR's rounds are run (`star/N/`), with the
steps of the others shared out among them. A method that would train on more positions than another is refused. All
answer the same held-out problems. What is done is not done again, SIGTERM saves, and what was interrupted goes on.
The table of what is there is printed after each seed, and written to `compare_methods.json` in the run's folder.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxdistill import pipeline, progress
from jaxdistill.config import RunConfig, build, load, to_dict, with_baseline
from jaxdistill.evals import statistics, summary
from jaxdistill.methods.star import Round, star
from jaxdistill.parallel import processes
from jaxdistill.records import RunDir, Score, read_manifest, read_records, write_json

ROOT = Path(__file__).parent.parent
TABLE = "compare_methods.json"
SHARED = ("problems", "traces", "verdicts")
ORDER = ("base", "answer_only", "cot", "step_by_step", "star", "orca", "contrastive", "kd", "on_policy")
BASE_SEED = 11
"""Of the base's problems, which are none of the methods'."""
STAR_TEMPERATURE = 0.7
"""At which the student samples for itself; a weak one solves little when it is as hot as the teacher."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """One method from one seed."""

    method: str
    seed: int
    correct: dict[str, float]
    """Held-out problem -> 1.0 or 0.0."""
    tokens: int
    """That the student was trained on, padding left out; those of rollouts and pairs too."""
    sampled: int
    """By the student itself, to learn from."""
    seconds: float
    """Of training, and of the student's own sampling."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One method in the table, over its seeds; tokens are the mean of a training, seconds the median."""

    method: str
    accuracy: float
    low: float
    high: float
    """95% interval; trainings and problems are both resampled."""
    by_seed: list[float]
    tokens: int
    sampled: int
    seconds: float


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default=ROOT / "configs" / "quickstart_methods.yaml", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--base-problems", type=int, default=1024, help="that the base learns from (%(default)s)")
    parser.add_argument("--base-steps", type=int, default=240, help="of the base's training (%(default)s)")
    options = parser.parse_args(arguments)
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax talks; progress and errors are ours
    config = load(options.config, options.overrides)
    root = Path(config.run_dir)
    config = dataclasses.replace(
        config, student=dataclasses.replace(config.student, init=str(root / "base" / "export"))
    )
    budget = same_budget(config)
    try:
        run_commands(("generate", "verify", "prepare", "train", "export", "evaluate"), base_config(config, options))
        run_commands(("generate", "verify"), config)
        for seed in range(options.seeds):
            mine = seed_config(config, seed)
            link(RunDir(root), RunDir(Path(mine.run_dir)))
            run_commands(("prepare", "train", "export", "evaluate"), mine)
            if star(star_config(config, seed), by_path):
                return 1
            tell(config, seed + 1, budget)
    except processes.Stopped as stopped:
        print(f"{stopped} The same command goes on from here.", file=sys.stderr)
        return processes.STOPPED
    return 0


def run_commands(commands: Sequence[str], config: RunConfig) -> None:
    for command in commands:
        pipeline.run_command(command, config)


def by_path(commands: Sequence[str], path: str) -> int:
    """Runs commands as `star` asks for them, in this process, which has everything compiled already."""
    run_commands(commands, load(path))
    return 0


# ------------------------------------------------------------------------------------------------- configs


def base_config(config: RunConfig, options: argparse.Namespace) -> RunConfig:
    """The student that all methods start from: the quickstart's, from few problems of its own."""
    assert config.evaluate is not None
    base = load(ROOT / "configs" / "quickstart.yaml")
    problems = dataclasses.replace(config.problems, count=options.base_problems, seed=BASE_SEED)
    return dataclasses.replace(
        base,
        name=f"{config.name}-base",
        run_dir=str(Path(config.run_dir) / "base"),
        problems=problems,
        traces=dataclasses.replace(config.traces, samples=1, temperature=base.traces.temperature),
        train=dataclasses.replace(base.train, steps=options.base_steps, epochs=None, tensorboard=False),
        evaluate=dataclasses.replace(config.evaluate, models=("student",)),
        baselines={},
    )


def seed_config(config: RunConfig, seed: int) -> RunConfig:
    """All methods but STaR from one seed: a run of its own on the shared traces."""
    root = Path(config.run_dir) / "seeds" / str(seed)
    return dataclasses.replace(config, name=f"{config.name}-{seed}", run_dir=str(root), seed=seed, star=None)


def star_config(config: RunConfig, seed: int) -> RunConfig:
    """STaR from one seed; its rounds share the steps of the others."""
    assert config.star is not None
    data = to_dict(config)
    data |= {"name": f"{config.name}-star-{seed}", "run_dir": str(Path(config.run_dir) / "star" / str(seed))}
    data |= {"seed": seed, "baselines": {}}
    data["train"]["steps"] = data["train"]["steps"] // config.star.rounds
    # rounds draw with seeds that follow each other
    data["traces"] |= {"temperature": STAR_TEMPERATURE, "seed": 1000 * (seed + 1)}
    return build(data, where="star")


def link(shared: RunDir, run: RunDir) -> None:
    """Gives a run the problems, traces and verdicts of another one."""
    run.root.mkdir(parents=True, exist_ok=True)
    for name in SHARED:
        if not (run.root / name).exists():
            (run.root / name).symlink_to((shared.root / name).absolute(), target_is_directory=True)


def positions(config: RunConfig) -> int:
    """Positions that a training goes through: all its rows, those of pairs and rollouts too, padding included."""
    t = config.train
    pairs = 0 if t.contrastive is None else (t.contrastive.batch_rows or t.batch_rows)
    return (t.steps or 0) * (t.batch_rows + pairs) * config.data.row_tokens


def same_budget(config: RunConfig) -> int:
    """The positions that every method trains on.

    Raises:
      ValueError: no `star`, no `evaluate`, no `train.steps`, or methods of different budgets.
    """
    if config.star is None or config.evaluate is None or config.train.steps is None:
        raise ValueError(f"{config.name}: methods are compared by train.steps, evaluate and star; set all three.")
    found = {"cot": positions(config)} | {name: positions(with_baseline(config, name)) for name in config.baselines}
    found["star"] = config.star.rounds * positions(star_config(config, 0))
    for name, number in found.items():
        if number != found["cot"]:
            raise ValueError(
                f"{config.name}: {name} trains on {number:,} positions, and cot on {found['cot']:,}; make steps x rows "
                "(those of train.contrastive too) x data.row_tokens equal, and steps a multiple of star.rounds."
            )
    return found["cot"]


# --------------------------------------------------------------------------------------------------- table


def trainings_of(config: RunConfig, seeds: int) -> list[Training]:
    """Everything that was trained and evaluated, from the runs' manifests and scores."""
    root = Path(config.run_dir)
    base = RunDir(root / "base")
    found = [_training("base", 0, base, "student", [base])]
    for seed in range(seeds):
        run = RunDir(root / "seeds" / str(seed))
        found.append(_training("cot", seed, run, "student", [run]))
        found += [_training(name, seed, run, name, [run.baseline(name)]) for name in config.baselines]
        assert config.star is not None
        rounds = [Round(n, root / "star" / str(seed)).run for n in range(1, config.star.rounds + 1)]
        found.append(_training("star", seed, rounds[-1], "student", rounds, samples=True))
    return found


def _training(
    method: str, seed: int, scored: RunDir, model: str, trained: Sequence[RunDir], samples: bool = False
) -> Training:
    """
    Args:
      scored: the run that evaluated it, as `model`.
      trained: the runs with its checkpoints; several for one that is trained in rounds.
      samples: whether the traces of these are its own.
    """
    counts = [_counts(run.checkpoints) for run in trained]
    traces = [_counts(run.traces) for run in trained] if samples else []
    return Training(
        method=method,
        seed=seed,
        correct=summary.means(list(read_records(scored.evaluation / model, Score))),
        tokens=sum(c["tokens"] for c in counts),
        sampled=sum(c.get("sampled_tokens", 0) for c in counts) + sum(c["output_tokens"] for c in traces),
        seconds=sum(c["seconds"] for c in counts) + sum(c["wall_seconds"] for c in traces),
    )


def _counts(folder: Path) -> dict[str, Any]:
    manifest = read_manifest(folder)
    assert manifest is not None, f"{folder} is finished"
    return manifest["counts"]


def rows_of(trainings: Sequence[Training]) -> list[Row]:
    """One row a method, in the order of `ORDER`, others behind."""
    methods = dict.fromkeys(training.method for training in trainings)
    problems = list(trainings[0].correct)
    rows = []
    for method in sorted(methods, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER)):
        mine = [training for training in trainings if training.method == method]
        values = np.array([[training.correct[problem] for problem in problems] for training in mine])
        accuracy, low, high = statistics.bootstrap_seeds(values)
        rows.append(
            Row(
                method=method,
                accuracy=accuracy,
                low=low,
                high=high,
                by_seed=[float(each) for each in values.mean(1)],
                tokens=round(sum(t.tokens for t in mine) / len(mine)),
                sampled=round(sum(t.sampled for t in mine) / len(mine)),
                seconds=float(np.median([t.seconds for t in mine])),
            )
        )
    return rows


def lines(rows: Sequence[Row], caption: str) -> list[str]:
    """The table in Markdown."""
    found = [
        "| method | accuracy | 95% interval | by seed | tokens trained on | own tokens sampled | seconds |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        seeds = ", ".join(f"{100 * each:.1f}" for each in row.by_seed)
        sampled = f"{row.sampled:,}" if row.sampled else "-"
        found.append(
            f"| {row.method} | {100 * row.accuracy:.1f}% | {100 * row.low:.1f} to {100 * row.high:.1f} | {seeds} "
            f"| {row.tokens:,} | {sampled} | {row.seconds:.0f} |"
        )
    return [*found, "", caption]


def tell(config: RunConfig, seeds: int, budget: int) -> None:
    """Prints and writes the table of the first seeds."""
    rows = rows_of(trainings_of(config, seeds))
    run = RunDir(Path(config.run_dir))
    traces, verdicts = _counts(run.traces), _counts(run.verdicts)
    heldout = _counts(RunDir(run.root / "base").evaluation)["heldout"]
    caption = (
        f"{heldout:,} held-out problems, greedy; {seeds} seed(s) a method, from one base. Every method trains on "
        f"{budget:,} positions; all but STaR learn from the same {verdicts['kept']:,} of {traces['samples']:,} traces "
        f"({traces['output_tokens']:,} tokens of the teacher, {traces['wall_seconds']:.0f} s). Tokens are the mean "
        "of a training, without padding; seconds the median, with compilation and own sampling, without evaluation."
    )
    found = {"seeds": seeds, "heldout": heldout, "positions": budget, "teacher_tokens": traces["output_tokens"]}
    write_json(run.root / TABLE, found | {"rows": [vars(row) for row in rows]})
    progress.say("\n" + "\n".join(lines(rows, caption)))


if __name__ == "__main__":
    sys.exit(main())
