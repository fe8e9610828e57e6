"""Benchmarks: small files in `sets/` that say where a set lies, how rows are read, what is asked, how it is scored.

A benchmark is read from a local file or folder, or from the hub. Every row becomes an `Item`: the question as a model
is asked it, and what its response is held against. A row without a gold answer is an error, never a wrong answer.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pydantic
import yaml

from jaxdistill import hub
from jaxdistill.config import BenchmarkConfig
from jaxdistill.records import Problem
from jaxdistill.traces import code_sets, tables, values

SETS = Path(__file__).parent / "sets"
LETTERS = "ABCDEFGHIJ"


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=pydantic.ConfigDict(extra="forbid"))
class Benchmark:
    """One file of `sets/`."""

    title: str
    layout: str
    """How a row is read, a key of `LAYOUTS`."""
    scorer: Literal["math", "choice", "boolean", "code", "instructions"]
    """How a response is marked, see `scoring`."""
    fields: dict[str, str] = dataclasses.field(default_factory=dict)
    """The row's names for `problem`, `answer`, `choices` and `domain`."""
    prompt: str = "{problem}"
    """What is asked. Questions of scorer `math` are followed by the model's own suffix, as it is used to."""
    source: str = ""
    """Of layout `code`: a key of `code_sets.LAYOUTS`."""
    repo: str | None = None
    """Where the hub has it."""
    files: tuple[str, ...] = ()
    """Which files of that repository, as patterns."""
    domain: str = "math"
    """Of rows that have none of their own."""


@dataclasses.dataclass(frozen=True)
class Item:
    """One question of a benchmark."""

    problem: Problem
    scorer: str
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What the scorer needs beside the gold answer: `choices`, or `instructions`."""


def known() -> list[str]:
    """The names of the benchmarks in `sets/`."""
    return sorted(file.stem for file in SETS.glob("*.yaml"))


def describe(config: BenchmarkConfig) -> Benchmark:
    """The file of the benchmark that a config names, with what the config says instead.

    Raises:
      ValueError: no such benchmark.
    """
    kind = config.kind or config.name
    if kind not in known():
        raise ValueError(
            f"evaluate.benchmarks: {kind} is not known; known are {', '.join(known())}; a file of your own wants "
            "`kind: jsonl` and `path`."
        )
    found = Benchmark(**yaml.safe_load((SETS / f"{kind}.yaml").read_text()))
    changed: dict[str, Any] = {"prompt": config.prompt} if config.prompt is not None else {}
    if config.fields:
        changed["fields"] = found.fields | config.fields
    if kind == "jsonl":
        changed["title"] = config.name
    return dataclasses.replace(found, **changed)


def load(config: BenchmarkConfig) -> list[Item]:
    """All items of a benchmark, or `count` of them, picked by a hash of their ids.

    Raises:
      ValueError: nothing there, a row that is not of the benchmark's form or has no gold answer (file and row are
        named), or fewer items than `count`.
    """
    benchmark = describe(config)
    read = LAYOUTS[benchmark.layout]
    items = []
    for file in locate(config, benchmark):
        for path, number, row in tables.read_rows(file):
            where = f"{path}:{number}"
            try:
                item = read(row, where, benchmark, config.name)
            except values.BadRow as error:  # a benchmark with a hole is another benchmark
                raise error.at(where) from None
            if item is not None:
                items.append(item)
    where = config.path or benchmark.repo
    if not items:
        raise ValueError(f"{where}: no problems of {benchmark.title} in it; see evaluate.benchmarks.")
    if config.count is not None and config.count > len(items):
        raise ValueError(f"{where}: {len(items)} problems, but count is {config.count}; lower or drop it.")
    if config.count is not None:
        chosen = sorted(items, key=lambda item: hashlib.blake2b(item.problem.id.encode()).digest())[: config.count]
        wanted = {item.problem.id for item in chosen}
        items = [item for item in items if item.problem.id in wanted]
    return items


def locate(config: BenchmarkConfig, benchmark: Benchmark) -> list[Path]:
    """The local files of a benchmark, downloaded first where the config names no path."""
    if config.path is not None:
        return [Path(config.path).expanduser()]
    if benchmark.repo is None:
        raise ValueError(f"evaluate.benchmarks: {config.name} is on no hub; name your file in `path`.")
    folder = hub.fetch_data(benchmark.repo, list(benchmark.files), config.revision)
    found = sorted({file for pattern in benchmark.files for file in folder.glob(pattern)})
    if not found:
        raise ValueError(
            f"{benchmark.repo}: no {' or '.join(benchmark.files)} in it; download it and name the file in `path`."
        )
    return found


# -------------------------------------------------------------------------------------------------- layouts


def _item(row: dict[str, Any], where: str, benchmark: Benchmark, name: str, answer: str | None, **extra: Any) -> Item:
    """An item from a row's question; `extra` fills the prompt too."""
    question = values.text(row, benchmark.fields["problem"])
    shown = {"choices": _lettered(extra["choices"])} if "choices" in extra else {}
    file, _, number = where.rpartition(":")
    domain = row.get(benchmark.fields.get("domain", ""))
    problem = Problem(
        id=f"{name}/{Path(file).name.partition('.')[0]}:{number}",
        prompt=benchmark.prompt.format(problem=question, **shown),
        answer=answer,
        domain=domain if isinstance(domain, str) and domain else benchmark.domain,
        source=f"{Path(file).name}:{number}",
    )
    return Item(problem, benchmark.scorer, extra)


def _plain(row: dict[str, Any], where: str, benchmark: Benchmark, name: str) -> Item:
    return _item(row, where, benchmark, name, _gold(row, benchmark.fields["answer"], where))


def _hashes(row: dict[str, Any], where: str, benchmark: Benchmark, name: str) -> Item:
    """The answer stands behind the last `####` of a worked solution."""
    gold = values.text(row, benchmark.fields["answer"]).rpartition("####")
    if not gold[1] or not gold[2].strip():
        raise ValueError(f"{where}: no gold answer behind `####`; it is no row of {benchmark.title}.")
    return _item(row, where, benchmark, name, gold[2].strip())


def _choices(row: dict[str, Any], where: str, benchmark: Benchmark, name: str) -> Item:
    """Choices as a list, or as `{text: [...], label: [...]}`; the answer is a label, or a number from 0."""
    given = values.field(row, benchmark.fields["choices"])
    labels = [str(label) for label in given.get("label", [])] if isinstance(given, dict) else []
    texts = given.get("text", []) if isinstance(given, dict) else given
    fits = isinstance(texts, list) and 2 <= len(texts) <= len(LETTERS) and all(isinstance(t, str) for t in texts)
    if not fits or (isinstance(given, dict) and len(labels) != len(texts)):
        raise ValueError(f"{where}: field {benchmark.fields['choices']!r} is no list of two to ten choices.")
    gold = _gold(row, benchmark.fields["answer"], where)
    if gold in labels:  # some rows of ARC number their choices from 1
        place = labels.index(gold)
    elif not labels and gold in LETTERS[: len(texts)]:
        place = LETTERS.index(gold)
    elif not labels and gold.isdecimal() and int(gold) < len(texts):
        place = int(gold)
    else:
        raise ValueError(f"{where}: the gold answer {gold!r} is none of the {len(texts)} choices.")
    return _item(row, where, benchmark, name, LETTERS[place], choices=texts)


def _instructions(row: dict[str, Any], where: str, benchmark: Benchmark, name: str) -> Item | None:
    """IFEval's instructions with their arguments; None if one of them is not known here."""
    from jaxdistill.evals.instructions import CHECKS

    names = values.field(row, benchmark.fields["answer"])
    arguments = values.field(row, "kwargs")
    if not isinstance(names, list) or not isinstance(arguments, list) or not names or len(names) != len(arguments):
        raise ValueError(f"{where}: no gold: `{benchmark.fields['answer']}` and `kwargs` are no lists of one length.")
    if not set(names) <= CHECKS.keys():
        return None
    filled = [{k: v for k, v in (given or {}).items() if v is not None} for given in arguments]
    return _item(row, where, benchmark, name, None, instructions=list(zip(names, filled, strict=True)))


def _code(row: dict[str, Any], where: str, benchmark: Benchmark, name: str) -> Item:
    """A code problem with its tests, as `code_sets` reads it."""
    try:
        prompt, tests, _ = code_sets.LAYOUTS[benchmark.source](row)
    except (KeyError, TypeError, ValueError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{where}: {what}; it is no row of {benchmark.title}.") from None
    file, _, number = where.rpartition(":")
    problem = Problem(
        id=f"{name}/{Path(file).name.partition('.')[0]}:{number}",
        prompt=benchmark.prompt.format(problem=prompt),
        answer=None,
        domain=benchmark.domain,
        source=f"{Path(file).name}:{number}",
        tests=json.dumps(tests),
    )
    return Item(problem, benchmark.scorer)


Layout = Callable[[dict[str, Any], str, Benchmark, str], Item | None]
LAYOUTS: dict[str, Layout] = {
    "plain": _plain,
    "hashes": _hashes,
    "choices": _choices,
    "instructions": _instructions,
    "code": _code,
}
"""A row becomes an item, or None where it is left out; given where it stands, its benchmark, and the config's name."""


def _gold(row: dict[str, Any], field: str, where: str) -> str:
    """The gold answer as text.

    Raises:
      ValueError: there is none.
    """
    if field not in row:
        raise ValueError(
            f"{where}: no gold answer: no field {field!r}, this row has {', '.join(sorted(row)) or 'none'}; "
            "name it with `fields: {answer: ...}`."
        )
    value = row[field]
    if isinstance(value, list):  # several values that are one answer together
        value = ", ".join(str(part) for part in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and value.is_integer():  # Parquet has 142.0 where 142 is meant
        value = int(value)
    if value is None or not str(value).strip():
        raise ValueError(f"{where}: no gold answer in the field {field!r}; fill it, or take the row out.")
    return str(value).strip()


def _lettered(texts: list[str]) -> str:
    return "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, texts, strict=False))


def overlap(items: list[Item], training: Iterator[str]) -> int:
    """How many questions stand among the training problems, compared without case and spaces."""
    seen = {_plain_text(text) for text in training}
    return sum(_plain_text(item.problem.prompt) in seen for item in items)


@functools.lru_cache(maxsize=1 << 16)
def _plain_text(text: str) -> str:
    return " ".join(text.lower().split())
