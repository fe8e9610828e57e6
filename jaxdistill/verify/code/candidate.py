"""Runs the program of a response inside its sandbox, as a script or to be called by the tests' process.

Everything in this process may be changed by the program that it runs, so nothing that it says is believed: a report is
a hint for the reason of a verdict, and a returned value is compared elsewhere.
"""

from __future__ import annotations

import atexit
import builtins
import json
import os
import sys
import threading
import types
from typing import Any

from jaxdistill.verify.code import wire

REPORT, LINK = 3, 4
"""Descriptors: of what is reported at the end, and of the tests' process."""


def run_script(source: str) -> int:
    """Runs a program as `__main__`, its threads and exit functions too; returns its exit status."""
    module = _new_module("__main__")
    status = 0
    try:
        exec(compile(source, "program.py", "exec"), module.__dict__)
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as error:
        _report(raised=_describe(error))
        status = 1
    try:
        atexit._run_exitfuncs()
        sys.stdout.flush()
    except BaseException as error:
        _report(raised=_describe(error))
        status = status or 1
    return status & 0xFF


def serve(source: str, context: str, entry: str) -> int:
    """Loads a program, and answers calls on `LINK` until it is closed.

    Args:
      context: code that is run before it, such as the prompt's imports and helpers.
      entry: the function that the program has to define; `Solution().entry` does too.
    """
    module = _new_module("program")
    names = module.__dict__
    try:
        exec(compile(context, "context.py", "exec"), names)
        names.pop(entry, None)
        exec(compile(source, "program.py", "exec"), names)
        if entry and entry not in names and entry in dir(names.get("Solution")):
            names[entry] = getattr(names["Solution"](), entry)
        if entry and entry not in names:
            _report(missing=entry)
            return 0
    except BaseException as error:
        _report(raised=_describe(error))
        return 0
    objects: list[Any] = []

    def remember(value: Any) -> int:
        objects.append(value)
        return len(objects) - 1

    with os.fdopen(LINK, "rb") as requests:
        for line in requests:
            try:
                where, attribute, args, kwargs = wire.loads(line, objects.__getitem__)
                target = names[where] if isinstance(where, str) else objects[where]
                if attribute:
                    target = getattr(target, attribute)
                reply = b"=" + wire.dumps(target(*args, **kwargs), remember)
            except BaseException as error:
                _report(raised=_describe(error))
                reply = b"!" + json.dumps(type(error).__name__).encode() + b"\n"
            _send(LINK, reply)
    return 0


def _new_module(name: str) -> types.ModuleType:
    """An empty module; standard streams are made anew on descriptors 0 to 2."""
    sys.stdin = sys.__stdin__ = _stream(0, "r")
    sys.stdout = sys.__stdout__ = _stream(1, "w")
    sys.stderr = sys.__stderr__ = _stream(2, "w")
    sys.argv = ["program.py"]
    builtins.exit = builtins.quit = sys.exit  # type: ignore[assignment]  # which Python's `site` would have made
    sys.path = [p for p in sys.path if p]
    module = types.ModuleType(name)
    module.__dict__["__builtins__"] = builtins
    sys.modules[name] = module
    return module


def _stream(descriptor: int, mode: str) -> Any:
    return open(descriptor, mode, encoding="utf-8", errors="backslashreplace", closefd=False)


def _describe(error: BaseException) -> str:
    name = type(error).__name__
    if isinstance(error, ModuleNotFoundError) and error.name:
        name += f" {error.name}"
    return name[:200]


def _report(**what: str) -> None:
    _send(REPORT, json.dumps(what).encode() + b"\n")


def _send(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
