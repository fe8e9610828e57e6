"""How many programs a minute the code verifier judges, by kind of tests and number of workers.

    python tools/bench_verify_code.py [--seconds 10] [--workers 1 2] [--humaneval HUMANEVAL.jsonl.gz]

Programs are short, so that what is measured is the cost of the sandbox: `asserts` and `calls` take two confined
processes a program, `stdio` one a case (one case here). With HumanEval's file also its own solutions and tests.
Prints programs a minute, and milliseconds a program of the median and the slowest hundredth, with the machine's load.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jaxdistill.config import ProblemsConfig
from jaxdistill.traces.problems import load_problems
from jaxdistill.verify.code import Sandbox, check_code

Pairs = list[tuple[str, str]]
"""Responses, each with its tests."""

FUNCTION = "```python\ndef f(x):\n    return sorted(x)[0]\n```"
SCRIPT = "```python\nprint(min(map(int, input().split())))\n```"
KINDS: dict[str, Pairs] = {
    "asserts": [(FUNCTION, json.dumps({"kind": "asserts", "entry": "f", "tests": ["assert f([3, 1, 2]) == 1"] * 3}))],
    "calls": [
        (FUNCTION, json.dumps({"kind": "calls", "entry": "f", "cases": [{"args": [[3, 1]], "expected": 1}] * 3}))
    ],
    "stdio": [(SCRIPT, json.dumps({"kind": "stdio", "cases": [{"input": "3 1 2\n", "output": "1\n"}]}))],
}


def measure(pairs: Pairs, workers: int, seconds: float) -> tuple[float, list[float]]:
    """Programs a minute, and the seconds of each; the pairs are gone through again and again."""
    with Sandbox(workers=workers) as sandbox, ThreadPoolExecutor(workers) as pool:

        def judge(pair: tuple[str, str]) -> float:
            start = time.monotonic()
            check = check_code(*pair, sandbox=sandbox)
            if check.outcome != "correct":
                raise ValueError(f"a program is {check.outcome} ({check.reason}) that should be correct.")
            return time.monotonic() - start

        list(pool.map(judge, pairs[:1] * workers))  # started and warm
        start = time.monotonic()
        taken: list[float] = []
        rounds = itertools.cycle(pairs)
        while time.monotonic() - start < seconds:
            taken += pool.map(judge, itertools.islice(rounds, 16 * workers))
        return 60 * len(taken) / (time.monotonic() - start), taken


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--humaneval", type=Path)
    options = parser.parse_args(arguments)
    kinds = dict(KINDS)
    if options.humaneval:
        problems = load_problems(ProblemsConfig(source="humaneval", path=str(options.humaneval)))
        kinds["humaneval"] = [(p.solution or "", p.tests or "") for p in problems]
    with Sandbox() as sandbox:
        print(f"isolation {sandbox.tier}, {os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}")
    for workers in options.workers:
        for kind, pairs in kinds.items():
            rate, taken = measure(pairs, workers, options.seconds)
            slowest = statistics.quantiles(taken, n=100)[-1]
            print(
                f"{kind:<10}{workers} workers{rate:>8,.0f} programs/min  "
                f"median {1000 * statistics.median(taken):.0f} ms, slowest hundredth {1000 * slowest:.0f} ms"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
