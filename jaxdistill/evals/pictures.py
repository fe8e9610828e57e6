"""Which charts the report has, and what is drawn in each; how they look is `charts`' matter."""

from __future__ import annotations

from typing import Any

from jaxdistill.config import RunConfig
from jaxdistill.evals import details, facts
from jaxdistill.records import RunDir

TRAINING = (
    ("loss", "Training loss by step", True),
    ("learning_rate", "Learning rate by step", False),
    ("accuracy", "Share of trained tokens that are the likeliest, by step", True),
    ("tokens_per_second", "Tokens a second by step", True),
)
"""Columns of `metrics.jsonl`, their titles, and whether they are smoothed."""


def draw(
    config: RunConfig, run: RunDir, found: facts.Yield | None, models: dict[str, Any], colours: dict[str, int]
) -> dict[str, Any]:
    """Inline SVG, by name; only the charts that there is data for."""
    from markupsafe import Markup

    drawn = _training(config, run, colours) | _traces(run, found) | _early(models, colours)
    # safe: drawn by us, from numbers and our own words alone
    return {name: Markup(svg) for name, svg in drawn.items()}


def _training(config: RunConfig, run: RunDir, colours: dict[str, int]) -> dict[str, str]:
    from jaxdistill.evals import charts

    drawn = {}
    students = facts.students(config, run)
    logs = {name: log for name, each in students.items() if (log := facts.read_metrics(each))}
    for column, title, smooth in TRAINING:
        curves = [
            charts.Curve(label=name, colour=colours[name], x=log.steps, y=log.columns[column])
            for name, log in logs.items()
            if column in log.columns
        ]
        if curves:
            options = {"x_label": "step", "y_label": column.replace("_", " ")}
            drawn[column] = charts.line_chart(column.replace("_", "-"), title, curves, smooth=smooth, **options)
    held = {name: details.held_out_curves(each) for name, each in students.items()}
    for column in ("accuracy", "loss"):
        curves = [
            charts.Curve(label=name, colour=colours[name], x=log[column][0], y=log[column][1])
            for name, log in held.items()
            if column in log
        ]
        if curves:
            title = f"Held-out {column} by step"
            drawn[f"held_{column}"] = charts.line_chart(f"held-{column}", title, curves, x_label="step", y_label=column)
    return drawn


def _traces(run: RunDir, found: facts.Yield | None) -> dict[str, str]:
    """Lengths and difficulty."""
    from jaxdistill.evals import charts

    drawn = {}
    if found and found.total:
        title = f"Length of the traces in {found.unit}"
        lengths = (found.kept_lengths, found.rejected_lengths)
        drawn["lengths"] = charts.histogram("lengths", title, *lengths, x_label=found.unit)
    prepared = details.data(run)
    if prepared and "length_histograms" in prepared:
        labels, counts = details.bins(prepared["length_histograms"])
        series = list(zip((1, 0, 2), counts, strict=True))
        options = {"x_label": "tokens", "y_label": "examples"}
        drawn["data"] = charts.bar_chart("data", "Tokens of an example by region", labels, series, **options)
    hard = details.difficulty(run)
    if hard:
        title = "Problems by the share of the teacher's samples that are right"
        options = {"x_label": "samples right", "y_label": "problems"}
        drawn["difficulty"] = charts.bar_chart("difficulty", title, hard["labels"], [(0, hard["problems"])], **options)
    return drawn


def _early(models: dict[str, Any], colours: dict[str, int]) -> dict[str, str]:
    """What each model says of its answer when it is given a part of its reasoning."""
    from jaxdistill.evals import charts

    drawn = {}
    read = details.faithfulness(models)
    for key, label in (("probability", "P(answer)"), ("says", "share that says it")) if read else ():
        points = {name: details.early(found, key) for name, found in read.items()}
        curves = [charts.Curve(label=name, colour=colours[name], x=x, y=y) for name, (x, y) in points.items()]
        title = f"{label} by the share of the reasoning that is given"
        options = {"x_label": "share of the steps that is given", "y_label": label}
        drawn[f"early_{key}"] = charts.line_chart(f"early-{key}", title, curves, logarithmic=False, **options)
    return drawn
