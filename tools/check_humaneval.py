"""Holds the code verifier against HumanEval: its solutions have to pass, and solutions that were broken have to fail.

    python tools/check_humaneval.py HUMANEVAL.jsonl.gz [--count N] [--workers 2]

A mutant is a solution with one operator or constant changed. Whether that changes what the function does is decided by
plain Python, which runs program and tests in one process, as HumanEval's own runner does: of every problem the first
mutant that fails there is taken. Fails (exit status 1) if any verdict is not the expected one.
"""

from __future__ import annotations

import argparse
import ast
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jaxdistill.config import ProblemsConfig
from jaxdistill.records import Problem
from jaxdistill.traces.problems import load_problems
from jaxdistill.verify.code import Limits, Sandbox, check_code

SWAPS: dict[type, type] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.FloorDiv: ast.Mult,
    ast.Div: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitXor: ast.BitAnd,
    ast.Lt: ast.GtE,
    ast.LtE: ast.Gt,
    ast.Gt: ast.LtE,
    ast.GtE: ast.Lt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.And: ast.Or,
    ast.Or: ast.And,
}


def mutants(program: str, entry: str) -> Iterator[str]:
    """The program with one operator or constant of its function `entry` changed, one after the other."""
    number = 0
    while True:
        tree = ast.parse(program)
        function = [f for f in tree.body if isinstance(f, ast.FunctionDef) and f.name == entry][-1]
        body = [node for statement in function.body[_is_docstring(function) :] for node in ast.walk(statement)]
        changes = [change for node in body for change in _changes(node)]
        if number == len(changes):
            return
        changes[number]()
        yield ast.unparse(tree) + "\n"
        number += 1


def _is_docstring(function: ast.FunctionDef) -> bool:
    return ast.get_docstring(function) is not None


def _changes(node: Any) -> list[Callable[[], None]]:
    if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
        return [lambda: setattr(node, "ops", [SWAPS[type(node.ops[0])](), *node.ops[1:]])]
    if isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign) and type(node.op) in SWAPS:
        return [lambda: setattr(node, "op", SWAPS[type(node.op)]())]
    if isinstance(node, ast.Constant) and node.value is not None:
        value = node.value
        if isinstance(value, bool):
            return [lambda: setattr(node, "value", not value)]
        if isinstance(value, int | float):
            return [lambda: setattr(node, "value", value + 1)]
        if isinstance(value, str):
            return [lambda: setattr(node, "value", value + "x")]
    if isinstance(node, ast.Return) and node.value is not None:  # for solutions with nothing else to change
        return [lambda: setattr(node, "value", ast.Constant(None))]
    return []


def fails_plainly(program: str, tests: dict[str, Any]) -> bool:
    """Whether plain Python fails the tests, or takes more than ten seconds; only for programs that can be trusted."""
    source = "\n".join([tests["context"], program, *tests["tests"]])
    try:
        ran = subprocess.run([sys.executable, "-I", "-S", "-c", source], capture_output=True, timeout=10)
    except subprocess.TimeoutExpired:
        return True
    return ran.returncode != 0


def broken(problem: Problem) -> str | None:
    """The first mutant of a problem's solution that plain Python fails; None if there is none."""
    assert problem.solution is not None and problem.tests is not None
    program = problem.solution.removeprefix("```python\n").removesuffix("\n```")
    tests = json.loads(problem.tests)
    return next((m for m in mutants(program, tests["entry"]) if fails_plainly(m, tests)), None)


def wrong_verdicts(problems: list[Problem], workers: int) -> list[str]:
    """What was expected otherwise: the solution and the mutant of every problem, each checked."""
    faults: list[str] = []
    limits = Limits(cpu_s=10)
    with ThreadPoolExecutor(workers) as pool, Sandbox(workers=workers) as sandbox:

        def verdict(problem: Problem, response: str) -> str:
            assert problem.tests is not None
            check = check_code(response, problem.tests, limits=limits, sandbox=sandbox)
            return f"{check.outcome}: {check.reason}"

        start = time.monotonic()
        for problem, found in zip(problems, pool.map(lambda p: verdict(p, p.solution or ""), problems), strict=True):
            if not found.startswith("correct"):
                faults.append(f"{problem.id}: solution {found}")
        taken = time.monotonic() - start
        print(f"{len(problems)} solutions in {taken:.1f} s, isolation {sandbox.tier}, {len(faults)} not correct")
        programs = list(pool.map(broken, problems))
        before = len(faults)
        for problem, program in zip(problems, programs, strict=True):
            found = verdict(problem, f"```python\n{program}```") if program else "no mutant that fails"
            if not found.startswith("incorrect"):
                faults.append(f"{problem.id}: mutant {found}")
        print(f"{len(programs)} mutants, {len(faults) - before} not incorrect")
    return faults


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("file", type=Path)
    parser.add_argument("--count", type=int)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args(arguments)
    config = ProblemsConfig(source="humaneval", path=str(options.file), count=options.count)
    faults = wrong_verdicts(load_problems(config), options.workers)
    print("\n".join(faults))
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
