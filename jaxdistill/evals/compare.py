"""`jaxdistill compare RUN RUN ...`: models of several runs on the problems that all of them answered, pair by pair."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from jaxdistill import progress
from jaxdistill.evals import statistics, summary
from jaxdistill.evals.evaluate import BENCHMARKS, HELDOUT, SCORES
from jaxdistill.records import Problem, RunDir, Score, read_records


@dataclasses.dataclass(frozen=True)
class Side:
    """One model of one run."""

    label: str
    run: RunDir
    model: str


def compare(names: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Prints one table a set of problems: every model's accuracy, and its difference from the first one's.

    Args:
      names: `RUN` for its student, or `RUN:MODEL`; one run alone stands for all of its models.
    Returns:
      set -> one row a model.
    Raises:
      ValueError: no run there, no such model in it, or no problems that all have answered.
    """
    sides = find_sides(names)
    sets = [name for name in sets_of(sides[0].run) if all(_folder(s, name) is not None for s in sides)]
    if not sets:
        raise ValueError(f"{' and '.join(s.label for s in sides)} have answered no common set; evaluate them alike.")
    found = {}
    for name in sets:
        found[name] = rows_of(sides, name)
        for line in lines(name, found[name]):
            progress.say(line)
    return found


def find_sides(names: list[str]) -> list[Side]:
    """The models that the command names."""
    sides = []
    for name in names:
        folder, _, model = name.rpartition(":") if not Path(name).is_dir() else (name, "", "")
        run = RunDir(Path(folder or name))
        if not run.root.is_dir():
            raise ValueError(f"{run.root}: no such run folder.")
        models = sorted(p.parent.name for p in run.evaluation.glob(f"*/{SCORES}"))
        models = models or sorted({p.parent.name for p in run.evaluation.glob(f"{BENCHMARKS}/*/*/{SCORES}")})
        if not models:
            raise ValueError(f"{run.root}: nothing has been evaluated in it; run `jaxdistill evaluate` on it first.")
        if len(names) == 1 and not model:
            models.sort(key=lambda each: each != "student")
            return [Side(each, run, each) for each in models]
        model = model or "student"
        if model not in models:
            raise ValueError(f"{run.root}: no scores of {model}; it has {', '.join(models)}.")
        sides.append(Side(run.root.name if model == "student" else f"{run.root.name}:{model}", run, model))
    labels = [side.label for side in sides]
    if len(set(labels)) < len(labels):  # two folders of one name
        sides = [dataclasses.replace(s, label=str(s.run.root) + f":{s.model}") for s in sides]
    return sides


def sets_of(run: RunDir) -> list[str]:
    """The held-out problems and the benchmarks that a run has answers to."""
    held = [HELDOUT] if any(run.evaluation.glob(f"*/{SCORES}")) else []
    return held + sorted({p.parent.parent.name for p in run.evaluation.glob(f"{BENCHMARKS}/*/*/{SCORES}")})


def _folder(side: Side, name: str) -> Path | None:
    base = side.run.evaluation if name == HELDOUT else side.run.evaluation / BENCHMARKS / name
    folder = base / side.model
    return folder if (folder / SCORES).is_file() else None


def _answers(side: Side, name: str) -> dict[str, list[Score]]:
    """Question -> its scores: equal ids may be other questions in another run."""
    folder = _folder(side, name)
    assert folder is not None
    problems = side.run.problems / HELDOUT if name == HELDOUT else folder.parent / "problems"
    asked = {problem.id: f"{problem.prompt}\0{problem.answer}" for problem in read_records(problems, Problem)}
    found: dict[str, list[Score]] = {}
    for score in read_records(folder, Score):
        if score.problem_id in asked:
            question = asked[score.problem_id]
            found.setdefault(question, []).append(dataclasses.replace(score, problem_id=question))
    return found


def rows_of(sides: list[Side], name: str) -> list[dict[str, Any]]:
    """One row a model: `label`, `problems` (of all), `accuracy`, `low`, `high`; of all but the first what
    `summary.compare` says of it against the first: difference, wins, losses, ties, p.

    Raises:
      ValueError: no problem that all have answered.
    """
    answers = [_answers(side, name) for side in sides]
    shared = [question for question in answers[0] if all(question in other for other in answers)]
    if not shared:
        raise ValueError(f"{name}: {sides[0].label} and the others have no problem in common; evaluate them alike.")
    chosen = [[score for question in shared for score in each[question]] for each in answers]
    rows = []
    for side, scores in zip(sides, chosen, strict=True):
        found = statistics.accuracy(summary.correct_by_problem(scores))
        row: dict[str, Any] = {"label": side.label, "problems": len(shared), **vars(found)}
        row["accuracy"] = row.pop("value")
        if scores is not chosen[0]:
            row["against"] = summary.compare(scores, chosen[0])
        rows.append(row)
    return rows


def lines(name: str, rows: list[dict[str, Any]]) -> list[str]:
    """The rows for people, aligned."""
    head = ["model", "accuracy", "95% interval", f"against {rows[0]['label']}", "95% interval", "won", "lost", "p"]
    cells = [head]
    for row in rows:
        cells.append(
            [row["label"], f"{100 * row['accuracy']:.1f}%", f"{100 * row['low']:.1f} to {100 * row['high']:.1f}"]
        )
        if gap := row.get("against"):
            cells[-1] += [
                f"{100 * gap['difference']:+.1f}",
                f"{100 * gap['low']:+.1f} to {100 * gap['high']:+.1f}",
                f"{gap['wins']:,}",
                f"{gap['losses']:,}",
                "< 0.001" if gap["p"] < 0.001 else f"{gap['p']:.3f}",
            ]
        else:
            cells[-1] += [""] * 5
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    aligned = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    ]
    return [f"{name}: {rows[0]['problems']:,} problems that all answered", *(f"  {line.rstrip()}" for line in aligned)]
