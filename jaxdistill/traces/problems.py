"""Where problems come from: the demo task, GSM8K, code sets, any questions; training and held-out sets kept apart."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxdistill.config import ProblemsConfig, RunConfig
from jaxdistill.demo.task import make_problems
from jaxdistill.progress import say
from jaxdistill.records import Problem, RunDir, write_records
from jaxdistill.traces import code_sets, hub_sets, imports, left_out, tables, values
from jaxdistill.traces.left_out import LeftOut
from jaxdistill.traces.tables import DataFile, Row
from jaxdistill.traces.values import BadRow

HELDOUT = "heldout"
"""Folder below the problems' own, so that who reads the training problems never reads these."""
Read = tuple[Problem, list[BadRow], tuple[BadRow, ...]]
"""What a row holds: its problem, what is wrong with those of its responses that cannot be read, and turns of a chat
that are not taken."""


def problems(config: RunConfig, run: RunDir) -> dict[str, Any]:
    """Stage: writes `problems.parquet`, and `heldout/heldout.parquet` if there is something to evaluate on.

    A question that is held out is taken out of the training problems (`in_heldout` counts them). Rows that cannot be
    read are left out, and listed beside the problems (`bad_rows.jsonl`). Problems are written as they are read.
    """
    shutil.rmtree(run.problems / HELDOUT, ignore_errors=True)
    held_out = config.evaluate.problems if config.evaluate else None
    heldout = _Reading(held_out, run.problems / f"{HELDOUT}_{hub_sets.PINNED}") if held_out else None
    questions: set[str] = set()
    counts: dict[str, Any] = {}
    if heldout:
        with left_out.listing(run.problems / HELDOUT / left_out.LISTED, heldout.config) as heldout.left_out:
            kept = heldout.problems()
            noted = (questions.add(problem.prompt) or problem for problem in kept)
            counts["heldout"] = write_records(run.problems / HELDOUT / f"{HELDOUT}.parquet", Problem, noted)
    training = _Reading(config.problems, run.problems / hub_sets.PINNED, questions)
    with left_out.listing(run.problems / left_out.LISTED, config.problems) as training.left_out:
        written = write_records(run.problems / "problems.parquet", Problem, training.problems())
    counts = {"problems": written} | counts
    if heldout:
        counts["in_heldout"] = training.excluded
    counts["without_answer"] = training.without_answer
    for key, reading in {"": training, "heldout_": heldout}.items():
        if reading:
            left = reading.left_out
            more = {"bad_rows": left.counts(), "left_turns": left.turn_counts(), "hub": reading.pinned()}
            counts |= {key + name: value for name, value in more.items() if value}
    held = f", {counts['heldout']:,} held out" if heldout else ""
    dropped = f" ({training.excluded:,} that are held out left out of training)" if training.excluded else ""
    say(f"  {written:,} to learn from ({config.problems.source}){held}{dropped}")
    for reading in filter(None, (training, heldout)):
        reading.left_out.tell()
    training.left_out.tell_turns(asked=config.traces.engine != "import")
    return counts


def load_problems(config: ProblemsConfig, exclude: set[str] | frozenset[str] = frozenset()) -> list[Problem]:
    """The problems of one section, in the order of their source, without those whose question is in `exclude`.

    Raises:
      ValueError: more rows that cannot be read than `bad_rows` and `bad_rows_share` allow, fewer problems than
        `count`, or none at all; a file that is damaged.
    """
    reading = _Reading(config, None, exclude)
    found = list(reading.problems())
    reading.left_out.tell()
    return found


class _Reading:
    """One set while it is read, and what became of its rows."""

    def __init__(self, config: ProblemsConfig, pin: Path | None, exclude: set[str] | frozenset[str] = frozenset()):
        self.config = config
        self.left_out = LeftOut(config)
        self.excluded = 0
        """Problems that were passed over because of `exclude`."""
        self.without_answer = 0
        self._pin, self._exclude = pin, exclude
        self._seen: dict[int, int] = {}
        self._files: list[DataFile] = []

    def pinned(self) -> dict[str, Any]:
        """What of the hub was read; empty for anything else."""
        return hub_sets.pinned(self._pin) if self._pin and hub_sets.is_address(self.config.path or "") else {}

    def problems(self) -> Iterator[Problem]:
        """The problems that are wanted, as they are read.

        Raises:
          ValueError: as `load_problems`, at the latest behind the last one.
        """
        config, found = self.config, 0
        for problem in self._demo() if config.source == "demo" else self._rows():
            if problem.prompt in self._exclude:
                self.excluded += 1
                continue
            problem = replace(problem, answer=None) if config.forget_answers else problem
            found += 1
            self.without_answer += problem.answer is None and problem.tests is None
            yield problem
            if found == config.count:
                break
        self.left_out.check()
        self._check(found)

    def _check(self, found: int) -> None:
        config = self.config
        besides = f" besides {self.excluded} that are held out" if self.excluded else ""
        unread = f"; {self.left_out.summary()}" if self.left_out.reasons else ""
        if not found:
            raise ValueError(
                f"{config.path or config.source}: no problems in it{besides}{unread}; a run needs at least one."
            )
        if config.count is not None and found < config.count:
            raise ValueError(
                f"{config.path}: {found} problems{besides}{unread}, but count is {config.count}; lower or drop it."
            )

    def _demo(self) -> Iterator[Problem]:
        """Problems made on the fly: `count`, and more to replace those that turn out to be held out."""
        config = self.config
        assert config.count is not None
        made = make_problems(config.count + len(self._exclude), config.seed)
        for number, (question, answer, solution) in enumerate(made):
            name = f"demo-{config.seed}:{number}"
            yield Problem(
                id=name, prompt=question, answer=str(answer), domain=config.domain, source=name, solution=solution
            )

    def _rows(self) -> Iterator[Problem]:
        """The problems of all rows that can be read; the others are noted."""
        read = SOURCES[self.config.source]
        for row in rows_of(self.config, self._pin):
            self.left_out.rows += 1
            try:
                if isinstance(row.data, BadRow):
                    raise row.data
                problem, bad_responses, left_turns = read(row, self.config)
                self._check_id(problem.id, row)
            except (BadRow, *values.UNEXPECTED) as error:
                self.left_out.add(row, error if isinstance(error, BadRow) else values.unexpected(error))
                continue
            for bad in bad_responses:
                self.left_out.add_response(row, bad)
            self.left_out.add_turns(row, left_turns)
            yield problem

    def _check_id(self, name: str, row: Row) -> None:
        """Ids that are places cannot repeat; those of a field can."""
        if self.config.id_field is None:
            return
        if not self._files or self._files[-1] is not row.file:
            self._files.append(row.file)
        # two numbers and not two texts: a million ids are long
        place = (len(self._files) - 1) << 40 | row.number
        earlier = self._seen.setdefault(hash(name), place)
        if earlier != place:
            first = row._replace(file=self._files[earlier >> 40], number=earlier & ((1 << 40) - 1))
            raise BadRow("its id is that of an earlier row", f": id {name!r} is that of {first.where} already")


def rows_of(config: ProblemsConfig, pin: Path | None) -> Iterator[Row]:
    """The rows of a section's files, from the start.

    Args:
      pin: file that says which commit of a hub set is read, and is written where it is not there yet.
    """
    assert config.path is not None
    files = hub_sets.files(config, pin) if hub_sets.is_address(config.path) else hub_sets.local_files(config)
    wanted, needed = COLUMNS.get(config.source, _every)(config)
    return tables.rows(files, wanted, needed)


# ---------------------------------------------------------------------------------------------------- sources


def _gsm8k(row: Row, config: ProblemsConfig) -> Read:
    """GSM8K's own files (Cobbe et al. 2021, arXiv:2110.14168): reasoning, then `#### answer`."""
    assert not isinstance(row.data, BadRow)
    reasoning, mark, gold = values.text(row.data, "answer").rpartition("####")
    if not mark or not gold.strip():
        raise BadRow("no answer behind `####`", "; every line of GSM8K has one; other files want source: jsonl")
    reasoning = re.sub(r"<<[^<>]*>>", "", reasoning).strip()  # calculator annotations, such as <<48/2=24>>
    problem = Problem(
        id=f"gsm8k-{row.file.stem}:{row.number}",
        prompt=values.text(row.data, "question"),
        answer=gold.strip(),
        domain=config.domain,
        source=f"gsm8k/{row.file.source}:{row.number}",
        solution=f"<think>\n{reasoning}\n</think>\nThe answer is \\boxed{{{gold.strip()}}}.",
    )
    return problem, [], ()


def _jsonl(row: Row, config: ProblemsConfig) -> Read:
    assert not isinstance(row.data, BadRow)
    values.shape_field(row.data, config.problem_field)
    problem = Problem(
        id=imports.name_of(row, config),
        prompt=values.text(row.data, config.problem_field),
        answer=values.gold(row.data, config.answer_field),
        domain=values.domain(row.data, config.domain_field, config.domain),
        source=f"{row.file.source}:{row.number}",
    )
    return problem, [], ()


SOURCES: dict[str, Callable[[Row, ProblemsConfig], Read]] = {"gsm8k": _gsm8k, "jsonl": _jsonl}
SOURCES |= dict.fromkeys(imports.FORMATS, imports.problem_of) | dict.fromkeys(code_sets.LAYOUTS, code_sets.problem_of)
"""Each reads one row, and raises `BadRow` where it cannot; `demo` has no rows."""


def _jsonl_columns(config: ProblemsConfig) -> tuple[list[str], list[str]]:
    needed = [config.problem_field, config.answer_field, *filter(None, (config.id_field,))]
    return [*needed, *filter(None, (config.domain_field,))], needed


def _every(config: ProblemsConfig) -> tuple[list[str], list[str]]:
    return [], []


COLUMNS = {"jsonl": _jsonl_columns} | dict.fromkeys(imports.FORMATS, imports.columns_of)
"""The fields of a source that are looked at, and those that a table must have; of the others all are read."""
