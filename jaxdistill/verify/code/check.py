"""Judges the program of a response: extraction (`blocks`), sandbox, and a comparison that it cannot reach."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Mapping
from typing import Any

from jaxdistill.config import CodeLimitsConfig
from jaxdistill.verify.code.blocks import extract_code
from jaxdistill.verify.code.output import same_output
from jaxdistill.verify.code.sandbox import Sandbox, SandboxError, limits_of
from jaxdistill.verify.code.tests import CodeTests, read_tests
from jaxdistill.verify.compare import Check

Job = dict[str, Any]
_NOTHING = CodeTests(kind="")


def check_code(
    response: str,
    tests: str | Mapping[str, Any],
    *,
    limits: CodeLimitsConfig | None = None,
    sandbox: Sandbox | None = None,
) -> Check:
    """Judges a whole response, thinking included, by a problem's tests.

    Args:
      response: generated text; its last Python block behind the last `</think>` is the program.
      tests: `Problem.tests`, as text or read; see `tests`.
      limits: of time, memory and output, of every run of the program.
      sandbox: an entered one, where many programs are judged; a new one for this call if absent.
    Returns:
      correct if all tests pass; incorrect if one fails, or the program crashes or takes too much of the processor, of
      memory or of output; undecided, with the reason, if there is no program, the tests are at fault, a module is
      missing, or the machine was too slow. `method` is the kind of the tests and the tier of isolation.
    Raises:
      ValueError: a new sandbox was needed, and the machine allows only a weak one.
    """
    if sandbox is None:
        with Sandbox() as own:
            return check_code(response, tests, limits=limits, sandbox=own)
    block = extract_code(response)
    if block.code is None:
        return Check("undecided", None, block.reason, "")
    try:
        read = read_tests(tests if isinstance(tests, str) else json.dumps(tests))
    except (ValueError, TypeError) as error:
        return Check("undecided", block.code, f"malformed tests: {error}", "")
    try:
        outcome, reason = _KINDS[read.kind](block.code, read, limits or CodeLimitsConfig(), sandbox)
    except SandboxError:
        outcome, reason = "undecided", "the sandbox failed"
    return Check(outcome, block.code, reason, f"{read.kind} ({sandbox.tier})")


Found = tuple[Any, str]


def _check_stdio(code: str, tests: CodeTests, limits: CodeLimitsConfig, sandbox: Sandbox) -> Found:
    """Every case in a sandbox of its own; the expected output never leaves this process."""
    left = float(limits.total_s)
    for i, case in enumerate(tests.cases):
        job = _job("script", limits, source=code, stdin=case["input"])
        # what is so much longer cannot be right, and need not be held in memory
        enough = (1 << 16) + 64 * len(case["output"])
        job["limits"]["output_bytes"] = min(job["limits"]["output_bytes"], enough)
        ran = sandbox.run([job], limits.wall_s)[0]
        if fault := _fault(ran, limits):
            return fault
        if not same_output(ran["output"], case["output"]):
            return "incorrect", f"another output than expected in case {i + 1}"
        left -= ran["wall"]
        if left < 0 and i + 1 < len(tests.cases):
            return "undecided", "all cases together take too long"
    return "correct", "all tests pass"


def _check_linked(code: str, tests: CodeTests, limits: CodeLimitsConfig, sandbox: Sandbox) -> Found:
    """Program and tests in two sandboxes; the tests ask the program for values, and compare them on their side."""
    program = _job("serve", limits, source=code, context=tests.context, entry=tests.entry)
    grader = _job(
        tests.kind, limits, entry=tests.entry, context=tests.context, setup=tests.setup, tests=tests.tests,
        cases=tests.cases,
    )  # fmt: skip
    for name in ("cpu_s", "wall_s", "memory_bytes"):  # so that the program meets its limits first
        grader["limits"] = grader["limits"] | {name: 2 * grader["limits"][name]}
    ran, graded = sandbox.run([program, grader], 2 * limits.wall_s)
    verdict = _report(graded)
    if "passed" in verdict and graded["ended"] == "exit":
        return "correct", "all tests pass"
    if "malformed" in verdict:
        return "undecided", f"malformed tests: {str(verdict['malformed'])[:200]}"
    if fault := _fault(ran, limits):
        return fault
    if "failed" in verdict:
        return "incorrect", str(verdict["failed"])[:200]
    return "undecided", "the tests ran into a limit"


_KINDS = {"stdio": _check_stdio, "asserts": _check_linked, "calls": _check_linked}
"""Kinds of tests, and how each is run."""


def _job(kind: str, limits: CodeLimitsConfig, stdin: str = "", **fields: Any) -> Job:
    return {"kind": kind, "limits": limits_of(limits), "stdin": stdin, **fields}


def _fault(ran: Job, limits: CodeLimitsConfig) -> Found | None:
    """What the end of a program says of it; None if it came to a good end."""
    report = _report(ran)
    if ran["ended"] == "wall":  # it waited, or the machine was too busy: nobody knows
        return "undecided", "no end within the wall-clock limit"
    if ran["ended"] == "output":
        return "incorrect", "too much output"
    if ran["ended"] == "signal":
        if ran["code"] == signal.SIGKILL:
            spent = ran["cpu"] >= limits.cpu_s * 0.9
            return ("incorrect", "time limit") if spent else ("undecided", "killed by the system")
        return "incorrect", f"killed by signal {ran['code']}"
    if "missing" in report:
        return "incorrect", "the function that is asked for is not defined"
    raised = str(report.get("raised", ""))[:200]
    name, _, module = raised.partition(" ")
    if name == "ModuleNotFoundError" and module.partition(".")[0] not in sys.stdlib_module_names:
        return "undecided", f"needs the module {module}"
    if raised:
        return "incorrect", f"raises {raised}"
    return ("incorrect", f"exit status {ran['code']}") if ran["code"] else None


def _report(ran: Job) -> dict[str, Any]:
    """The last line that was reported. A program may write anything there: it picks a reason at most."""
    lines = ran["report"].strip().splitlines()
    try:
        found = json.loads(lines[-1]) if lines and len(lines[-1]) < 4096 else {}
    except (ValueError, RecursionError):
        found = {}
    return found if isinstance(found, dict) else {}
