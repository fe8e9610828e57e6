"""The tests of a code problem, as they stand in `Problem.tests`: one JSON object with a `kind`.

    {"kind": "asserts", "entry": "f", "tests": ["assert f(1) == 2"], "context": "", "setup": ""}
    {"kind": "calls",   "entry": "f", "cases": [{"args": [1], "expected": 2}], "context": ""}
    {"kind": "stdio",   "cases": [{"input": "1\n", "output": "2\n"}]}

`context` is code of the problem's own (imports and helpers of its prompt), which runs before the program and before the
tests; `setup` runs before the tests alone. A case of `calls` may have `expected_any`, a list, in place of `expected`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class CodeTests:
    """Tests that have been read and found well formed."""

    kind: str
    entry: str = ""
    context: str = ""
    setup: str = ""
    tests: list[str] = field(default_factory=list)
    cases: list[dict[str, Any]] = field(default_factory=list)


def read_tests(text: str) -> CodeTests:
    """Reads `Problem.tests`.

    Raises:
      ValueError: what is wrong with them.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
    if not isinstance(data, dict):
        raise ValueError("not a JSON object")
    kind = data.get("kind")
    if not isinstance(kind, str) or kind not in _REQUIRED:
        raise ValueError(f"kind {kind!r} is none of {', '.join(_REQUIRED)}")
    known = _REQUIRED[kind] | _OPTIONAL[kind] | {"kind"}
    if missing := sorted(_REQUIRED[kind] - data.keys()):
        raise ValueError(f"no {missing[0]}")
    if unknown := sorted(data.keys() - known):
        raise ValueError(f"unknown key {unknown[0]}")
    for name in ("entry", "context", "setup"):
        if not isinstance(data.get(name, ""), str):
            raise ValueError(f"{name} is no text")
    _check_lists(kind, data.get("tests", []), data.get("cases", []))
    return CodeTests(**data)


_REQUIRED = {"asserts": {"tests"}, "calls": {"entry", "cases"}, "stdio": {"cases"}}
_OPTIONAL = {"asserts": {"entry", "context", "setup"}, "calls": {"context"}, "stdio": set()}


def _check_lists(kind: str, tests: Any, cases: Any) -> None:
    if not _all_of(tests, str):
        raise ValueError("tests is no list of texts")
    if not _all_of(cases, dict):
        raise ValueError("cases is no list of objects")
    if not (tests or cases):
        raise ValueError("no tests")
    for i, case in enumerate(cases):
        if kind == "stdio":
            if not _all_of([case.get("input"), case.get("output")], str):
                raise ValueError(f"case {i + 1} has no input or no output")
        elif not isinstance(case.get("args"), list) or not ("expected" in case or _accepted(case)):
            raise ValueError(f"case {i + 1} has no args or nothing expected")
    if kind == "stdio" and not any(case["output"].strip() for case in cases):
        raise ValueError("no output is expected in any case")


def _accepted(case: dict[str, Any]) -> bool:
    return isinstance(case.get("expected_any"), list) and bool(case["expected_any"])


def _all_of(items: Any, kind: type) -> bool:
    return isinstance(items, list) and all(isinstance(item, kind) for item in items)
