"""Runs a problem's tests in a sandbox of their own; what they call is computed in the candidate's process.

The tests see values that were copied over (`wire`), so nothing that a candidate overrides (`__eq__`, builtins, modules,
frames) exists here, and the candidate's process never holds the tests or the expected values.
"""

from __future__ import annotations

import ast
import builtins
import json
import math
import os
import types
from collections.abc import Callable
from typing import Any

from jaxdistill.verify.code import wire
from jaxdistill.verify.code.candidate import LINK, REPORT

MAX_LINE = 32 << 20
"""Bytes of one returned value."""
TOLERANCE = 1e-6
"""Relative, for floats in the expected values of function calls."""


class CandidateError(Exception):
    """What the candidate raised, where it is no exception of Python's own, or one that would end a loop here."""


class NotPlain(Exception):
    """An object of the candidate's was used as if it were a plain value."""


class Link:
    """The candidate's process, as seen by the tests."""

    def __init__(self) -> None:
        self.calls = 0
        self.ended = ""
        """Why no more can be asked; the tests have failed then, whatever they catch."""
        self._replies = os.fdopen(LINK, "rb")

    def ask(self, target: str | int, attribute: str, args: Any, kwargs: Any) -> Any:
        """Calls a function or method over there.

        Raises:
          Exception: what the candidate raised, by name. CandidateError: it is gone, or talks nonsense.
        """
        if self.ended:
            raise CandidateError(self.ended)
        self.calls += 1
        request = wire.dumps((target, attribute, args, kwargs), _number_of)
        try:
            while request:
                request = request[os.write(LINK, request) :]
            line = self._replies.readline(MAX_LINE)
        except OSError:
            line = b""
        if not line.endswith(b"\n"):
            self.ended = "too much returned" if line else "the program ended"
            raise CandidateError(self.ended)
        try:
            if line[:1] == b"=":
                return wire.loads(line[1:], lambda number: Remote(self, int(number)))
            raised = json.loads(line[1:])
        except (ValueError, RecursionError, MemoryError):
            self.ended = "a value that is not plain"
            raise CandidateError(self.ended) from None
        raise _exception(raised)


class Remote:
    """A function, class or object that lives in the candidate's process: to be called, never compared."""

    __hash__ = None  # type: ignore[assignment]
    _link: Link
    _target: str | int
    _attribute: str

    def __init__(self, link: Link, target: str | int, attribute: str = "") -> None:
        self.__dict__.update(_link=link, _target=target, _attribute=attribute)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._link.ask(self._target, self._attribute, args, kwargs)

    def __getattr__(self, name: str) -> Remote:
        if self._attribute or name.startswith("_"):
            raise AttributeError(name)
        return Remote(self._link, self._target, name)

    def _refuse(self, *_: Any) -> Any:
        raise NotPlain("an object of the program's cannot be compared")

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __bool__ = __len__ = __iter__ = __contains__ = _refuse


def _number_of(value: Any) -> int:
    if isinstance(value, Remote) and isinstance(value._target, int) and not value._attribute:
        return value._target
    raise NotPlain(f"{type(value).__name__} cannot be given to the program")


def _exception(name: Any) -> Exception:
    found = getattr(builtins, name, None) if isinstance(name, str) else None
    # a StopIteration would end a loop over `map(candidate, ...)` as if it were through
    if isinstance(found, type) and issubclass(found, Exception) and not name.startswith("Stop"):
        try:
            return found(f"raised by the program: {name}")
        except TypeError:
            pass  # UnicodeDecodeError and the like want more arguments
    return CandidateError(str(name)[:200])


def run_asserts(context: str, setup: str, tests: list[str], entry: str) -> dict[str, str]:
    """Runs setup and tests with `entry`, and every name that nobody here defines, bound to the candidate's.

    Returns:
      `{"passed": ""}`, `{"failed": reason}`, or `{"malformed": reason}` where the tests are to blame.
    """
    module = types.ModuleType("tests")
    names = module.__dict__
    link = Link()
    try:
        codes = [compile(test, f"test {i}", "exec") for i, test in enumerate(tests)]
        exec(compile(context, "context.py", "exec"), names)
        exec(compile(setup, "setup.py", "exec"), names)
        for name in _free_names([setup, *tests]) - names.keys() | ({entry} if entry else set()):
            names[name] = Remote(link, name)
    except BaseException as error:
        return {"malformed": f"{type(error).__name__} before any test"}

    def run() -> dict[str, str]:
        for i, code in enumerate(codes):
            try:
                exec(code, names)
            except AssertionError:
                return {"failed": f"assertion of test {i + 1} failed"}
        return {"passed": ""}

    return _judge(run, link)


def run_calls(entry: str, cases: list[dict[str, Any]]) -> dict[str, str]:
    """Calls `entry` with every case's `args`, and compares with `expected`, or any of `expected_any`."""
    link = Link()

    def run() -> dict[str, str]:
        for i, case in enumerate(cases):
            value = Remote(link, entry)(*case["args"])
            accepted = case["expected_any"] if "expected_any" in case else [case["expected"]]
            if not any(same(value, expected) for expected in accepted):
                return {"failed": f"another value than expected in case {i + 1}"}
        return {"passed": ""}

    return _judge(run, link)


def _judge(run: Callable[[], dict[str, str]], link: Link) -> dict[str, str]:
    try:
        found = run()
    except BaseException as error:
        if not link.calls:
            return {"malformed": f"{type(error).__name__} before any call of the program"}
        found = {"failed": f"{type(error).__name__} in the tests"}
    if "passed" not in found:
        return {"failed": link.ended} if link.ended else found
    if link.ended:  # whatever the tests made of it
        return {"failed": link.ended}
    return found if link.calls else {"malformed": "nothing of the program is called"}


def same(value: Any, expected: Any) -> bool:
    """Whether a returned value is the expected one, which came from JSON.

    A tuple counts as a list, and dictionary keys are compared as text (JSON has neither tuples nor other keys). A bool
    equals only a bool, and a float a number that differs by no more than `TOLERANCE`, relatively.
    """
    if isinstance(expected, bool) or isinstance(value, bool) or expected is None or isinstance(expected, str):
        return type(value) is type(expected) and value == expected
    if isinstance(expected, int):
        return isinstance(value, int | float) and value == expected
    if isinstance(expected, float):
        if not isinstance(value, int | float) or (isinstance(value, int) and abs(value) > 1 << 1000):
            return False
        return math.isclose(value, expected, rel_tol=TOLERANCE) or (math.isnan(value) and math.isnan(expected))
    if isinstance(expected, list):
        return isinstance(value, list | tuple) and len(value) == len(expected) and all(map(same, value, expected))
    if not isinstance(value, dict) or len(value) != len(expected):
        return False
    by_text = {str(key): item for key, item in value.items()}
    return by_text.keys() == expected.keys() and all(same(by_text[k], v) for k, v in expected.items())


def _free_names(sources: list[str]) -> set[str]:
    """Names that are read somewhere, and defined nowhere in the sources and not by Python."""
    read, bound = set(), set(dir(builtins))
    for node in (node for source in sources for node in ast.walk(ast.parse(source))):
        if isinstance(node, ast.Name):
            (read if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.ExceptHandler) and node.name:
            bound.add(node.name)
    return read - bound


def report(found: dict[str, str]) -> None:
    """Tells the verdict on a descriptor that this process alone holds."""
    os.write(REPORT, json.dumps(found).encode() + b"\n")
