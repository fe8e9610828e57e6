"""A first sample of the problems' rows: are they of the source's shape, are there gold answers, and do imported
responses show their thinking?
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from jaxdistill.config import ProblemsConfig, RunConfig, TracesConfig
from jaxdistill.preflight.finding import Finding
from jaxdistill.traces import hub_sets, imports, tables, tags, values
from jaxdistill.traces.values import BadRow

SAMPLE = 200
"""Rows that are looked at."""
FEWEST = 5
"""Responses from which on it is no accident that none has tags."""
WITH_ANSWER = ("jsonl", "messages", "sharegpt", "r1", "prompt_completion")
"""Sources whose gold answers lie under `answer_field`."""
WITH_RESPONSES = ("messages", "sharegpt", "r1", "prompt_completion")
GOLD_NAMES = ("answer", "final_answer", "gold", "gold_answer", "ground_truth", "expected_answer", "correct_answer",
              "target", "label", "reference", "reference_answer", "solution", "output")  # fmt: skip
"""What gold answers are called, the likeliest first."""


def check(config: RunConfig) -> Iterator[Finding]:
    """Everything of the first rows of `problems` and of the held-out problems."""
    sets = {"problems": config.problems}
    if config.evaluate is not None and config.evaluate.problems is not None:
        sets["evaluate.problems"] = config.evaluate.problems
    for what, section in sets.items():
        found = first_rows(section)
        if isinstance(found, Finding):
            yield Finding(what, found.level, found.text)
        else:
            yield from _check(*found, section, what, config)


def _check(
    rows: list[dict[str, Any]], whole: bool, section: ProblemsConfig, what: str, config: RunConfig
) -> Iterator[Finding]:
    if not rows:
        return
    if shape := list(check_shape(rows, section, what)):
        yield from shape  # what is said of other fields would lead the wrong way
        return
    wanted = what != "problems" or (config.verify.answer and config.verify.majority is None)
    if wanted and not section.forget_answers:
        yield from check_gold(rows, section, what, whole=whole)
    if what == "problems" and config.traces.engine == "import" and section.source in WITH_RESPONSES:
        yield from check_thinking(rows, section, config.traces, required=config.verify.think == "required")


def first_rows(section: ProblemsConfig) -> tuple[list[dict[str, Any]], bool] | Finding:
    """The first rows of a set that is on this machine, without those that cannot be read, and whether they are all.

    Returns:
      no rows of a set without gold answers of its own; a finding where there is something to say instead.
    """
    if section.source not in WITH_ANSWER or section.path is None:
        return [], False
    if hub_sets.is_address(section.path):
        try:
            address = hub_sets.parse(section)
        except ValueError as error:
            return Finding("problems", "error", str(error))
        return Finding("problems", "unchecked", f"{address.repo} is read from the hub when the run begins.")
    try:
        rows = list(itertools.islice(tables.rows(hub_sets.local_files(section)), SAMPLE + 1))
    except ValueError as error:  # whether that stops the run is for the stage to say
        return Finding("problems", "unchecked", str(error))
    if not rows:
        return Finding("problems", "error", f"{section.path}: there is not one row in it.")
    bad = [row.data.at(row.where) for row in rows if isinstance(row.data, BadRow)]
    if bad and (section.bad_rows == "stop" or len(bad) == len(rows)):
        return Finding("problems", "unchecked", str(bad[0]))
    whole, rows = len(rows) <= SAMPLE, rows[:SAMPLE]
    # one that is left out hides nothing of the others
    return [row.data for row in rows if not isinstance(row.data, BadRow)], whole


def check_shape(rows: Sequence[dict[str, Any]], section: ProblemsConfig, what: str) -> Iterator[Finding]:
    """What makes rows those of their source and stands in none of them; nothing if all is there."""
    of_source = {"jsonl": (section.problem_field,), "r1": ("generations", section.problem_field)}
    own = of_source.get(section.source) or values.SHAPES[section.source]
    missing = next((name for name in own if not any(name in row for row in rows)), None)
    if missing is None:
        return
    fields = _fields(rows)
    advice = values.other_source(fields).replace("; set source", f"; set {what}.source")
    if missing == section.problem_field and (section.source == "r1" or not advice):
        advice = f"; name the question with {what}.problem_field"
    text = f"none of the first {len(rows):,} rows has a field {missing!r}; they have {', '.join(fields[:12]) or 'none'}"
    yield Finding(f"{what}.source", "error", f"{text}{advice or '; name the right source'}.")


def _fields(rows: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(str(name) for row in rows for name in row))


def check_gold(
    rows: Sequence[dict[str, Any]], section: ProblemsConfig, what: str, *, whole: bool = False
) -> Iterator[Finding]:
    """Whether rows have gold answers under the name that is given.

    Args:
      whole: there are no other rows.
    """
    key = f"{what}.answer_field"
    field = section.answer_field
    with_one = sum(_has_gold(row, field) for row in rows)
    if with_one == len(rows):
        yield Finding(key, "ok", f"{field}: all of the first {len(rows):,} rows have a gold answer")
        return
    if with_one:
        text = f"{len(rows) - with_one:,} of the first {len(rows):,} rows have no {field!r}; nothing of them is kept."
        yield Finding(key, "warning", text)
        return
    fields = _fields(rows)
    likely = [name for name in GOLD_NAMES if name in fields and name != field and _is_answer(rows, name)]
    advice = f"set {key}: {likely[0]}" if likely else f"name the gold answers with {key}"
    otherwise = "" if what != "problems" else ", or set verify.answer: false"
    text = (
        f"none of the first {len(rows):,} rows has a gold answer under {field!r}; they have "
        f"{', '.join(fields[:12])}; {advice}{otherwise}."
    )
    # a field that is there and empty may be filled further down; one that most rows lack is another row's
    open_yet = not whole and 2 * sum(field in row for row in rows) > len(rows)
    yield Finding(key, "warning" if open_yet else "error", text)


def _has_gold(row: dict[str, Any], field: str) -> bool:
    """Whether the stage finds a gold answer; NaN and blanks are none."""
    try:
        return field in row and values.gold(row, field) is not None
    except (BadRow, *values.UNEXPECTED):  # left out
        return False


def _is_answer(rows: Sequence[dict[str, Any]], name: str) -> bool:
    found = [row.get(name) for row in rows]
    return all(isinstance(value, str | int | float) for value in found if value is not None) and any(found)


def check_thinking(
    rows: Sequence[dict[str, Any]], section: ProblemsConfig, traces: TracesConfig, *, required: bool
) -> Iterator[Finding]:
    """Whether imported responses have thinking that the import finds."""
    if not required or len(rows) < FEWEST:
        return
    key, think_tags = "traces.think_tags", traces.think_tags
    shown = sum(_thinks(row, section, traces) for row in rows)
    if shown:
        yield Finding(key, "ok", f"{shown:,} of the first {len(rows):,} rows show their thinking")
        return
    found = tags.count_pairs((" ".join(_texts(row)) for row in rows), guess=False)
    (pair, times), *_ = found.most_common(1)
    if pair is not None:
        yield Finding(
            key,
            "error",
            f"{times:,} of the first {len(rows):,} rows think between {pair[0]} and {pair[1]}, none between "
            f"{think_tags[0]} and {think_tags[1]}, so that verify would keep nothing; set {key}: ['{pair[0]}', "
            f"'{pair[1]}'].",
        )
        return
    yield Finding(
        key,
        "warning",
        f"none of the first {len(rows):,} rows shows any thinking, and verify.think: required keeps none without; set "
        "verify.think: optional to learn from answers alone.",
    )


def _thinks(row: dict[str, Any], section: ProblemsConfig, traces: TracesConfig) -> bool:
    """Whether the import finds thinking in a row."""
    try:
        found = imports.exchange_of(row, section, traces.think_tags).responses
    except BadRow:  # left out
        return False
    texts = (response for response in found if isinstance(response, str))
    return any(imports.to_trace("row", 0, text, "", traces).thinking for text in texts)


def _texts(value: Any) -> Iterator[str]:
    """All texts in a row."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _texts(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _texts(each)
