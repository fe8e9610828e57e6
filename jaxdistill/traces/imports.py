"""Existing trace sets: problems with one or more responses each, in the shapes in which people publish them.

    messages            {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}
    sharegpt            {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}
    r1                  {"problem": ..., "generations": [..., ...], "answer": ...}
    prompt_completion   {"prompt": ..., "completion": ...}

Of a longer chat the first question and its answer are taken. A system prompt is no part of the problem, and is left
out. `answer` (`problems.answer_field`) is the gold answer wherever a row has it. A response is text with its thinking
between tags; a message may also hold its thinking in `reasoning_content`, `reasoning` or `thinking`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxdistill.config import ProblemsConfig, TracesConfig
from jaxdistill.records import Problem, Trace, split_response
from jaxdistill.traces import tables, thinking
from jaxdistill.traces.work import trace_id

STYLE = "plain"
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
    "developer": "system",
}


@dataclasses.dataclass(frozen=True)
class Exchange:
    """One problem and what was answered to it."""

    prompt: str
    responses: tuple[str, ...]


def problems_of(config: ProblemsConfig) -> Iterator[Problem]:
    """The problems of a trace set, in the order of its rows.

    Raises:
      ValueError: a row that is not of the set's shape, or an id that repeats; file and row are named.
    """
    first_seen: dict[str, str] = {}
    for name, where, row, source in _rows(config):
        if name in first_seen:
            raise ValueError(f"{where}: id {name!r} is that of {first_seen[name]} already; make them differ.")
        first_seen[name] = where
        found = FORMATS[config.source](row, config, where)
        answer = row.get(config.answer_field)
        yield Problem(
            id=name,
            prompt=found.prompt,
            answer=None if answer in (None, "") else tables.text(row, config.answer_field, where),
            domain=tables.domain(row, config.domain_field, config.domain),
            source=source,
        )


def responses_of(config: ProblemsConfig, problems: list[Problem]) -> Callable[[], Iterator[tuple[str, int, str]]]:
    """A function that goes through (problem id, sample number, response), in the order of the problems' source.

    Sets of other shapes (`FORMATS` does not have them) come with at most one solution a problem.
    """
    if config.source not in FORMATS:
        return lambda: ((problem.id, 0, problem.solution) for problem in problems if problem.solution)
    wanted = {problem.id for problem in problems}

    def read() -> Iterator[tuple[str, int, str]]:
        for name, where, row, _ in _rows(config):
            if name in wanted:
                for sample, response in enumerate(FORMATS[config.source](row, config, where).responses):
                    if response.strip():
                        yield name, sample, response

    return read


def to_trace(problem_id: str, sample: int, response: str, source: str, config: TracesConfig) -> Trace:
    """An imported response as a trace; who wrote it and how it was sampled is not known here."""
    response = thinking.normalize(response, config.think_tags)
    thoughts, content = split_response(response)
    return Trace(
        id=trace_id(problem_id, STYLE, sample),
        problem_id=problem_id,
        style=STYLE,
        sample=sample,
        engine="import",
        teacher=source,
        revision="",
        temperature=0.0,
        top_p=1.0,
        max_tokens=0,
        seed=0,
        prompt_ids=[],
        output_ids=[],
        response=response,
        thinking=thoughts,
        content=content,
        finish_reason="imported",
    )


def _rows(config: ProblemsConfig) -> Iterator[tuple[str, str, dict[str, Any], str]]:
    """(problem id, where it is, row, source)."""
    assert config.path is not None
    for path, number, row in tables.read_rows(Path(config.path)):
        where = f"{path}:{number}"
        name = tables.text(row, config.id_field, where) if config.id_field else f"{path.stem}:{number}"
        yield name, where, row, f"{path.name}:{number}"


# ----------------------------------------------------------------------------------------------------------- shapes


def _messages(row: dict[str, Any], config: ProblemsConfig, where: str) -> Exchange:
    return _first_exchange(tables.field(row, "messages", where), "messages", where)


def _sharegpt(row: dict[str, Any], config: ProblemsConfig, where: str) -> Exchange:
    return _first_exchange(tables.field(row, "conversations", where), "conversations", where)


def _r1(row: dict[str, Any], config: ProblemsConfig, where: str) -> Exchange:
    generations = tables.field(row, "generations", where)
    if not isinstance(generations, list) or not all(isinstance(text, str) for text in generations):
        raise ValueError(f"{where}: field 'generations' is not a list of texts.")
    return Exchange(tables.text(row, config.problem_field, where), tuple(generations))


def _prompt_completion(row: dict[str, Any], config: ProblemsConfig, where: str) -> Exchange:
    if isinstance(row.get("prompt"), list):  # the conversational form: both are lists of messages
        turns = [*row["prompt"], *(row.get("completion") or [])]
        return _first_exchange(turns, "prompt", where)
    return Exchange(tables.text(row, "prompt", where), (tables.text(row, "completion", where),))


def _first_exchange(turns: Any, name: str, where: str) -> Exchange:
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"{where}: field {name!r} is not a list of turns.")
    said = [_turn(turn, where) for turn in turns]
    said = [(role, text) for role, text in said if role != "system"]
    roles = [role for role, _ in said[:2]]
    if roles != ["user", "assistant"]:
        raise ValueError(f"{where}: {name!r} begins with {roles or 'nothing'}, not with a question and its answer.")
    if not said[0][1].strip():
        raise ValueError(f"{where}: the question is empty; fill it, or take the row out.")
    return Exchange(said[0][1], (said[1][1],))


def _turn(turn: dict[str, Any], where: str) -> tuple[str, str]:
    role = turn.get("role", turn.get("from"))
    content = turn.get("content", turn.get("value"))
    if role not in ROLES:
        raise ValueError(f"{where}: a turn by {role!r}; known are {', '.join(ROLES)}.")
    if not isinstance(content, str):
        raise ValueError(f"{where}: the turn of {role!r} has no text in `content` (or `value`).")
    thoughts = next((turn[key] for key in ("reasoning_content", "reasoning", "thinking") if turn.get(key)), None)
    return ROLES[role], thinking.join(thoughts, content)


FORMATS: dict[str, Callable[[dict[str, Any], ProblemsConfig, str], Exchange]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "r1": _r1,
    "prompt_completion": _prompt_completion,
}
"""Each takes one row apart; the names are those of `problems.source`."""
