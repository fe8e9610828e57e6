"""Existing trace sets: problems with one or more responses each, in the shapes in which people publish them.

    messages            {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}
    sharegpt            {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}
    r1                  {"problem": ..., "generations": [..., ...], "answer": ...}
    prompt_completion   {"prompt": ..., "completion": ...}

Of a longer chat the first question and its answer are taken, and nothing behind them is read. System and developer
turns (and a `system` beside the chat) are no part of the problem, and are left out. Both are counted. A chat whose
first answer calls a tool has no such answer, and is left out as a whole. `answer` (`problems.answer_field`) is the
gold answer wherever a row has it. A response is text with its thinking between tags, or beside it (`traces.content`).
A chat may also be a struct of lists, as `datasets` writes a sequence of objects, or JSON in a text.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from jaxdistill.config import ProblemsConfig, TracesConfig
from jaxdistill.records import Problem, Trace, split_response
from jaxdistill.traces import content, json_rows, thinking, values
from jaxdistill.traces.content import THOUGHT_FIELDS
from jaxdistill.traces.tables import Row
from jaxdistill.traces.values import BadRow, Twice
from jaxdistill.traces.work import trace_id

STYLE = "plain"
TAGS = (thinking.OPEN, thinking.CLOSE)
_ROLES = {
    "user": "human user prompter",
    "assistant": "gpt assistant chatgpt model bot ai",
    "system": "system developer",
    "thoughts": "reasoning thinking thought",
    "tool": "tool function observation tool_response function_response tool_result ipython",
    "call": "function_call tool_call",
}
ROLES = {name: role for role, names in _ROLES.items() for name in names.split()}
"""Who speaks, as sets name them."""
SYSTEM = "the system turn is left out"
BEHIND = "turns behind the first response are left out"
_SYSTEM_FIELDS = ("system", "system_prompt")
"""Fields beside a chat in which sets keep its system turn."""


@dataclasses.dataclass(frozen=True)
class Exchange:
    """One problem and what was answered to it."""

    prompt: str
    responses: tuple[str | BadRow, ...]
    """In the place of one that cannot be read is why."""
    left: tuple[BadRow, ...] = ()
    """Turns that say something and are not taken: `SYSTEM`, `BEHIND`."""


def exchange_of(data: dict[str, Any], config: ProblemsConfig, tags: tuple[str, str] = TAGS) -> Exchange:
    """Question and responses of one row.

    Raises:
      BadRow: it is not of the set's shape, or none of its responses can be read.
    """
    try:
        found = FORMATS[config.source](data, config, tags)
    except values.UNEXPECTED as error:
        raise values.unexpected(error) from None
    bad = [response for response in found.responses if isinstance(response, BadRow)]
    if len(bad) == len(found.responses):
        raise bad[0] if bad else BadRow("no response in it")
    return found


def problem_of(row: Row, config: ProblemsConfig) -> tuple[Problem, list[BadRow], tuple[BadRow, ...]]:
    """A row's problem, what is wrong with those of its responses that cannot be read, and turns that are not taken.

    Raises:
      BadRow: no problem can be read from it, or no response.
    """
    assert not isinstance(row.data, BadRow)
    found = exchange_of(row.data, config)
    problem = Problem(
        id=name_of(row, config),
        prompt=found.prompt,
        answer=values.gold(row.data, config.answer_field) if config.answer_field in row.data else None,
        domain=values.domain(row.data, config.domain_field, config.domain),
        source=f"{row.file.source}:{row.number}",
    )
    bad = [response for response in found.responses if isinstance(response, BadRow)]
    return problem, bad, (*_system_beside(row.data), *found.left)


def name_of(row: Row, config: ProblemsConfig) -> str:
    """The problem's id: a field of the row, or where it stands.

    Raises:
      BadRow: the field holds no text.
    """
    assert not isinstance(row.data, BadRow)
    return values.text(row.data, config.id_field) if config.id_field else f"{row.file.stem}:{row.number}"


def columns_of(config: ProblemsConfig) -> tuple[list[str], list[str]]:
    """(fields that are looked at, those of them that a table must have)."""
    needed = {
        "messages": ["messages"],
        "sharegpt": ["conversations"],
        "r1": ["generations", config.problem_field],
        "prompt_completion": ["prompt", "completion"],
    }[config.source]
    beside = list(THOUGHT_FIELDS) if config.source == "prompt_completion" else []
    named = [*_SYSTEM_FIELDS, config.answer_field, *filter(None, (config.id_field, config.domain_field))]
    return [*needed, *beside, *named], [*needed, *filter(None, (config.id_field,))]


def paired(
    rows: Iterator[Row], problems: Iterator[Problem], config: ProblemsConfig, tags: tuple[str, str] = TAGS
) -> Iterator[tuple[Problem, list[tuple[int, str]]]]:
    """Each problem with its (sample number, response)s: rows and problems in one order, none of them kept.

    Raises:
      ValueError: the rows are not those that the problems were made of.
    """
    problem = next(problems, None)
    if problem is None:
        return
    for row in rows:
        if isinstance(row.data, BadRow):
            continue
        try:
            if name_of(row, config) != problem.id:
                continue
            found = exchange_of(row.data, config)
        except BadRow:  # left out where the problems were made, too
            continue
        if tags != TAGS:
            with contextlib.suppress(BadRow):  # by these tags a response may have two different thoughts
                found = exchange_of(row.data, config, tags)
        if found.prompt != problem.prompt:
            raise ValueError(
                f"{row.where}: another question than when the problems were made of it; the data has changed since: "
                "bring the old back, or run `problems` anew (--redo problems)."
            )
        yield problem, [(n, r) for n, r in enumerate(found.responses) if isinstance(r, str)]
        if (following := next(problems, None)) is None:
            return
        problem = following
    raise ValueError(
        f"{config.path}: problem {problem.id} is no longer in it; the data has changed since the problems were made of "
        "it: bring the old back, or run `problems` anew (--redo problems)."
    )


def to_trace(problem_id: str, sample: int, response: str, source: str, config: TracesConfig) -> Trace:
    """An imported response as a trace; who wrote it and how it was sampled is not known here."""
    response = thinking.normalize_imported(response, config.think_tags)
    thoughts, answer = split_response(response)
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
        content=answer,
        finish_reason="imported",
    )


# ----------------------------------------------------------------------------------------------------------- shapes


def _messages(data: dict[str, Any], config: ProblemsConfig, tags: tuple[str, str]) -> Exchange:
    return _first_exchange(values.shape_field(data, "messages"), "messages", tags)


def _sharegpt(data: dict[str, Any], config: ProblemsConfig, tags: tuple[str, str]) -> Exchange:
    return _first_exchange(values.shape_field(data, "conversations"), "conversations", tags)


def _r1(data: dict[str, Any], config: ProblemsConfig, tags: tuple[str, str]) -> Exchange:
    generations = values.shape_field(data, "generations")
    if isinstance(generations, str):
        generations = _decoded(generations)
    if isinstance(generations, dict):  # a sequence of objects, as `datasets` writes it
        generations = content.turned(generations)
    if not isinstance(generations, list):
        raise BadRow("field 'generations' is not a list of texts", f": {values.shown(generations)}")
    prompt = values.text(data, config.problem_field)
    return Exchange(prompt, tuple(_generation(generation, tags) for generation in generations))


def _prompt_completion(data: dict[str, Any], config: ProblemsConfig, tags: tuple[str, str]) -> Exchange:
    prompt, completion = values.shape_field(data, "prompt"), values.shape_field(data, "completion")
    if isinstance(prompt, list | dict):  # the conversational form: both are lists of messages
        more = _turns(completion, "completion") if isinstance(completion, list | dict) else [_answer(completion)]
        return _first_exchange([*_turns(prompt, "prompt"), *more], "prompt", tags)
    beside = {name: data[name] for name in THOUGHT_FIELDS if name in data}
    if isinstance(completion, list | dict):
        return _first_exchange([_question(prompt), *_turns(completion, "completion")], "completion", tags)
    text = _generation({"role": "assistant", "content": completion, **beside}, tags)
    if isinstance(text, BadRow):
        raise text
    return Exchange(values.text(data, "prompt"), (text,))


def _generation(value: Any, tags: tuple[str, str]) -> str | BadRow:
    """One response that stands for itself: text, a turn, or the turns of an answer."""
    try:
        if isinstance(value, list):
            return _first_exchange([_question("?"), *value], "generations", tags).responses[0]
        turn = value if isinstance(value, dict) else {"content": value}
        thoughts, text = content.response(turn, tags)
    except BadRow as bad:
        return bad
    return content.whole(thoughts, text) if text.strip() else _empty(thoughts)


def _first_exchange(value: Any, name: str, tags: tuple[str, str]) -> Exchange:
    """The first question of a chat and its answer; what comes behind them is not read, only counted."""
    question, thoughts, left, asked = None, [], [], True
    turns = _turns(value, name)
    for number, turn in enumerate(turns, start=1):
        role = _role(turn)
        if role == "system":
            left += [BadRow(SYSTEM, f": {values.shown(_said(turn))}")] if _said(turn) and not left else []
            continue
        if question is None:
            if role != "user":
                raise BadRow(f"{name!r} begins with a turn by {_speaker(turn)!r}, not with a question")
            question = content.question(turn)
            continue
        asked = asked and role not in ("assistant", "thoughts")
        if role == "assistant" and not str(turn.get("channel") or "").startswith("analysis"):
            thoughts, text = content.response(turn, tags, thoughts)
            only, following = thinking.only(text, tags), turns[number] if number < len(turns) else None
            if only and isinstance(following, dict) and _role(following) == "assistant":  # which is its answer
                thoughts.append(only)
            elif text.strip():
                behind = sum(bool(_said(turn)) for turn in turns[number:])
                left += [BadRow(BEHIND, f": {behind} of {len(turns)}")] if behind else []
                return Exchange(question, (content.whole(thoughts, text),), tuple(left))
        elif role in ("assistant", "thoughts"):  # thoughts that are a turn of their own
            inside, text = content.response(turn, tags)
            thoughts += [part for part in (*inside, text) if part.strip()]
        elif role == "user":
            raise BadRow("two questions, and no response between them")
        else:
            raise BadRow("the response calls a tool", f": a turn by {_speaker(turn)!r} comes before it")
    if question is None:
        raise BadRow(f"{name!r} has no question")
    if asked:
        raise BadRow("no turn of the assistant behind the question")
    raise _empty(thoughts)


def _said(turn: Any) -> Any:
    """What a turn says, unread; None if nothing."""
    if not isinstance(turn, dict):
        return None
    found = next((turn[name] for name in ("content", "value", "text") if turn.get(name)), None)
    return None if isinstance(found, str) and not found.strip() else found


def _system_beside(data: dict[str, Any]) -> list[BadRow]:
    """A system turn that stands in a field beside the chat."""
    found = [data[name] for name in _SYSTEM_FIELDS if isinstance(data.get(name), str) and data[name].strip()]
    return [BadRow(SYSTEM, f": {values.shown(found[0])}")] if found else []


def _empty(thoughts: list[str]) -> BadRow:
    return BadRow("the response is null or empty", "; there are only thoughts, perhaps it was cut off" * bool(thoughts))


def _turns(value: Any, name: str) -> list[Any]:
    """A chat as a list of turns: it may come as JSON in a text, or turned round, as a struct of lists."""
    if isinstance(value, str):
        value = _decoded(value)
    if isinstance(value, dict):
        value = content.turned(value) or value
    if not isinstance(value, list):
        raise BadRow(f"field {name!r} is not a list of turns", f": {values.shown(value)}")
    if list not in map(type, value):
        return value
    # an Arrow map is a list of pairs
    return [dict(t) if isinstance(t, list) and t and all(isinstance(p, tuple) for p in t) else t for t in value]


def _role(turn: Any) -> str:
    """One of the roles of `ROLES`' values.

    Raises:
      BadRow: a hole in the list, no turn, or a speaker whom nobody knows.
    """
    if turn is None:
        raise BadRow("a turn before the response is null")
    if not isinstance(turn, dict):
        raise BadRow("a turn is not an object", f": {values.shown(turn)}")
    if Twice in map(type, turn.values()):
        raise BadRow("a turn gives a key twice, with different values")
    speaker = _speaker(turn)
    role = ROLES.get(speaker.strip().lower()) if isinstance(speaker, str) else None
    if role is None:
        if not any(part is not None for part in turn.values()):
            raise BadRow("a turn before the response is null")
        raise BadRow(f"a turn by {speaker!r}", f"; known are {', '.join(ROLES)}")
    return role


def _speaker(turn: dict[str, Any]) -> Any:
    role = turn.get("role")
    return turn.get("from") if role is None else role


def _decoded(text: str) -> Any:
    """What a text of JSON holds; the text itself if it is none."""
    if not text.lstrip().startswith(("[", "{")):
        return text
    try:
        return json_rows.loads(text)
    except (ValueError, RecursionError):
        return text


def _question(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _answer(text: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


FORMATS: dict[str, Callable[[dict[str, Any], ProblemsConfig, tuple[str, str]], Exchange]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "r1": _r1,
    "prompt_completion": _prompt_completion,
}
"""Each takes one row apart; the names are those of `problems.source`."""
