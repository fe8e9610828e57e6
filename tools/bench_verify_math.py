"""The verifier of mathematical answers beside Math-Verify: right and wrong verdicts, hostile answers, and speed.

    python tools/bench_verify_math.py [--peer PYTHON] [--data FOLDER] [--list] [--skip PART ...]

`PYTHON` is an interpreter of an environment that has Math-Verify (`python -m venv V && V/bin/pip install math-verify`,
then `--peer V/bin/python`); without it, only ours is measured. `FOLDER` holds gsm8k/train.jsonl and test.jsonl.

    table     tests/verify/math_pairs.jsonl: pairs with their truth. Precision is the share of true pairs among those
              called correct, recall the share of true pairs that are called so. `--list` prints what is undecided
    gsm8k     every solution against its own answer, and 5,000 against an answer with one digit changed
    hostile   1,000 answers made to hang, to fill the memory or to crash: processor time and memory of each
    speed     verdicts per second of processor time, in one process, with empty caches for every pair
    scaling   verdicts per second of the clock, in a pool of one process and of as many as there are processors
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "tests" / "verify" / "math_pairs.jsonl"
PERTURBED = 5000
HOSTILE = 1000


def read_table() -> list[dict[str, Any]]:
    return [json.loads(line) for line in TABLE.read_text(encoding="utf-8").splitlines()]


def read_gsm8k(folder: Path) -> list[tuple[str, str]]:
    """(solution, gold answer) of both splits."""
    files = [folder / "gsm8k" / f"{name}.jsonl" for name in ("train", "test")]
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    solutions = [json.loads(line)["answer"] for line in lines]
    return [(solution, solution.rpartition("####")[2].strip()) for solution in solutions]


def one_digit_off(answer: str, rng: random.Random) -> str:
    """The answer with one digit changed; a first digit does not become 0."""
    places = [i for i, character in enumerate(answer) if character.isdigit()]
    place = rng.choice(places)
    digits = [d for d in "0123456789" if d != answer[place] and not (d == "0" and place == places[0])]
    return answer[:place] + rng.choice(digits) + answer[place + 1 :]


def hostile_answers(count: int = HOSTILE) -> list[str]:
    """Bombs, deep nesting, megabytes and control characters, the same in every run."""
    rng = random.Random(0)
    bombs = r"9^{9^9} 10^{10^{10}} 9^{9^{9^9}} (10^8)! 300000000! 2^{10^9} e^{e^{e^{e^9}}} 1e999999999 x^{10^9}"
    bombs += r" \sqrt[10^9]{2} \sin(10^{10^{9}}) 10^{-10^{9}} (x+1)^{100000} ((x+y)^{100})^{100} 2^{2^{2^{2^{2^2}}}}"
    bombs += r" \binom{10^9}{10^8}"
    fixed = [
        *bombs.split(),
        *(r"\sum_{n=1}^{10^9} n", r"\prod_{n=1}^{10^9} n", r"\int_0^{10^9} x^x dx", r"\log_{10^{-999}} 2"),
        *("__import__('os').system('true')", "().__class__.__base__.__subclasses__()", "exec('1')", "lambda: 0"),
    ]
    pieces = r"\frac{ \sqrt{ ( [ { \{ ^{ 1+ - 9 9^ 1, x | \pm ! % \begin{pmatrix} \\ & = < \cup _{ \text{ } )".split()
    pieces += [*r"\infty \left( 0. \overline{3} : \sin \log_ ^\circ \[".split(), "or ", " ", "\n", "é"]
    pieces += ["\x00", "\x07", "\x1b[2J", "\u202e", "\ud7ff"]
    small = [*pieces, "1", "2", "99", "x", "y", r"\pi ", "e", "i"]
    answers = list(fixed)
    for piece in pieces:
        for size in (50, 450, 990, 1_000_000):
            answers.append(piece * (size // len(piece)))
            answers.append(piece * (size // len(piece) // 2) + "1" + "}" * (size // len(piece) // 2))
    while len(answers) < count:
        answers.append("".join(rng.choices(small, k=rng.choice((5, 20, 100, 300)))))
    return answers[:count]


# ---------------------------------------------------------------------------------------------------- sides


def rate(call: Callable[[Any], object], items: list[Any]) -> dict[str, float]:
    """Items per second of processor time, and the slowest ones in milliseconds."""
    taken = []
    for item in items:
        start = time.process_time()
        call(item)
        taken.append(time.process_time() - start)
    taken.sort()
    p50, p90 = (1000 * taken[int(share * len(taken))] for share in (0.5, 0.9))
    return {"per_second": len(items) / sum(taken), "p50": p50, "p90": p90, "max": 1000 * taken[-1]}


def measure(judge: Callable[[str, str], str], whole: Callable[[str, str], str], job: dict[str, Any]) -> dict[str, Any]:
    """What one side finds: `judge` compares two answers, `whole` a response with an answer."""
    judge("2", "2")
    judge(r"\sqrt{2}+1", r"1+\sqrt{2}")
    found: dict[str, Any] = {}
    if job["table"]:
        found["table"] = [judge(answer, gold) for answer, gold in job["table"]]
    if job["speed"]:
        found["latex"] = rate(lambda pair: judge(*pair), job["latex"])
    if job["speed"] and job["responses"]:
        found["responses"] = rate(lambda pair: whole(*pair), job["responses"])
    return found


def our_side(job: dict[str, Any]) -> dict[str, Any]:
    from jaxdistill.verify import check_math, compare_math
    from jaxdistill.verify.latex import parse_latex

    def judge(answer: str, gold: str) -> str:
        parse_latex.cache_clear()
        return compare_math(answer, gold).outcome

    return measure(judge, lambda response, gold: check_math(response, gold).outcome, job)


def peer_side(job: dict[str, Any]) -> dict[str, Any]:
    import logging

    from math_verify import parse, verify  # pyrefly: ignore

    logging.disable(logging.CRITICAL)

    def judge(answer: str, gold: str) -> str:
        boxed = [parse(rf"\boxed{{{text}}}") for text in (gold, answer)]
        return "correct" if verify(*boxed) else "incorrect"

    def whole(response: str, gold: str) -> str:
        return "correct" if verify(parse(gold), parse(response)) else "incorrect"

    return measure(judge, whole, job)


def run_side(python: str, side: str, job: dict[str, Any]) -> dict[str, Any]:
    """Each side has a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [python, __file__, "--side", side]
    ran = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, env=environment, check=False)
    if ran.returncode:
        raise ValueError(f"{python} failed: {ran.stderr.strip().splitlines()[-1]}")
    return json.loads(ran.stdout.splitlines()[-1])


# -------------------------------------------------------------------------------------------------- reports


def report_table(name: str, rows: list[dict[str, Any]], outcomes: list[str], with_list: bool) -> None:
    counts = Counter((row["equal"], outcome) for row, outcome in zip(rows, outcomes, strict=True))
    called = counts[True, "correct"] + counts[False, "correct"]
    true = sum(row["equal"] for row in rows)
    print(
        f"{name:<12} precision {counts[True, 'correct'] / called:.2%}, recall {counts[True, 'correct'] / true:.2%}; "
        f"of {true} true pairs {counts[True, 'incorrect']} incorrect, {counts[True, 'undecided']} undecided; "
        f"of {len(rows) - true} false ones {counts[False, 'correct']} correct, {counts[False, 'undecided']} undecided"
    )
    if with_list:
        for row, outcome in zip(rows, outcomes, strict=True):
            right = {True: "correct", False: "incorrect"}[row["equal"]]
            if outcome != right:
                print(f"    {outcome:<10} {row['kind']:<11} {row['answer']!r} for {row['gold']!r}")


def report_gsm8k(pairs: list[tuple[str, str]]) -> None:
    from jaxdistill.verify import check_math

    right = sum(check_math(*pair).outcome == "correct" for pair in pairs)
    rng = random.Random(0)
    changed = [(solution, one_digit_off(gold, rng)) for solution, gold in rng.sample(pairs, PERTURBED)]
    outcomes = Counter(check_math(*pair).outcome for pair in changed)
    print(f"gsm8k        {right:,} of {len(pairs):,} solutions correct; with one digit changed: {dict(outcomes)}")


def report_hostile(answers: list[str]) -> None:
    from jaxdistill.verify import MathPool, check_math
    from jaxdistill.verify.pool import GAVE_UP

    pairs = [(rf"The answer is \boxed{{{answer}}}.", gold) for answer in answers for gold in ("5", r"\sqrt{2}")]
    with MathPool(1) as pool:
        checks = pool.check(pairs)
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    check_math(r"\boxed{1+x}", "x+1")  # reads the grammar
    slowest = rate(lambda pair: check_math(*pair), pairs)["max"]
    outcomes = Counter(check.outcome for check in checks)
    print(
        f"hostile      {len(answers):,} answers, each against two gold answers: {dict(outcomes)}, "
        f"{checks.count(GAVE_UP)} gave up; slowest {slowest:.0f} ms, memory {usage.ru_maxrss >> 10} MiB"
    )


def report_speed(ours: dict[str, Any], peer: dict[str, Any] | None) -> None:
    for what in ("responses", "latex"):
        for name, side in (("ours", ours), ("Math-Verify", peer)):
            if side and what in side:
                r = side[what]
                share = f", {ours[what]['per_second'] / r['per_second']:.1f} times" if side is peer else ""
                print(
                    f"{what:<12} {name:<11} {r['per_second']:>8,.0f} per second of one processor; "
                    f"p50 {r['p50']:.2f}, p90 {r['p90']:.2f}, max {r['max']:.1f} ms{share}"
                )


def report_scaling(responses: list[tuple[str, str]], latex: list[tuple[str, str]]) -> None:
    """Pools are warm, but for their caches."""
    from jaxdistill.verify import MathPool

    latex = [(rf"\boxed{{{answer}}} ", gold) for answer, gold in latex]
    for name, pairs in (("responses", responses), ("latex", latex)):
        first = None
        for workers in dict.fromkeys((1, len(os.sched_getaffinity(0)))):
            with MathPool(workers) as pool:
                pool.check([(r"\boxed{1+\sqrt{2}}", r"\sqrt{2}+1")] * 64 * workers)
                start = time.monotonic()
                pool.check(pairs)
                took = len(pairs) / (time.monotonic() - start)
            first = first or took
            print(f"{name:<12} pool of {workers:<3} {took:>8,.0f} per second, {took / first:.2f} times one process")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="an interpreter that has math-verify")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--skip", nargs="*", default=[], choices=["table", "gsm8k", "hostile", "speed", "scaling"])
    parser.add_argument("--side", choices=["ours", "peer"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        found = {"ours": our_side, "peer": peer_side}[arguments.side](json.load(sys.stdin))
        print("\n" + json.dumps(found))
        return 0
    skip, rows = set(arguments.skip), read_table()
    gsm8k = read_gsm8k(arguments.data) if (arguments.data / "gsm8k").is_dir() else []
    pairs = [(row["answer"], row["gold"]) for row in rows]
    job = {
        "table": [] if "table" in skip else pairs,
        "speed": "speed" not in skip,
        "latex": [pair for pair in pairs if "\\" in "".join(pair)],
        "responses": gsm8k[:2000],
    }
    if "hostile" not in skip:  # first, because the memory of all children is one number
        report_hostile(hostile_answers())
    ours = run_side(sys.executable, "ours", job)
    peer = run_side(arguments.peer, "peer", job) if arguments.peer else None
    if "table" not in skip:
        report_table("ours", rows, ours["table"], arguments.list)
        if peer:
            report_table("Math-Verify", rows, peer["table"], arguments.list)
    if gsm8k and "gsm8k" not in skip:
        report_gsm8k(gsm8k)
    report_speed(ours, peer)
    if "scaling" not in skip:
        report_scaling(gsm8k, job["latex"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
