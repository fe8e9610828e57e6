"""Stage `report`: the whole run on one self-contained HTML page, also while the run is unfinished.

The page loads nothing: no script, no font, no image. All text of models and problems is escaped by the template.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import yaml

from jaxdistill.config import RunConfig, to_dict
from jaxdistill.evals import details, facts, pictures, samples
from jaxdistill.progress import say
from jaxdistill.records import RunDir, atomic_file, read_manifest

PAGE = "index.html"
TEMPLATE = "report.html.jinja"
MOST_REASONS = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bar:
    """One model in the headline's picture; shares in percent."""

    name: str
    colour: int
    accuracy: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fall:
    """One step of the yield waterfall; places in percent of all traces."""

    label: str
    kind: str
    """`all`, `rejected` or `kept`."""
    count: int
    share: float
    left: float
    width: float


def report(config: RunConfig, run: RunDir) -> dict[str, Any]:
    """Writes `report/index.html` from whatever the run directory holds by now.

    Returns:
      Counts: `bytes` of the page, and the stages it has `missing`.
    """
    page = render(config, run)
    with atomic_file(run.report / PAGE) as temporary:
        temporary.write_text(page, encoding="utf-8")
    missing = [step.folder for step in facts.steps(run) if step.state != "done"]
    say(
        f"  {run.report / PAGE}: {facts.short(len(page.encode()))}B"
        + (f"; without {', '.join(missing)}" if missing else "")
    )
    return {"bytes": len(page.encode()), "missing": missing}


def render(config: RunConfig, run: RunDir) -> str:
    """The page as text; equal run directories give equal pages."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"short": facts.short, "duration": facts.duration, "p_value": p_value}
    return environment.get_template(TEMPLATE).render(_context(config, run))


def _context(config: RunConfig, run: RunDir) -> dict[str, Any]:
    manifest = read_manifest(run.evaluation)
    evaluated = manifest["counts"] if manifest else None
    names = list(evaluated["models"]) if evaluated else []
    for each in evaluated.get("benchmarks", {}).values() if evaluated else ():
        names += [name for name in each["models"] if name not in names]
    colours = colours_of([*names, *facts.students(config, run)])
    found = facts.read_yield(run)
    models = evaluated["models"] if evaluated else {}
    costs = details.costs(config, run)
    ablated = details.ablations(run)
    return {
        "config": config,
        "student_words": student_words(config),
        "headline": headline(evaluated),
        "colours": colours,
        "bars": bars(evaluated, colours),
        "evaluated": evaluated,
        "benchmarks": benchmarks(evaluated, colours),
        "several": details.several(models),
        "domains": details.domains(models),
        "quality": details.quality(models),
        "quality_columns": [title for title, _ in details.QUALITY.values()],
        "faithfulness": details.faithfulness(models),
        "data": details.data(run),
        "left_out": details.left_out(run),
        "left_turns": details.left_turns(run),
        "hub_sets": details.hub_sets(run),
        "difficulty": details.difficulty(run),
        "costs": costs,
        "total_cost": details.total(costs),
        "ablations": ablated,
        "ablation_bars": ablation_bars(ablated),
        "steps": facts.steps(run),
        "yield_": found,
        "falls": waterfall(found) if found else [],
        "training": training(config, run),
        "charts": pictures.draw(config, run, found, models, colours),
        # what `jaxdistill plan` found, a table a topology
        "plans": [json.loads(file.read_bytes()) for file in sorted(run.plans.glob("*.json"))],
        "examples": samples.side_by_side(run, list(models)) if models else [],
        "rejected": samples.rejected_traces(run),
        "manifests": facts.manifests(config, run),
        "versions": facts.versions(config, run),
        "yaml": yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True),
    }


def colours_of(names: list[str]) -> dict[str, int]:
    """Model -> number of its colour: the student and the teacher have their own, baselines share the rest in turn."""
    from jaxdistill.evals.charts import series_colour

    baselines = [name for name in dict.fromkeys(names) if name not in ("student", "teacher")]
    return {"student": 0, "teacher": 1} | {name: series_colour(2 + i) for i, name in enumerate(baselines)}


def benchmarks(evaluated: dict[str, Any] | None, colours: dict[str, int]) -> dict[str, dict[str, Any]]:
    """Every benchmark's counts, with its `bars` and its table of `several` samples."""
    found = evaluated.get("benchmarks", {}) if evaluated else {}
    return {
        name: each
        | {
            "bars": bars(each, colours),
            "several": details.several(each["models"]),
            "domains": details.domains(each["models"]),
        }
        for name, each in found.items()
    }


def ablation_bars(ablated: dict[str, Any] | None) -> list[Bar]:
    """One bar a variant, the student on the traces as they are in the student's colour."""
    return [
        Bar(
            name=row["name"],
            colour=0 if i == 0 else 1,
            accuracy=100 * row["accuracy"],
            low=100 * row["low"],
            high=100 * row["high"],
        )
        for i, row in enumerate(ablated["rows"] if ablated else [])
    ]


def bars(evaluated: dict[str, Any] | None, colours: dict[str, int]) -> list[Bar]:
    """The evaluated models, in the order of `evaluate.models`."""
    models = evaluated["models"] if evaluated else {}
    return [
        Bar(name=name, colour=colours[name], accuracy=100 * m["accuracy"], low=100 * m["low"], high=100 * m["high"])
        for name, m in models.items()
    ]


def headline(evaluated: dict[str, Any] | None) -> list[str]:
    """The result in words: one sentence, and where there is a comparison one or two that say how sure it is."""
    if evaluated and not evaluated["models"] and evaluated.get("benchmarks"):
        return [benchmark_words(evaluated["benchmarks"])]
    if not evaluated or not evaluated["models"]:
        return ["No model has been evaluated yet."]
    models = evaluated["models"]
    problems = f"{evaluated['heldout']:,} held-out problems"
    if "student" not in models:
        best = max(models, key=lambda name: models[name]["accuracy"])
        share = 100 * models[best]["accuracy"]
        return [f"{best} answers {share:.1f}% of {problems} correctly; no student has been evaluated."]
    student = models["student"]["accuracy"]
    gaps = [_gap(student - m["accuracy"], name, m["accuracy"]) for name, m in models.items() if name != "student"]
    listed = " and ".join([", ".join(gaps[:-1]), gaps[-1]] if len(gaps) > 1 else gaps)
    sentence = f"The student answers {100 * student:.1f}% of {problems} correctly" + (f": {listed}." if gaps else ".")
    doubtful = [name for name, c in evaluated["compared"].items() if c["p"] >= 0.05]
    if not evaluated["compared"]:
        return [sentence]
    if doubtful:
        return [
            sentence,
            f"The difference from {' and '.join(doubtful)} is within what chance explains (sign test, p ≥ 0.05).",
        ]
    return [sentence, "Every difference is more than chance explains (sign test on the same problems, p < 0.05)."]


def benchmark_words(found: dict[str, Any]) -> str:
    """The student's accuracy on every benchmark, in one sentence."""
    shares = [
        f"{100 * each['models']['student']['accuracy']:.1f}% of {each['title']}"
        for each in found.values()
        if "student" in each["models"]
    ]
    return f"The student answers {', '.join(shares)} correctly." if shares else "No student has been evaluated yet."


def _gap(gap: float, name: str, other: float) -> str:
    whom = "its teacher" if name == "teacher" else name
    points = round(100 * abs(gap), 1)
    if points == 0:
        return f"level with {whom}"
    return f"{points:.1f} points {'above' if gap > 0 else 'below'} {whom} ({100 * other:.1f}%)"


def p_value(p: float) -> str:
    """A p-value for people: never more digits than it is worth."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def student_words(config: RunConfig) -> str:
    """The student in a few words, from the config alone."""
    if config.student.init is not None:
        return config.student.init
    shape = config.student.architecture
    assert shape is not None, "the config has either"
    return f"{shape.model_type} from scratch, {shape.num_hidden_layers} layers of {shape.hidden_size}"


def waterfall(found: facts.Yield) -> list[Fall]:
    """All traces, what each filter took, what was kept."""
    if not found.total:
        return []
    reasons = list(found.rejected.items())
    if len(reasons) > MOST_REASONS:
        rest = reasons[MOST_REASONS - 1 :]
        reasons = [*reasons[: MOST_REASONS - 1], (f"{len(rest)} other reasons", sum(n for _, n in rest))]
    share = 100 / found.total
    rows, remaining = [], found.total
    for reason, count in reasons:
        remaining -= count
        rows.append(
            Fall(
                label=reason,
                kind="rejected",
                count=count,
                share=count * share,
                left=remaining * share,
                width=count * share,
            )
        )
    first = Fall(label="all traces", kind="all", count=found.total, share=100.0, left=0.0, width=100.0)
    last = Fall(
        label="kept", kind="kept", count=found.kept, share=found.kept * share, left=0.0, width=found.kept * share
    )
    return [first, *rows, last]


def training(config: RunConfig, run: RunDir) -> list[dict[str, Any]]:
    """One row a student whose training has begun: what differs, how much it saw, where it ended."""
    rows = []
    for name, each in facts.students(config, run).items():
        metrics = facts.read_metrics(each)
        if metrics is None:
            continue
        last = {column: values[-1] for column, values in metrics.columns.items()}
        rows.append(
            {
                "name": name,
                "differs": [f"{key}: {value}" for key, value in config.baselines.get(name, {}).items()],
                "finished": read_manifest(each.checkpoints) is not None,
                "step": metrics.steps[-1],
                **{key: last.get(key) for key in ("loss", "tokens", "trained_tokens", "seconds", "tokens_per_second")},
            }
        )
    return rows
