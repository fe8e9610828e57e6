"""What in the traces is it that teaches? Students of changed traces, against the student of the traces as they are.

Problems, traces and verdicts are the run's own; a variant is a difference in the config, as baselines are, and every
variant is trained once a seed. The folder `ablations` below the run is a run itself: what it shares is linked, and the
same command goes on where it was stopped.

Source: Li et al. 2025, arXiv:2502.07374, sections 4.1 (wrong answers, corrupted digits, removed keywords) and 4.2
(shuffled, deleted and inserted steps).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from jaxdistill import config as configuration
from jaxdistill.config import RunConfig, to_dict, with_baseline
from jaxdistill.data import sources
from jaxdistill.evals import statistics, summary
from jaxdistill.progress import say
from jaxdistill.records import RunDir, Score, atomic_file, read_manifest, read_records, write_json

FOLDER = "ablations"
TABLE = "ablations.json"
BASE = "reasoning"
"""The run's own student, on the traces as they are."""
SHARED = ("problems", "traces", "verdicts", "tokens", "tokenizer", "checkpoints", "export")
LOOKED_AT = 200
"""Traces that are edited to see whether a variant changes anything."""


def _edit(kind: str, rate: float = 1.0, **more: Any) -> dict[str, Any]:
    return {"data.edit": {"kind": kind, "rate": rate, **more}}


VARIANTS: dict[str, dict[str, Any]] = {
    "answer_only": {"data.response": "answer"},
    "wrong_answers": _edit("wrong_answer"),
    "random_digits_20": _edit("random_digits", 0.2),
    "random_digits_50": _edit("random_digits", 0.5),
    "random_digits_70": _edit("random_digits", 0.7),
    "random_digits_100": _edit("random_digits"),
    "no_keywords": _edit("without_keywords"),
    "shuffled_33": _edit("shuffled_steps", 0.33),
    "shuffled_67": _edit("shuffled_steps", 0.67),
    "shuffled_steps": _edit("shuffled_steps"),
    "deleted_33": _edit("deleted_steps", 0.33),
    "deleted_steps": _edit("deleted_steps", 0.67),
    "deleted_100": _edit("deleted_steps"),
    "deleted_shorter": _edit("deleted_steps", 0.67, keep_length=False),
    "inserted_33": _edit("inserted_steps", 0.33),
    "inserted_steps": _edit("inserted_steps", 0.67),
    "inserted_100": _edit("inserted_steps"),
    "inserted_longer": _edit("inserted_steps", 0.67, keep_length=False),
    "unverified": {"data.take": {"verdicts": "unverified"}},
    "incorrect_traces": {"data.take": {"verdicts": "incorrect"}},
    "short_cot": {"data.take": {"length": "shortest"}},
    "long_cot": {"data.take": {"length": "longest"}},
    "samples_1": {"data.take": {"per_problem": 1}},
    "samples_2": {"data.take": {"per_problem": 2}},
    "samples_4": {"data.take": {"per_problem": 4}},
    "lora": {"student.lora": {"rank": 16, "alpha": 32.0}},
}
"""What `ablate.variants` may name, and how the config then differs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One variant in the table, over all of its seeds."""

    name: str
    seeds: int
    accuracy: float
    low: float
    high: float
    """95% interval; seeds and problems are both resampled."""
    by_seed: list[float]
    difference: float | None
    """From the student on the traces as they are, problem by problem and seed by seed; None for that one itself."""
    difference_low: float | None
    difference_high: float | None
    examples: int
    thinking_tokens: float
    """Of an example, on average: what the length was controlled to."""
    trained_tokens: int
    steps: int
    output_tokens: float
    """Of a response, on average."""


# --------------------------------------------------------------------------------------------- what is trained


def prepare(config: RunConfig) -> Path:
    """Makes the folder `ablations` of a finished run: links to what is shared, and a config with all the students.

    Returns:
      that config's path, for the pipeline's stages from `prepare` to `evaluate`.
    Raises:
      ValueError: no held-out problems, an unknown variant, or nothing that can be trained.
    """
    if config.evaluate is None or config.evaluate.problems is None:
        raise ValueError(f"{config.name}: ablations are scored on held-out problems; add `evaluate.problems`.")
    run = RunDir(Path(config.run_dir))
    folder = run.root / FOLDER
    wanted, skipped = applicable(config, run)
    for name, reason in skipped.items():
        say(f"  {name}: skipped, {reason}")
    if not wanted:
        raise ValueError("ablate.variants: none of them changes anything in this run; name others.")
    folder.mkdir(parents=True, exist_ok=True)
    for name in SHARED:
        _link(folder / name, Path("..") / name)
    changed = to_dict(config) | {
        "name": f"{config.name}-ablations",
        "run_dir": str(folder),
        "baselines": students(config, wanted, _steps(run)),
    }
    # the run's evaluation has its benchmarks; a table of many students wants one number each
    changed["evaluate"] |= {"models": ["student", "baselines"], "benchmarks": [], "quality": None, "best_of": "none"}
    configuration.build(changed, where="ablate")
    path = folder / "config.yaml"
    with atomic_file(path) as temporary:
        temporary.write_text(yaml.safe_dump(changed, sort_keys=False, allow_unicode=True))
    return path


def applicable(config: RunConfig, run: RunDir) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """The variants to be trained, with their differences, and those that make no sense here, with the reason.

    Raises:
      ValueError: an unknown name.
    """
    wanted: dict[str, dict[str, Any]] = {}
    skipped: dict[str, str] = {}
    for name in dict.fromkeys(config.ablate.variants):
        if name not in VARIANTS:
            raise ValueError(f"ablate.variants has {name!r}; known are {', '.join(VARIANTS)}; see ablate.extra too.")
        reason = _objection(name, VARIANTS[name], config, run)
        if reason:
            skipped[name] = reason
        else:
            wanted[name] = VARIANTS[name]
    for name, differences in config.ablate.extra.items():
        if name in {*VARIANTS, BASE}:
            raise ValueError(f"ablate.extra.{name}: there is a variant of this name; call it something else.")
        wanted[name] = differences
    return wanted, skipped


def _objection(name: str, differences: dict[str, Any], config: RunConfig, run: RunDir) -> str | None:
    """Why a variant would be no other student than the run's own, or none at all; None if it would."""
    if "student.lora" in differences and config.student.init is None:
        return "adapters need `student.init`, a checkpoint that has learned something"
    data = _with(config, name, differences).data
    if data.edit is None and data.take == config.data.take:
        return None
    try:
        taken = sources.select(data, run)
    except ValueError as error:
        return str(error)
    if data.edit is None:
        before = sources.select(config.data, run)
        same = all(a.source_of == b.source_of for a, b in zip(taken, before, strict=True))
        return "it takes the same traces" if same else None
    pairs = zip(sources.candidates(taken), sources.candidates(taken, edit=data.edit), strict=True)
    changed = (a.text.response != b.text.response for a, b in itertools.islice(pairs, LOOKED_AT))
    return None if any(changed) else "it changes nothing in these traces"


def _with(config: RunConfig, name: str, differences: dict[str, Any]) -> RunConfig:
    return with_baseline(dataclasses.replace(config, baselines={name: differences}), name, where="ablate")


def students(
    config: RunConfig, wanted: dict[str, dict[str, Any]], steps: int | None = None
) -> dict[str, dict[str, Any]]:
    """Every variant with every seed, as baselines; the run's own student is the base with the run's own seed.

    Args:
      steps: of the run's own student, for `ablate.match: steps`.
    """
    matched = {"train.steps": steps, "train.epochs": None} if config.ablate.match == "steps" and steps else {}
    found: dict[str, dict[str, Any]] = {}
    for seed in config.ablate.seeds:
        if seed != config.seed:
            found[student_name(BASE, seed)] = {"seed": seed} | matched
        for name, differences in wanted.items():
            found[student_name(name, seed)] = matched | differences | {"seed": seed}
    return found


def student_name(variant: str, seed: int) -> str:
    return f"{variant}-seed{seed}"


def _steps(run: RunDir) -> int | None:
    manifest = read_manifest(run.checkpoints)
    return manifest["counts"].get("steps") if manifest else None


def _link(path: Path, target: Path) -> None:
    if path.is_symlink():
        return
    if path.exists():
        raise ValueError(f"{path}: it stands where a link to {target} belongs; remove it.")
    path.symlink_to(target, target_is_directory=True)


# --------------------------------------------------------------------------------------------------- the table


def tabulate(config: RunConfig) -> list[Row]:
    """The finished ablations' table; writes `ablations/ablations.json` and prints it.

    Raises:
      ValueError: the ablations have not been evaluated.
    """
    root = RunDir(Path(config.run_dir)).root / FOLDER
    manifest = read_manifest(RunDir(root).evaluation)
    if manifest is None:
        raise ValueError(f"{root}: the ablations have not been evaluated; run `jaxdistill ablate` to its end.")
    ablation = configuration.load(root / "config.yaml")
    rows = rows_of(ablation, RunDir(root), config.seed, config.ablate.seeds)
    heldout = manifest["counts"]["heldout"]
    write_json(root / TABLE, {"heldout": heldout, "match": config.ablate.match, "rows": [vars(row) for row in rows]})
    for line in lines(rows, heldout):
        say(line)
    return rows


def rows_of(config: RunConfig, run: RunDir, own_seed: int, seeds: tuple[int, ...]) -> list[Row]:
    """One row a variant, the base first.

    Args:
      config: of the folder `ablations`, which is `run`.
      own_seed: of the run's own student.
    """
    variants = list(dict.fromkeys([BASE, *(name.rpartition("-seed")[0] for name in config.baselines)]))
    order: list[str] | None = None
    values: dict[str, np.ndarray] = {}
    folders: dict[str, list[RunDir]] = {}
    for variant in variants:
        columns = []
        folders[variant] = []
        for seed in seeds:
            own = variant == BASE and seed == own_seed
            name = "student" if own else student_name(variant, seed)
            means = summary.means(list(read_records(run.evaluation / name, Score)))
            order = order or list(means)
            columns.append([means[problem] for problem in order])
            folders[variant].append(run if own else run.baseline(name))
        values[variant] = np.array(columns)
    models = read_manifest(run.evaluation)
    assert models is not None
    scored = models["counts"]["models"]
    return [_row(variant, values, folders[variant], scored, own_seed, seeds) for variant in variants]


def _row(
    variant: str,
    values: dict[str, np.ndarray],
    folders: list[RunDir],
    models: dict[str, Any],
    own_seed: int,
    seeds: tuple[int, ...],
) -> Row:
    accuracy, low, high = statistics.bootstrap_seeds(values[variant])
    gap = None if variant == BASE else statistics.bootstrap_seeds(values[variant] - values[BASE])
    names = ["student" if variant == BASE and s == own_seed else student_name(variant, s) for s in seeds]
    tokens, trained = read_manifest(folders[0].tokens), read_manifest(folders[0].checkpoints)
    assert tokens is not None and trained is not None, "what was evaluated has been prepared and trained"
    counts = tokens["counts"]
    return Row(
        name=variant,
        seeds=len(seeds),
        accuracy=accuracy,
        low=low,
        high=high,
        by_seed=[float(each) for each in values[variant].mean(1)],
        difference=gap[0] if gap else None,
        difference_low=gap[1] if gap else None,
        difference_high=gap[2] if gap else None,
        examples=counts["examples"],
        thinking_tokens=counts["thinking_tokens"] / counts["examples"],
        trained_tokens=counts["thinking_tokens"] + counts["answer_tokens"],
        steps=trained["counts"].get("steps", 0),
        output_tokens=sum(models[name]["mean_output_tokens"] for name in names) / len(names),
    )


def lines(rows: list[Row], heldout: int) -> list[str]:
    """The table in Markdown, for people and for a README."""
    seeds = rows[0].seeds
    found = [
        f"| traces | accuracy | 95% interval | against {BASE} | by seed | examples | thinking tokens | steps |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        against = ""
        if row.difference is not None and row.difference_low is not None and row.difference_high is not None:
            against = (
                f"{100 * row.difference:+.1f} ({100 * row.difference_low:+.1f} to {100 * row.difference_high:+.1f})"
            )
        found.append(
            f"| {row.name} | {100 * row.accuracy:.1f}% | {100 * row.low:.1f} to {100 * row.high:.1f} | {against} "
            f"| {', '.join(f'{100 * a:.1f}' for a in row.by_seed)} | {row.examples:,} | {row.thinking_tokens:.1f} "
            f"| {row.steps:,} |"
        )
    found.append(
        f"{heldout:,} held-out problems, {seeds} training(s) a row; intervals resample trainings and problems."
    )
    return found


def read_table(run: RunDir) -> dict[str, Any] | None:
    """What `tabulate` wrote, or None."""
    path = run.root / FOLDER / TABLE
    return json.loads(path.read_text()) if path.is_file() else None
