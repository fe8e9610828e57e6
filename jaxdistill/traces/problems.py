"""Where problems come from: the demo task, GSM8K, code sets, any JSON lines; training and held-out sets kept apart."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxdistill.config import ProblemsConfig, RunConfig
from jaxdistill.demo.task import make_problems
from jaxdistill.progress import say
from jaxdistill.records import Problem, RunDir, write_records
from jaxdistill.traces import code_sets, imports, tables

HELDOUT = "heldout"
"""Folder below the problems' own, so that who reads the training problems never reads these."""


def problems(config: RunConfig, run: RunDir) -> dict[str, Any]:
    """Stage: writes `problems.parquet`, and `heldout/heldout.parquet` if there is something to evaluate on.

    A question that is held out is taken out of the training problems (`in_heldout` counts them).
    """
    shutil.rmtree(run.problems / HELDOUT, ignore_errors=True)
    held_out = config.evaluate.problems if config.evaluate else None
    heldout = load_problems(held_out) if held_out else []
    training, in_heldout = _load(config.problems, {problem.prompt for problem in heldout})
    counts: dict[str, Any] = {"problems": write_records(run.problems / "problems.parquet", Problem, training)}
    if held_out:
        counts["heldout"] = write_records(run.problems / HELDOUT / f"{HELDOUT}.parquet", Problem, heldout)
        counts["in_heldout"] = in_heldout
    counts["without_answer"] = sum(problem.answer is None and problem.tests is None for problem in training)
    held = f", {len(heldout):,} held out" if heldout else ""
    dropped = f" ({in_heldout:,} that are held out left out of training)" if in_heldout else ""
    say(f"  {len(training):,} to learn from ({config.problems.source}){held}{dropped}")
    return counts


def load_problems(config: ProblemsConfig, exclude: set[str] | frozenset[str] = frozenset()) -> list[Problem]:
    """The problems of one section, in the order of their source, without those whose question is in `exclude`.

    Raises:
      ValueError: a line that is no problem (`file:line` is named), ids that repeat, fewer than `count`, or none at all.
    """
    return _load(config, exclude)[0]


def _load(config: ProblemsConfig, exclude: set[str] | frozenset[str]) -> tuple[list[Problem], int]:
    """The problems, and how many were passed over because of `exclude` on the way to them."""
    found: list[Problem] = []
    excluded = 0
    for problem in SOURCES[config.source](config, len(exclude)):
        if problem.prompt in exclude:
            excluded += 1
        else:
            found.append(replace(problem, answer=None) if config.forget_answers else problem)
        if len(found) == config.count:
            break
    left_out = f" besides {excluded} that are held out" if excluded else ""
    if not found:
        raise ValueError(f"{config.path or config.source}: no problems in it{left_out}; a run needs at least one.")
    if config.count is not None and len(found) < config.count:
        raise ValueError(
            f"{config.path}: {len(found)} problems{left_out}, but count is {config.count}; lower or drop it."
        )
    return found, excluded


# ---------------------------------------------------------------------------------------------------- sources


def _path(config: ProblemsConfig) -> Path:
    assert config.path is not None
    return Path(config.path)


def _demo(config: ProblemsConfig, spare: int) -> Iterator[Problem]:
    """Problems made on the fly: `count`, and `spare` more to replace those that turn out to be held out."""
    assert config.count is not None
    for number, (question, answer, solution) in enumerate(make_problems(config.count + spare, config.seed)):
        name = f"demo-{config.seed}:{number}"
        yield Problem(
            id=name, prompt=question, answer=str(answer), domain=config.domain, source=name, solution=solution
        )


def _gsm8k(config: ProblemsConfig, spare: int) -> Iterator[Problem]:
    """GSM8K's own files (Cobbe et al. 2021, arXiv:2110.14168): reasoning, then `#### answer`."""
    for path, line, row in tables.json_lines(_path(config)):
        where = f"{path}:{line}"
        reasoning, mark, gold = tables.text(row, "answer", where).rpartition("####")
        if not mark or not gold.strip():
            raise ValueError(
                f"{where}: no answer behind `####`; every line of GSM8K has one; other files want source: jsonl."
            )
        reasoning = re.sub(r"<<[^<>]*>>", "", reasoning).strip()  # calculator annotations, such as <<48/2=24>>
        yield Problem(
            id=f"gsm8k-{path.stem}:{line}",
            prompt=tables.text(row, "question", where),
            answer=gold.strip(),
            domain=config.domain,
            source=f"gsm8k/{path.name}:{line}",
            solution=f"<think>\n{reasoning}\n</think>\nThe answer is \\boxed{{{gold.strip()}}}.",
        )


def _jsonl(config: ProblemsConfig, spare: int) -> Iterator[Problem]:
    first_seen: dict[str, int] = {}
    for path, line, row in tables.json_lines(_path(config)):
        where = f"{path}:{line}"
        name = tables.text(row, config.id_field, where) if config.id_field else f"{path.stem}:{line}"
        if name in first_seen:
            raise ValueError(
                f"{where}: id {name!r} is that of line {first_seen[name]} already; make them differ, or drop id_field."
            )
        first_seen[name] = line
        answer = tables.field(row, config.answer_field, where)
        yield Problem(
            id=name,
            prompt=tables.text(row, config.problem_field, where),
            answer=None if answer is None else tables.text(row, config.answer_field, where),
            domain=tables.domain(row, config.domain_field, config.domain),
            source=f"{path.name}:{line}",
        )


def _trace_set(config: ProblemsConfig, spare: int) -> Iterator[Problem]:
    return imports.problems_of(config)


def _code_set(config: ProblemsConfig, spare: int) -> Iterator[Problem]:
    return code_sets.problems_of(config)


SOURCES = {"demo": _demo, "gsm8k": _gsm8k, "jsonl": _jsonl}
SOURCES |= dict.fromkeys(imports.FORMATS, _trace_set) | dict.fromkeys(code_sets.LAYOUTS, _code_set)
"""Each yields problems in order, given the section and how many of them may be held out."""
