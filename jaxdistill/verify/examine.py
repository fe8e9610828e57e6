"""Looks at every trace once: its record, its answer, its quality. On several processors, and only at what is new.

What was found is in two stores: `checks` (math and code) and `measures`, each found by a hash of all that it depends
on. So a run that was killed goes on, and more traces cost no more than themselves. What comes out depends on traces and
config alone.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from jaxdistill import progress
from jaxdistill.cluster import joined
from jaxdistill.config import VerifyConfig, fingerprint
from jaxdistill.records import count_records, read_records
from jaxdistill.verify.code import Sandbox, check_code
from jaxdistill.verify.compare import Check
from jaxdistill.verify.consistency import NO_GOLD
from jaxdistill.verify.filters import (
    FINISH_REASONS,
    UNKNOWN_DOMAIN,
    Candidate,
    TraceText,
    describe,
    is_formed,
    measured,
)
from jaxdistill.verify.measuring import code_hash, names_wanted
from jaxdistill.verify.pool import CHUNK, Pool, to_check
from jaxdistill.verify.ray_pool import RayPool
from jaxdistill.verify.selection import needs_signature
from jaxdistill.verify.store import Store, hash_of_code, key_of

NOT_RUN = "not run"
UNKNOWN_PROBLEM = "unknown problem"
BATCH_TRACES, BATCH_CHARACTERS = 512, 16_000_000
"""A batch ends at whichever comes first; of many processors it is longer, so that each has a share."""
RAY_WORKERS = 64
"""What batches are cut for where it is the cluster that says how many workers there are."""
AHEAD = 2
"""Batches that are under way beside the one that is waited for."""


@dataclass(frozen=True, slots=True)
class Gold:
    """What a problem's responses are held against; false if there is nothing."""

    answer: str = ""
    tests: str | None = None
    prompt: str = ""
    domain: str = UNKNOWN_DOMAIN

    def __bool__(self) -> bool:
        return bool(self.answer or self.tests)


Pair = tuple[TraceText, Gold | None]
Slot = Callable[[], Any]
"""Gives a result when it is there."""


def examine(
    folder: Path, gold: dict[str, Gold], config: VerifyConfig, cache: Path
) -> tuple[list[Candidate], int, dict[str, Any]]:
    """Every trace's facts, in the order of the traces, how many checks and measures were there before, and `where`.

    Args:
      folder: of the traces.
      cache: folder of the stores.
    """
    total = count_records(folder)
    candidates: list[Candidate] = []
    with progress.bar("verify", total) as update, contextlib.ExitStack() as stack:
        examiner = Examiner(config, cache, stack)
        pending: deque[Callable[[], list[Candidate]]] = deque()
        for batch in _batches(folder, gold, config.majority is not None, examiner.workers):
            pending.append(examiner.begin(batch))
            if len(pending) > AHEAD:
                candidates += pending.popleft()()
                update(len(candidates), "")
        while pending:
            candidates += pending.popleft()()
            update(len(candidates), "")
        where = examiner.where()
    return candidates, examiner.known, where


def _batches(folder: Path, gold: dict[str, Gold], majority: bool, workers: int) -> Iterator[list[Any]]:
    """Traces with their problems, or what is wrong with their records."""
    seen: set[str] = set()
    batch: list[Any] = []
    characters = 0
    for row, trace in enumerate(read_records(folder, TraceText), start=1):
        reason = _record_fault(trace, seen)
        if trace.id:
            seen.add(trace.id)
        batch.append(_malformed(trace, row, reason) if reason else (trace, gold.get(trace.problem_id or "")))
        characters += len(trace.response or "")
        if len(batch) >= max(BATCH_TRACES, CHUNK * workers) or characters > BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _record_fault(trace: TraceText, seen: set[str]) -> str:
    """What is wrong with a record; empty if nothing is."""
    for name in ("id", "problem_id", "sample", "response", "finish_reason"):
        value = getattr(trace, name)
        if value is None or (value == "" and name != "response"):
            return f"malformed record: no {name}"
    if trace.finish_reason not in FINISH_REASONS:
        return f"malformed record: finish_reason is {trace.finish_reason!r}"[:200]
    return "malformed record: the id is there twice" if trace.id in seen else ""


def _malformed(trace: TraceText, row: int, reason: str) -> Candidate:
    return Candidate(
        trace_id=trace.id or f"row {row}",
        problem_id=trace.problem_id or "",
        sample=trace.sample or 0,
        check=Check("undecided", None, reason, ""),
        finish_reason=trace.finish_reason or "",
        unreadable=reason,
    )


def judge_without(trace: TraceText, gold: Gold | None) -> Check | None:
    """The check of a trace whose answer need not be looked at; a cut or failed response is never searched for one."""
    if trace.finish_reason == "error":
        return Check("undecided", None, "no response", "")
    if trace.finish_reason == "length":
        return Check("undecided", None, "truncated", "")
    if gold is None:
        return Check("undecided", None, UNKNOWN_PROBLEM, "")
    return None if gold else Check("undecided", None, NO_GOLD, "")


class Examiner:
    """Checks and measures on several processors; what that takes is started when it is needed first."""

    def __init__(self, config: VerifyConfig, cache: Path, stack: contextlib.ExitStack):
        """Args: `stack` ends all that was started."""
        self._config, self._stack = config, stack
        self._ray = config.executor == "ray"
        self.workers = config.ray.workers or RAY_WORKERS if self._ray else config.workers or _processors()
        self.known = 0
        """Results that were there before this run."""
        self._checks = stack.enter_context(Store(cache / "checks.jsonl", _checking_code()))
        self._measures = stack.enter_context(Store(cache / "measures.jsonl", code_hash()))
        self._pool: Pool | RayPool | None = None
        self._code: Callable[[str, str], Future[Check]] | None = None
        self._with_signature = needs_signature(config)
        self._measured = names_wanted(config.filters, self._with_signature)
        self._filters = asdict(config.filters)

    def begin(self, batch: Sequence[Pair | Candidate]) -> Callable[[], list[Candidate]]:
        """Starts a batch; what is given waits for it to end."""
        pairs = {i: pair for i, pair in enumerate(batch) if not isinstance(pair, Candidate)}
        checks = self._begin_checks(pairs)
        described = {
            i: describe(trace, _NOTHING, UNKNOWN_DOMAIN if gold is None else gold.domain)
            for i, (trace, gold) in pairs.items()
        }
        # what falls for its form anyway need not be measured
        formed = {i: pair for i, pair in pairs.items() if is_formed(described[i], self._config)}
        measures = self._begin_measures(formed) if self._measured != "[]" else {}

        def end() -> list[Candidate]:
            found = []
            for i, one in enumerate(batch):
                if isinstance(one, Candidate):
                    found.append(one)
                    continue
                candidate = replace(described[i], check=checks[i]())
                found.append(measured(candidate, measures[i]()) if i in measures else candidate)
            self._checks.flush()
            self._measures.flush()
            return found

        return end

    def compare(self, pairs: list[tuple[str, str]]) -> list[Check]:
        """Checks of (answer, other answer) pairs."""
        found = {i: self._checks.get(key_of("compare", *pair)) for i, pair in enumerate(pairs)}
        todo = [i for i, result in found.items() if result is None]
        for i, result in zip(todo, self._ask("compare", [pairs[i] for i in todo]), strict=True):
            found[i] = self._remember(self._checks, key_of("compare", *pairs[i]), result())
        self._checks.flush()
        return [to_check(found[i]) for i in range(len(pairs))]

    def _begin_measures(self, pairs: dict[int, Pair]) -> dict[int, Slot]:
        items = {}
        for i, (trace, gold) in pairs.items():
            prompt = "" if gold is None else gold.prompt
            items[i] = ([trace.response, prompt, self._filters, self._with_signature],
                        key_of(self._measured, self._config.filters.language, trace.response, prompt))  # fmt: skip
        return self._begin("measure", self._measures, items)

    def _begin_checks(self, pairs: dict[int, Pair]) -> dict[int, Slot]:
        slots: dict[int, Slot] = {}
        answers, votes = {}, {}
        for i, (trace, gold) in pairs.items():
            assert trace.response is not None
            if (check := judge_without(trace, gold)) is not None:
                slots[i] = functools.partial(_same, check)
                if check.reason == NO_GOLD and self._config.majority:
                    votes[i] = ([trace.response], key_of("extract", trace.response))
            elif gold is None or (gold.tests and not self._config.answer):
                slots[i] = functools.partial(_same, Check("undecided", None, NOT_RUN, ""))
            elif gold.tests:
                slots[i] = self._begin_code(trace.response, gold.tests)
            else:
                item = [trace.response, gold.answer, gold.prompt]
                answers[i] = (item, key_of("check", *item))
        for i, slot in self._begin("check", self._checks, answers).items():
            slots[i] = functools.partial(_checked, slot)
        for i, slot in self._begin("extract", self._checks, votes).items():
            slots[i] = functools.partial(_extracted, slot)
        return slots

    def _begin(self, task: str, store: Store, items: dict[int, tuple[list[Any], str]]) -> dict[int, Slot]:
        """Slots of a task; what the store has is not asked for."""
        slots: dict[int, Slot] = {}
        for i, (_, key) in items.items():
            if (result := store.get(key)) is not None:
                slots[i] = functools.partial(_same, result)
                self.known += store.is_old(key)
        todo = [i for i in items if i not in slots]
        for i, slot in zip(todo, self._ask(task, [items[i][0] for i in todo]), strict=True):
            slots[i] = functools.partial(self._finish, store, items[i][1], slot)
        return slots

    def _finish(self, store: Store, key: str, slot: Slot) -> Any:
        return self._remember(store, key, slot())

    @staticmethod
    def _remember(store: Store, key: str, result: Any) -> Any:
        if result is not None:  # what ran out of memory may not do so on another machine
            store.put(key, result)
        return result

    def _ask(self, task: str, items: list[Any]) -> list[Slot]:
        if not items:
            return []
        if self._pool is None:
            self._pool = self._ray_pool() if self._ray else self._stack.enter_context(Pool(self.workers))
        futures = self._pool.submit(task, items)
        return [functools.partial(_part, futures[i // CHUNK], i % CHUNK) for i in range(len(items))]

    def _begin_code(self, response: str, tests: str) -> Slot:
        code = self._config.code
        key = key_of("code", response, tests, fingerprint(code))
        if (known := self._checks.get(key)) is not None:
            self.known += self._checks.is_old(key)
            return functools.partial(_same, to_check(known))
        if self._code is None:
            self._code = self._ray_pool().check if self._ray else self._begin_sandbox()
        future = self._code(response, tests)

        def end() -> Check:
            check = future.result()
            if check.outcome != "undecided":  # that may be the machine's fault
                self._checks.put(key, asdict(check))
            return check

        return end

    def _begin_sandbox(self) -> Callable[[str, str], Future[Check]]:
        code = self._config.code
        sandbox = self._stack.enter_context(Sandbox(workers=self.workers, isolation=code.isolation))
        threads = self._stack.enter_context(ThreadPoolExecutor(self.workers))
        self._stack.callback(threads.shutdown, cancel_futures=True)
        return functools.partial(threads.submit, check_code, limits=code.limits, sandbox=sandbox)

    def _ray_pool(self) -> RayPool:
        """The cluster's workers, which do everything."""
        if not isinstance(self._pool, RayPool):
            cluster = self._stack.enter_context(joined(self._config.ray, "verify.ray"))
            self._pool = self._stack.enter_context(RayPool(cluster, self._config.code))
        return self._pool

    def where(self) -> dict[str, Any]:
        """On a Ray cluster: how many workers there were, and by machine how programs were isolated; else nothing."""
        if not isinstance(self._pool, RayPool):
            return {}
        return {"ray": {"workers": self._pool.workers, "isolation": dict(sorted(self._pool.tiers.items()))}}


_NOTHING = Check("undecided", None, "", "")


def _processors() -> int:
    return len(os.sched_getaffinity(0))


def _same(result: Any) -> Any:
    return result


def _part(future: Future[list[Any]], place: int) -> Any:
    return future.result()[place]


def _checked(slot: Slot) -> Check:
    return to_check(slot())


def _extracted(slot: Slot) -> Check:
    found = slot()
    answer, reason = found if found is not None else (None, "out of time or memory")
    return Check("undecided", answer, NO_GOLD if answer is not None else reason, "")


def _checking_code() -> str:
    """Of the code that checks answers and programs."""
    names = "answers compare extract latex notation quantities regions structure tree evaluate pool".split()
    return hash_of_code([*(f"{name}.py" for name in names), "answer.lark", "code"], ["lark", "mpmath"])
