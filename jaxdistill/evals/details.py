"""More of what a run directory says, for the report: data, difficulty, costs, benchmarks, quality, ablations."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
from typing import Any

from jaxdistill.config import RunConfig
from jaxdistill.evals import facts
from jaxdistill.records import RunDir, Verdict, read_manifest, read_records

REGIONS = ("prompt", "thinking", "answer")
ABLATIONS = ("ablations", "ablations.json")
QUALITY = {
    "well_formed": ("Well formed", "share"),
    "answered": ("Answer found", "share"),
    "truncated": ("Truncated", "share"),
    "looping": ("Looping", "share"),
    "tokens": ("Tokens", "number"),
    "tokens_correct": ("when right", "number"),
    "tokens_wrong": ("when not", "number"),
    "steps": ("Steps", "number"),
    "sums_right": ("Sums right", "share"),
    "reflections": ("Reflections", "number"),
    "backtracks": ("Backtracks", "number"),
}
"""Columns of the quality table: what `evals.quality` calls it, what the page does, and how it is written."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """What one stage took."""

    stage: str
    who: str
    seconds: float | None
    tokens: int | None
    what: str
    """What the tokens are."""


def data(run: RunDir) -> dict[str, Any] | None:
    """The counts of the packed examples; None before they are packed."""
    manifest = read_manifest(run.tokens)
    return manifest["counts"] if manifest else None


def left_out(run: RunDir) -> list[dict[str, Any]]:
    """What could not be read of the problems' sets: one table a set, empty where everything could.

    Returns:
      for each set its `name`, `rows`, `left_out`, and `reasons`: what (`row` or `response`), reason, count, and the
      first place with what is special about it.
    """
    manifest = read_manifest(run.problems)
    counts = manifest["counts"] if manifest else {}
    found = []
    for name, key in (("to learn from", "bad_rows"), ("held out", "heldout_bad_rows")):
        if key not in counts:
            continue
        each = counts[key]
        reasons = [
            {"what": what, "reason": reason, **numbers}
            for what, table in (("row", each["reasons"]), ("response", each["responses"]))
            for reason, numbers in table.items()
        ]
        found.append({"name": name, "rows": each["rows"], "left_out": each["left_out"], "reasons": reasons})
    return found


def left_turns(run: RunDir) -> dict[str, dict[str, Any]]:
    """Turns of imported chats that were not taken: their kind -> in how many rows (`count`), and the first place."""
    manifest = read_manifest(run.problems)
    return manifest["counts"].get("left_turns", {}) if manifest else {}


def hub_sets(run: RunDir) -> list[str]:
    """The data sets of the hub that the problems are from, each with the commit that was read."""
    manifest = read_manifest(run.problems)
    counts = manifest["counts"] if manifest else {}
    found = [counts[key] for key in ("hub", "heldout_hub") if key in counts]
    return list(dict.fromkeys(f"{each['repo']} @ {each['commit']}" for each in found))


def bins(histograms: dict[str, list[int]]) -> tuple[list[str], list[list[int]]]:
    """Labels of the bins, and the counts of each region."""
    labels = [
        f"{low:,}" if high - low == 1 else f"{low:,}–{high - 1:,}"
        for low, high in itertools.pairwise(histograms["edges"])
    ]
    return labels, [histograms[name] for name in REGIONS]


def difficulty(run: RunDir) -> dict[str, Any] | None:
    """How often the teacher was right, by problem; None with one sample a problem, or before the verdicts are there.

    Returns:
      `labels` of ten shares from never to always, `problems` with each, `never` and `always`, and `samples` a problem.
    """
    if read_manifest(run.verdicts) is None:
        return None
    right, total = collections.Counter(), collections.Counter()
    for verdict in read_records(run.verdicts, Verdict):
        total[verdict.problem_id] += 1
        right[verdict.problem_id] += verdict.outcome == "correct"
    if not total or max(total.values()) < 2:
        return None
    rates = [right[problem] / total[problem] for problem in total]
    labels = ["0%", "≤ 25%", "≤ 50%", "≤ 75%", "< 100%", "100%"]
    bounds = [0.0, 0.25, 0.5, 0.75, 1 - 1e-9, 1.0]
    counts = [0] * len(bounds)
    for rate in rates:
        counts[next(i for i, bound in enumerate(bounds) if rate <= bound)] += 1
    samples = sum(total.values()) / len(total)
    return {"labels": labels, "problems": counts, "never": counts[0], "always": counts[-1], "samples": samples}


def held_out_curves(run: RunDir) -> dict[str, tuple[list[int], list[float]]]:
    """What was measured while training: name -> steps and values of `accuracy`, `loss`, ... of `evaluations.jsonl`."""
    try:
        text = (run.checkpoints / "evaluations.jsonl").read_text()
    except FileNotFoundError:
        return {}
    by_step: dict[int, dict[str, Any]] = {}
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:  # torn by a kill
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            by_step[entry["step"]] = entry
    found: dict[str, tuple[list[int], list[float]]] = {}
    for step in sorted(by_step):
        for name, value in by_step[step].items():
            if name != "step" and isinstance(value, int | float):
                steps, values = found.setdefault(name, ([], []))
                steps.append(step)
                values.append(value)
    return found


def costs(config: RunConfig, run: RunDir) -> list[Cost]:
    """Seconds and tokens of every finished stage, the baselines' too."""
    found = []
    for name, each in facts.students(config, run).items():
        for stage, title in facts.STAGES.items():
            manifest = read_manifest(each.root / stage)
            if manifest is None:
                continue
            counts = manifest["counts"]
            tokens, what = _tokens(stage, counts, each)
            seconds = counts.get("seconds", counts.get("wall_seconds"))
            found.append(Cost(stage=title, who=name, seconds=seconds, tokens=tokens, what=what))
    return found


def _tokens(stage: str, counts: dict[str, Any], run: RunDir) -> tuple[int | None, str]:
    if stage == "traces":
        sampled = facts.trace_tokens(run.traces)
        return (sampled, "sampled from the teacher") if sampled else (None, "")
    if stage == "checkpoints":
        metrics = facts.read_metrics(run)
        column = metrics.columns.get("tokens") if metrics else None
        return (int(column[-1]), "trained on, prompts too") if column else (None, "")
    if stage == "evaluation":
        parts = [counts, *counts.get("benchmarks", {}).values()]
        return sum(m.get("tokens", 0) for part in parts for m in part["models"].values()) or None, "sampled"
    return None, ""


def total(found: list[Cost]) -> dict[str, float]:
    """`seconds` and `tokens` of all stages."""
    return {
        "seconds": sum(cost.seconds or 0.0 for cost in found),
        "tokens": float(sum(cost.tokens or 0 for cost in found)),
    }


def several(models: dict[str, Any]) -> dict[str, Any] | None:
    """pass@k and the like as a table: `columns`, and a row of (value, low, high) or None a model; None without any."""
    columns: list[tuple[str, str, str]] = []
    for m in models.values():
        keys = [("pass_at", k, f"pass@{k}") for k in m.get("pass_at", {})]
        keys += [("maj_at", k, f"maj@{k}") for k in m.get("maj_at", {}) if k != "1"]
        columns += [key for key in keys if key not in columns]
    if not columns:
        return None
    columns.sort(key=lambda key: (key[0] != "pass_at", int(key[1])))
    rows = {
        name: [m.get(kind, {}).get(k) for kind, k, _ in columns] + ([m["best_of_n"]] if "best_of_n" in m else [])
        for name, m in models.items()
    }
    best = ["best of n"] if any("best_of_n" in m for m in models.values()) else []
    return {"columns": [title for _, _, title in columns] + best, "rows": rows}


def domains(models: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Domain -> model -> its accuracy there; empty where there is one domain."""
    found: dict[str, dict[str, Any]] = {}
    for name, m in models.items():
        for domain, numbers in m.get("domains", {}).items():
            found.setdefault(domain, {})[name] = numbers
    return found


def quality(models: dict[str, Any]) -> dict[str, list[str]]:
    """Model -> the cells of the quality table, for `QUALITY`'s columns."""
    return {
        name: [_cell(m["quality"].get(key), how) for key, (_, how) in QUALITY.items()]
        for name, m in models.items()
        if m.get("quality")
    }


def _cell(value: float | None, how: str) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.1f}%" if how == "share" else f"{value:,.0f}" if value >= 20 else f"{value:.2f}"


def faithfulness(models: dict[str, Any]) -> dict[str, Any]:
    """Model -> what it says of its own answers, see `evals.faithfulness`; only models that were read."""
    return {name: m["faithfulness"] for name, m in models.items() if m.get("faithfulness", {}).get("responses", 0) > 0}


def early(read: dict[str, Any], key: str) -> tuple[list[float], list[float]]:
    """Share of the reasoning that was given, and `probability` or `says` of the answer behind it."""
    variants = read["variants"]
    given = {0.0: "none", 1.0: "whole"}
    given |= {float(name.split()[1]): name for name in variants if name.startswith("first ")}
    shares = [share for share in sorted(given) if given[share] in variants]
    return shares, [variants[given[share]][key] for share in shares]


def ablations(run: RunDir) -> dict[str, Any] | None:
    """What `jaxdistill ablate` has found; None before it."""
    path = run.root.joinpath(*ABLATIONS)
    return json.loads(path.read_text()) if path.is_file() else None
