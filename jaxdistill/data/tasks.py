"""Several tasks from one trace: rationale and label, the next step, the answer from the reasoning.

Each task has its own prompt, so that one student learns all of them and is asked for one ("distilling step by step",
Hsieh et al. 2023, arXiv:2305.02301, section 3.2: a label task and a rationale task, told apart by a prefix). The loss
is a sum over trained tokens, so a task's weight is how often its examples come.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from jaxdistill.config import TaskConfig
from jaxdistill.data.examples import Text
from jaxdistill.data.sources import Candidate
from jaxdistill.records import Step, split_response, write_records

STEPS = "steps.parquet"
Parts = list[tuple[dict[str, str], str, str]]
"""What goes into a task's prompt beside the problem, the response, and the part of it behind the thinking."""


def split_steps(thinking: str) -> list[str]:
    """The reasoning's steps: its lines with something on them, white space at both ends left out."""
    return [line.strip() for line in thinking.splitlines() if line.strip()]


def _trace(text: Text, steps: list[str]) -> Parts:
    return [({}, text.response, text.content)]


def _label(text: Text, steps: list[str]) -> Parts:
    return [({}, text.content, text.content)]


def _rationale(text: Text, steps: list[str]) -> Parts:
    rationale = "\n".join(steps)
    return [({}, rationale, rationale)]


def _next_step(text: Text, steps: list[str]) -> Parts:
    return [({"steps": "\n".join(steps[:i])}, step, step) for i, step in enumerate(steps)]


def _answer(text: Text, steps: list[str]) -> Parts:
    return [({"steps": "\n".join(steps)}, text.content, text.content)]


KINDS: dict[str, Callable[[Text, list[str]], Parts]] = {
    "trace": _trace,
    "label": _label,
    "rationale": _rationale,
    "next_step": _next_step,
    "answer": _answer,
}


def copies(name: str, weight: float) -> int:
    """How often an example comes: the weight's whole part, and once more for a share of names by its rest."""
    whole = int(weight)
    draw = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) / 2**64
    return whole + (draw < weight - whole)


def texts_of(text: Text, task: TaskConfig) -> list[Text]:
    """The examples of one task from one trace, without regard to its weight; none if the trace has no reasoning.

    An example's id is the trace's, with `#task` and, where a trace gives several, `.number` behind it.
    """
    thinking, _ = split_response(text.response)
    steps = split_steps(thinking or "")
    if not steps and task.kind != "trace":
        return []
    parts = KINDS[task.kind](text, steps)
    found = []
    for number, (fields, response, content) in enumerate(parts):
        prompt = task.template
        for key, value in ({"problem": text.problem} | fields).items():  # not `format`: problems hold braces
            prompt = prompt.replace(f"{{{key}}}", value)
        name = f"{text.trace_id}#{task.kind}" + (f".{number}" if len(parts) > 1 else "")
        found.append(Text(name, prompt, response, content))
    return found


def expand(candidates: Iterable[Candidate], tasks: tuple[TaskConfig, ...]) -> Iterator[Candidate]:
    """Every trace as the examples of every task; as it is, without tasks."""
    if not tasks:
        yield from candidates
        return
    for candidate in candidates:
        for task in tasks:
            for text in texts_of(candidate.text, task):
                for copy in range(copies(text.trace_id, task.weight)):
                    again = dataclasses.replace(text, trace_id=f"{text.trace_id}~{copy}") if copy else text
                    yield dataclasses.replace(candidate, text=again)


def write_steps(folder: Path, candidates: Iterable[Candidate]) -> int:
    """Writes the parsed steps of every trace as records; returns how many there are."""

    def records() -> Iterator[Step]:
        for candidate in candidates:
            thinking, _ = split_response(candidate.text.response)
            for number, step in enumerate(split_steps(thinking or "")):
                yield Step(trace_id=candidate.text.trace_id, number=number, text=step)

    return write_records(folder / STEPS, Step, records())
