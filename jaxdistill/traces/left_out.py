"""Rows that cannot be read: counted by reason, listed in a file, and how many of them are too many.

Turns of a chat that are not taken are counted too; a row is no worse for them.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from jaxdistill.config import ProblemsConfig
from jaxdistill.progress import say
from jaxdistill.records import atomic_file
from jaxdistill.traces.imports import BEHIND, SYSTEM
from jaxdistill.traces.tables import Row
from jaxdistill.traces.values import BadRow

LISTED = "bad_rows.jsonl"
"""Beside the problems: file, line, reason and first characters of each row that was left out."""
FEWEST = 100
"""The share is of at least so many rows, so that one odd row does not stop a small set."""
HOPELESS = 1000
"""So many unreadable rows in a row, from the first on, and it is not the set that the config describes."""
_MOST_LISTED = 100_000
_MOST_REASONS = 50
_OTHER = "other reasons"
_START = 200


@dataclass
class LeftOut:
    """What was left out of one set while it was read."""

    config: ProblemsConfig
    listing: TextIO | None = None
    rows: int = 0
    """Rows that were looked at."""
    reasons: Counter[str] = field(default_factory=Counter)
    responses: Counter[str] = field(default_factory=Counter)
    """Of rows that were kept: responses that cannot be read, by reason."""
    first: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Reason -> where the first row stands that fell to it, and what is special about that one."""
    turns: Counter[str] = field(default_factory=Counter)
    """Of rows that were kept: those whose chat has turns that are not taken, by kind."""
    first_turns: dict[str, tuple[str, str]] = field(default_factory=dict)
    _listed: int = 0

    def add(self, row: Row, bad: BadRow) -> None:
        """Notes a row that is left out.

        Raises:
          ValueError: it must not be (`bad_rows: stop`), or nothing can be read at all.
        """
        if self.config.bad_rows == "stop":
            raise bad.at(row.where)
        self._count(self.reasons, row, bad)
        self._list(row, bad, "row")
        if self.reasons.total() == self.rows == HOPELESS and self.config.bad_rows_share < 1:
            raise self._too_many()

    def add_response(self, row: Row, bad: BadRow) -> None:
        """Notes a response that is left out of a row that has others; that is no reason to stop."""
        self._count(self.responses, row, bad)
        self._list(row, bad, "response")

    def add_turns(self, row: Row, left: Iterable[BadRow]) -> None:
        """Notes the turns of a row's chat that are not taken."""
        for each in left:
            self.turns[each.reason] += 1
            self.first_turns.setdefault(each.reason, (row.where, each.detail))

    def check(self) -> None:
        """To be called at the end.

        Raises:
          ValueError: too many rows were left out; the table of reasons is printed before.
        """
        if self.reasons.total() > self.config.bad_rows_share * max(self.rows, FEWEST):
            raise self._too_many()

    def tell(self) -> None:
        """Prints the reasons and the first row of each, if there are any."""
        total = self.reasons.total()
        if total:
            say(f"  {total:,} of {self.rows:,} rows cannot be read and are left out:")
        for counted, what in ((self.reasons, ""), (self.responses, "a response left out: ")):
            for reason, count in counted.most_common(10):
                say(f"    {count:>9,}  {what}{reason}; first {_first(*self.first[reason])}")

    def tell_turns(self, *, asked: bool) -> None:
        """Prints which turns of chats were not taken; `asked`: the responses are a teacher's, not the rows' own."""
        for kind, count in self.turns.most_common():
            if asked and kind == BEHIND:
                continue
            where = "traces.system to ask and data.system" if asked else "data.system"
            advice = f"; set {where} to train with one" if kind == SYSTEM else ""
            say(f"  {count:,} rows: {kind}{advice}; first {''.join(self.first_turns[kind])[-_START:]}")

    def turn_counts(self) -> dict[str, Any]:
        """For the manifest: rows by the kind of turn that was not taken."""
        return _table(self.turns, self.first_turns)

    def counts(self) -> dict[str, Any]:
        """For the manifest; empty if nothing was left out."""
        if not self.reasons and not self.responses:
            return {}
        return {
            "rows": self.rows,
            "left_out": self.reasons.total(),
            "reasons": _table(self.reasons, self.first),
            "responses": _table(self.responses, self.first),
        }

    def summary(self) -> str:
        """How many, and the commonest reason, for a message; there must be one."""
        return f"{self.reasons.total():,} of {self.rows:,} rows cannot be read; {self._commonest()}"

    def _too_many(self) -> ValueError:
        self.tell()
        return ValueError(
            f"{self.config.path}: {self.summary()}. More than bad_rows_share={self.config.bad_rows_share:g} allows: "
            "name the right source and fields, mend the rows, or raise problems.bad_rows_share."
        )

    def _commonest(self) -> str:
        reason, count = self.reasons.most_common(1)[0]
        where, detail = self.first[reason]
        return f"most often ({count:,}): {where}: {reason}{detail}"

    def _count(self, counted: Counter[str], row: Row, bad: BadRow) -> None:
        known = bad.reason in self.first or len(self.first) < _MOST_REASONS
        reason = bad.reason if known else _OTHER
        counted[reason] += 1
        self.first.setdefault(reason, (row.where, bad.detail))

    def _list(self, row: Row, bad: BadRow, what: str) -> None:
        if self.listing is None or self._listed == _MOST_LISTED:
            return
        self._listed += 1
        start = bad.start if bad.start is not None else _start(row.data)
        line = {"file": row.file.name, "line": row.number, "left_out": what, "reason": str(bad), "start": start}
        self.listing.write(json.dumps(line) + "\n")  # ASCII: half a character can be written, too


@contextlib.contextmanager
def listing(path: Path, config: ProblemsConfig) -> Iterator[LeftOut]:
    """A `LeftOut` that also writes each row to a file, which is there afterwards if there was any, even on failure."""
    path.unlink(missing_ok=True)
    failure = None
    with atomic_file(path) as temporary, open(temporary, "w") as file:
        found = LeftOut(config, file)
        try:
            yield found
        except ValueError as error:  # what was found until then is what explains it
            failure = error
    if not found.reasons and not found.responses:
        path.unlink()
    if failure is not None:
        raise failure


def _table(counted: Counter[str], first: dict[str, tuple[str, str]]) -> dict[str, dict[str, Any]]:
    return {
        reason: {"count": count, "first": first[reason][0], "detail": first[reason][1].lstrip(":; ")[:_START]}
        for reason, count in counted.most_common()
    }


def _first(where: str, detail: str) -> str:
    """The place, its end if it is long, and what begins the detail."""
    return where[-_START:] + (detail if len(detail) <= _START else f"{detail[:_START]}...")


def _start(data: Any) -> str:
    return json.dumps(data, default=str)[:_START]
