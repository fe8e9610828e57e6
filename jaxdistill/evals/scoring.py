"""Marks responses: the verifier's own extraction and comparison, in processes that may be killed."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from jaxdistill.config import CodeConfig
from jaxdistill.evals.benchmarks import LETTERS, Item
from jaxdistill.evals.instructions import follows
from jaxdistill.verify import Check, MathPool, check_code, check_math
from jaxdistill.verify.code import Sandbox
from jaxdistill.verify.extract import extract_answer

BOOLEANS = {"yes": "yes", "true": "yes", "no": "no", "false": "no"}


class Marker:
    """Marks responses to items of any scorer; a context manager, which starts a pool or a sandbox when it needs one."""

    def __init__(self, code: CodeConfig, *, workers: int | None = None):
        self._code = code
        self._workers = workers or len(os.sched_getaffinity(0))
        self._stack = contextlib.ExitStack()
        self._math: MathPool | None = None
        self._run: Callable[[str, str], Future[Check]] | None = None

    def __enter__(self) -> Marker:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._math = self._run = None

    def mark(self, pairs: Sequence[tuple[str, Item]]) -> list[Check]:
        """The checks of (response, item) pairs, in their order."""
        found: dict[int, Check] = {}
        programs: dict[int, Future[Check]] = {}
        answers: dict[int, tuple[str, str, str]] = {}
        for i, (response, item) in enumerate(pairs):
            problem = item.problem
            if item.scorer == "code":
                assert problem.tests is not None
                programs[i] = self._sandboxed(response, problem.tests)
            elif item.scorer != "math":
                found[i] = SCORERS[item.scorer](response, item)
            elif problem.answer:
                answers[i] = (response, problem.answer, problem.prompt)
            else:
                found[i] = Check("undecided", None, "no gold answer", "")
        if answers and self._math is None:
            self._math = self._stack.enter_context(MathPool(self._workers))
        if answers:
            assert self._math is not None
            found |= zip(answers, self._math.check(list(answers.values())), strict=True)
        found |= {i: program.result() for i, program in programs.items()}
        return [found[i] for i in range(len(pairs))]

    def _sandboxed(self, response: str, tests: str) -> Future[Check]:
        if self._run is None:
            sandbox = self._stack.enter_context(Sandbox(workers=self._workers, isolation=self._code.isolation))
            pool = self._stack.enter_context(ThreadPoolExecutor(self._workers))
            self._stack.callback(pool.shutdown, cancel_futures=True)
            self._run = functools.partial(pool.submit, check_code, limits=self._code.limits, sandbox=sandbox)
        return self._run(response, tests)


def scorer_of(tests: str | None) -> str:
    """The scorer of a problem that names none: by its tests if it has some, otherwise by its answer."""
    return "code" if tests else "math"


def mark_choice(response: str, item: Item) -> Check:
    """A multiple-choice answer: its letter, or word for word the text of exactly one of the choices."""
    assert item.problem.answer is not None
    check = check_math(response, item.problem.answer, kind="choice")
    if check.outcome != "undecided" or check.reason != "not a choice" or check.extracted is None:
        return check
    said = _words(check.extracted)
    named = [i for i, text in enumerate(item.extra["choices"]) if _words(text) == said]
    if len(named) != 1:
        return check
    right = LETTERS[named[0]] == item.problem.answer
    return Check("correct" if right else "incorrect", check.extracted, "equal" if right else "different", "choice")


def mark_boolean(response: str, item: Item) -> Check:
    """Yes or no; `true` and `false` are taken for them, and anything longer is undecided."""
    found = extract_answer(response)
    if found.answer is None:
        return Check("undecided", None, found.reason, "")
    said = BOOLEANS.get(_words(found.answer))
    if said is None:
        return Check("undecided", found.answer, "neither yes nor no", "boolean")
    right = said == item.problem.answer
    return Check("correct" if right else "incorrect", found.answer, "equal" if right else "different", "boolean")


def mark_instructions(response: str, item: Item) -> Check:
    """Whether every instruction was followed; the reason names those that were not."""
    broken = follows(response, item.extra["instructions"])
    if broken:
        return Check("incorrect", None, f"not followed: {', '.join(broken)}", "instructions")
    return Check("correct", None, "followed", "instructions")


def _words(text: str) -> str:
    return " ".join(text.replace(r"\text", " ").translate(str.maketrans("{}.*`\"'", " " * 7)).lower().split())


SCORERS: dict[str, Callable[[str, Item], Check]] = {
    "choice": mark_choice,
    "boolean": mark_boolean,
    "instructions": mark_instructions,
}
"""Scorers that need no process of their own: their work is linear in the response."""
