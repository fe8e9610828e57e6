"""What a run directory says about its run, as plain data for the report. Every part may be missing yet."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from jaxdistill.config import RunConfig
from jaxdistill.records import MANIFEST, RunDir, Verdict, read_manifest, read_records

STAGES = {
    "problems": "Problems",
    "traces": "Teacher traces",
    "verdicts": "Verdicts",
    "tokens": "Packed tokens",
    "checkpoints": "Training",
    "export": "Export",
    "evaluation": "Evaluation",
}
"""Folder -> title, in the order in which a run goes through them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """One stage in the picture of the pipeline."""

    folder: str
    title: str
    state: str
    """`done`, `unfinished` (a folder without manifest) or `not run yet`."""
    number: str = ""
    unit: str = ""
    details: tuple[str, ...] = ()
    seconds: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metrics:
    """`metrics.jsonl` of one student, column by column."""

    steps: list[int]
    columns: dict[str, list[float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Yield:
    """What became of the teacher's traces."""

    total: int
    kept: int
    rejected: dict[str, int]
    """Filter -> traces that fell to it first, in the order in which the filters were asked."""
    problems_kept: int
    """Problems with at least one kept trace."""
    problems: int
    kept_lengths: list[int]
    rejected_lengths: list[int]
    unit: str
    """Of the lengths: tokens, or characters where traces were imported and have no tokens."""
    revisions: tuple[str, ...]
    """Teachers and their revisions, as the traces name them."""


def read_yield(run: RunDir) -> Yield | None:
    """Verdicts joined with the lengths of their traces; None while either stage is unfinished."""
    manifest = read_manifest(run.verdicts)
    if read_manifest(run.traces) is None or manifest is None:
        return None
    rejected = collections.Counter(dict.fromkeys(manifest["counts"].get("rejected", ()), 0))
    kept, problems, problems_kept = set(), set(), set()
    for verdict in read_records(run.verdicts, Verdict):
        problems.add(verdict.problem_id)
        if verdict.kept:
            kept.add(verdict.trace_id)
            problems_kept.add(verdict.problem_id)
        else:
            rejected[verdict.rejected_for or "no reason"] += 1
    lengths, revisions = {}, collections.Counter()
    for trace_id, tokens, characters, revision in _trace_columns(run.traces):
        lengths[trace_id] = (tokens, characters)
        revisions[revision] += 1
    which = 0 if any(tokens for tokens, _ in lengths.values()) else 1
    return Yield(
        total=len(kept) + rejected.total(),
        kept=len(kept),
        rejected={reason: count for reason, count in rejected.items() if count},
        problems_kept=len(problems_kept),
        problems=len(problems),
        kept_lengths=[n[which] for i, n in lengths.items() if i in kept],
        rejected_lengths=[n[which] for i, n in lengths.items() if i not in kept],
        unit=("tokens", "characters")[which],
        revisions=tuple(sorted(revisions)),
    )


def _trace_columns(folder: Path) -> Iterator[tuple[str, int, int, str]]:
    """(id, output tokens, characters, `teacher @ revision`) of every trace, whose tokens never become Python lists."""
    for file in sorted(folder.glob("*.parquet")):
        columns = ["id", "engine", "output_ids", "response", "teacher", "revision"]
        for batch in pq.ParquetFile(file).iter_batches(columns=columns):
            sizes = pc.fill_null(pc.list_value_length(batch["output_ids"]), 0).to_pylist()  # of a malformed record
            characters = pc.fill_null(pc.utf8_length(batch["response"]), 0).to_pylist()
            named = (batch[name].to_pylist() for name in ("id", "engine", "teacher", "revision"))
            for i, (trace_id, engine, teacher, revision) in enumerate(zip(*named, strict=True)):
                # of an imported trace it is the row that it came with, and a page is no place for a million of them
                who = teacher.rpartition(":")[0] if engine == "import" else teacher
                yield trace_id, sizes[i], characters[i], f"{who} @ {revision}" if revision else who


def read_metrics(run: RunDir) -> Metrics | None:
    """The training log; None if there is not one whole line of it.

    A run that was killed leaves a torn line, and logs the steps since its checkpoint again: the last of each counts.
    """
    try:
        lines = (run.checkpoints / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return None
    by_step: dict[int, dict[str, Any]] = {}
    for line in lines:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(entry, dict) and {"step", "loss", "learning_rate"} <= entry.keys():
            by_step[entry["step"]] = entry
    if not by_step:
        return None
    entries = [by_step[step] for step in sorted(by_step)]
    names = [
        name
        for name, value in entries[-1].items()
        if isinstance(value, int | float) and all(name in e for e in entries)
    ]
    return Metrics(steps=sorted(by_step), columns={name: [e[name] for e in entries] for name in names})


def trace_tokens(folder: Path) -> int:
    """Tokens of all traces; 0 where they were imported and have none."""
    return sum(n for _, n, _, _ in _trace_columns(folder))


def students(config: RunConfig, run: RunDir) -> dict[str, RunDir]:
    """`student` and every baseline, with their folders."""
    return {"student": run} | {name: run.baseline(name) for name in config.baselines}


def steps(run: RunDir) -> list[Step]:
    """The main run's pipeline, stage by stage."""
    found = []
    for name, title in STAGES.items():
        folder = run.root / name
        manifest = read_manifest(folder)
        if manifest is None:
            begun = folder.is_dir() and any(folder.iterdir())
            found.append(Step(folder=name, title=title, state="unfinished" if begun else "not run yet"))
            continue
        counts = manifest["counts"]
        number, unit, details = _DESCRIBE[name](run, counts)
        found.append(
            Step(
                folder=name,
                title=title,
                state="done",
                number=number,
                unit=unit,
                details=tuple(d for d in details if d),
                # a stage that was resumed knows better than the clock of its last try
                seconds=counts.get("seconds", counts.get("wall_seconds")),
            )
        )
    return found


# Every describer gives (number, unit, details). What lies on disk is counted there; the rest is taken from the
# manifest's counts where the stage says it.


def _rows(folder: Path) -> int:
    return sum(pq.read_metadata(file).num_rows for file in folder.glob("*.parquet"))


def _problems(run: RunDir, counts: dict[str, Any]) -> tuple[str, str, list[str]]:
    held_out = _rows(run.problems / "heldout")
    unread = counts.get("bad_rows", {}).get("left_out", 0)
    details = [f"{held_out:,} held out" if held_out else "", f"{unread:,} rows could not be read" if unread else ""]
    return f"{_rows(run.problems):,}", "to learn from", details


def _traces(run: RunDir, counts: dict[str, Any]) -> tuple[str, str, list[str]]:
    tokens = trace_tokens(run.traces)
    return f"{_rows(run.traces):,}", "traces", [f"{short(tokens)} tokens" if tokens else "imported"]


def _verdicts(run: RunDir, counts: dict[str, Any]) -> tuple[str, str, list[str]]:
    kept = total = 0
    for verdict in read_records(run.verdicts, Verdict):
        total += 1
        kept += verdict.kept
    return f"{kept:,}", "kept", [f"{100 * kept / total:.1f}% of {total:,}" if total else ""]


def _tokens(run: RunDir, counts: dict[str, Any]) -> tuple[str, str, list[str]]:
    rows, efficiency = counts.get("rows"), counts.get("packing_efficiency")
    details = [f"{rows:,} rows" if rows else "", f"{100 * efficiency:.0f}% filled" if efficiency else ""]
    return short(counts.get("tokens", 0)), "tokens", details


def _checkpoints(run: RunDir, counts: dict[str, Any]) -> tuple[str, str, list[str]]:
    metrics = read_metrics(run)
    if metrics is None:
        return f"{counts.get('steps', 0):,}", "steps", []
    return f"{metrics.steps[-1]:,}", "steps", [f"final loss {metrics.columns['loss'][-1]:.3g}"]


def _export(run: RunDir, counts: dict[str, Any]) -> tuple[str, str, list[str]]:
    size = sum(file.stat().st_size for file in run.export.glob("*.safetensors"))
    trained = read_manifest(run.checkpoints)
    parameters = trained["counts"].get("parameters") if trained else None
    check = counts.get("check")
    details = [
        f"{short(parameters)} parameters" if parameters else "",
        f"logits within {check['max_difference']:.0e} of transformers'" if check else "",
        "served by vLLM" if counts.get("served") else "",
    ]
    return f"{short(size)}B", "checkpoint", details


def _evaluation(run: RunDir, counts: dict[str, Any]) -> tuple[str, str, list[str]]:
    student = counts["models"].get("student")
    details = [f"{len(counts['models'])} models on {counts['heldout']:,} problems"] if counts["heldout"] else []
    extra = len(counts.get("benchmarks", {}))
    details += [f"{extra} benchmark{'s' if extra > 1 else ''}"] if extra else []
    return (
        (f"{100 * student['accuracy']:.1f}%", "student", details)
        if student
        else (f"{len(counts['models']) or extra}", "models" if counts["models"] else "benchmarks", details[1:])
    )


_DESCRIBE = {
    "problems": _problems,
    "traces": _traces,
    "verdicts": _verdicts,
    "tokens": _tokens,
    "checkpoints": _checkpoints,
    "export": _export,
    "evaluation": _evaluation,
}


# ---------------------------------------------------------------------------------------------- provenance


def manifests(config: RunConfig, run: RunDir) -> list[dict[str, Any]]:
    """One row per finished stage: where, hashes of its config and of the manifest itself, and its inputs."""
    found = []
    for name, each in students(config, run).items():
        for stage in STAGES:
            file = each.root / stage / MANIFEST
            manifest = read_manifest(file.parent)
            if manifest is not None:
                found.append(
                    {
                        "folder": stage if name == "student" else f"{name}/{stage}",
                        "config_hash": manifest["config_hash"],
                        "sha256": hashlib.sha256(file.read_bytes()).hexdigest()[:16],
                        "inputs": manifest["inputs"],
                    }
                )
    return found


def versions(config: RunConfig, run: RunDir) -> dict[str, str]:
    """Versions that the finished stages ran with; several of one library are all named."""
    found: dict[str, list[str]] = {}
    for each in students(config, run).values():
        for stage in STAGES:
            manifest = read_manifest(each.root / stage)
            for name, version in (manifest["versions"] if manifest else {}).items():
                if version not in found.setdefault(name, []):
                    found[name].append(version)
    return {name: ", ".join(each) for name, each in found.items()}


def short(number: float) -> str:
    """A count for people: 950, 12.3k, 4.56M, 1.2G."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:,.0f}"


def duration(seconds: float) -> str:
    """Seconds for people: 0.4 s, 37 s, 4 min 05 s, 2 h 07 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
