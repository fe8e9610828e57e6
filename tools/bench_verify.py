"""How fast the verify stage judges, on how many processors, and that a kill costs nothing.

    python tools/bench_verify.py [--traces 20000] [--thinking 8000] [--workers 1 2] [--kills 5] [--folder FOLDER]

The traces are worked problems of the demo task, with so many characters of thinking, a twentieth of them wrong. Printed
are traces a second, from nothing: with the filters that are on by default, and with every filter and MinHash
signatures; then the time with nothing new, and with one trace in a hundred new. At last the stage's process is killed
with SIGKILL at random moments, and started again until it ends: its verdicts have to be those of an undisturbed run,
byte for byte, and no processes may be left.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from jaxdistill.config import FiltersConfig, RunConfig, build
from jaxdistill.demo.task import make_problems
from jaxdistill.records import CACHE, Problem, RunDir, Trace, split_response, write_records
from jaxdistill.verify.quality import QUALITY
from jaxdistill.verify.stage import verify

ROOT = Path(__file__).parent.parent
LENIENT = {q.threshold: 1e9 if q.threshold.startswith("max") else 0 for q in QUALITY.values()}
EVERYTHING = {
    "filters": {k: v if FiltersConfig.__annotations__[k].startswith("float") else int(v) for k, v in LENIENT.items()},
    "near_duplicates": 1.0,
}
SOLO = "import sys; from pathlib import Path; from tools.bench_verify import again; again(sys.argv[1])"


def make_config(**settings: Any) -> RunConfig:
    return build(
        {
            "name": "bench",
            "run_dir": "unused",
            "problems": {"source": "demo", "count": 1},
            "traces": {"engine": "import"},
            "verify": settings,
            "data": {"row_tokens": 64},
            "student": {"init": "none"},
            "train": {"batch_rows": 1, "steps": 1, "optimizer": {"learning_rate": 0.1}},
        }
    )


def make_run(folder: Path, traces: int, thinking: int) -> RunDir:
    """Problems and traces; the thinking is that of other problems before its own."""
    run, rng = RunDir(folder), random.Random(0)
    made = list(make_problems(traces, seed=5))
    words = [split_response(solution)[0] or "" for _, _, solution in made]
    problems, rows = [], []
    for number, (question, answer, _) in enumerate(made):
        name = f"demo:{number}"
        problems.append(
            Problem(id=name, prompt=question, answer=str(answer), domain=f"domain {number % 3}", source="demo")
        )
        said: list[str] = []
        while sum(map(len, said)) < thinking:
            said.append(rng.choice(words))
        thoughts = "\n".join([*said, words[number]])
        content = f"The answer is \\boxed{{{answer + (number % 20 == 0)}}}."
        response = f"<think>\n{thoughts}\n</think>\n{content}"
        rows.append(
            Trace(
                **{"id": f"{name}/plain/0", "problem_id": name, "style": "plain", "sample": 0, "response": response},
                **{"thinking": thoughts, "content": content, "finish_reason": "imported"},
                **{"engine": "import", "teacher": "", "revision": "", "temperature": 1.0, "top_p": 1.0},
                **{"max_tokens": 0, "seed": 0, "prompt_ids": [], "output_ids": []},
            )
        )
    write_records(run.problems / "problems.parquet", Problem, problems)
    write_records(run.traces / "traces-0.parquet", Trace, rows[: len(rows) * 99 // 100])
    write_records(run.traces / "traces-1.parquet", Trace, rows[len(rows) * 99 // 100 :])
    return run


def again(folder: str) -> None:
    """The stage in a process of its own, for the kills."""
    verify(make_config(), RunDir(Path(folder)))


def timed(run: RunDir, **settings: Any) -> float:
    start = time.monotonic()
    verify(make_config(**settings), run)
    return time.monotonic() - start


def from_nothing(run: RunDir, **settings: Any) -> float:
    shutil.rmtree(run.verdicts, ignore_errors=True)
    return timed(run, **settings)


def kill_and_go_on(run: RunDir, kills: int, takes: float) -> tuple[list[str], bool]:
    """Moments of the kills, and whether the verdicts are those of an undisturbed run."""
    file = run.verdicts / "verdicts.parquet"
    expected = file.read_bytes()
    shutil.rmtree(run.verdicts)
    rng, said = random.Random(1), []
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SOLO, str(run.root)]
    for _ in range(kills):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment) as process:
            try:
                process.wait(1.0 + rng.uniform(0.1, 0.9) * takes / max(1, kills - 1))
                said.append("had ended")
            except subprocess.TimeoutExpired:
                process.kill()
                checks = run.verdicts / CACHE / "checks.jsonl"
                said.append(f"{checks.stat().st_size >> 10 if checks.exists() else 0} KiB of checks")
    subprocess.run(command, stdout=subprocess.DEVNULL, env=environment, check=True)
    return said, file.read_bytes() == expected


def left_over() -> int:
    """Processes of a pool whose parent is gone."""
    time.sleep(1)
    found = subprocess.run(["ps", "-eo", "ppid,args"], capture_output=True, text=True, check=True).stdout.splitlines()
    return sum("jaxdistill.verify.pool import serve" in line and line.split()[0] == "1" for line in found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=int, default=20_000)
    parser.add_argument("--thinking", type=int, default=8000, help="characters")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, len(os.sched_getaffinity(0))])
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the run is made; a temporary folder if absent")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        run = make_run(arguments.folder or Path(temporary), arguments.traces, arguments.thinking)
        lines, takes = [], 0.0
        for workers in arguments.workers:
            for name, settings in (("defaults", {}), ("everything", EVERYTHING)):
                takes = from_nothing(run, workers=workers, **settings)
                lines.append(
                    f"{name:<11}{workers:>3} workers {arguments.traces / takes:>9,.0f} traces/s  ({takes:.1f} s)"
                )
        takes = from_nothing(run)
        lines.append(f"nothing new            {timed(run):>9.2f} s, from nothing {takes:.2f} s")
        last = run.traces / "traces-1.parquet"
        hidden = last.rename(last.with_suffix(".hidden"))
        from_nothing(run)
        hidden.rename(last)
        lines.append(f"one in a hundred new   {timed(run):>9.2f} s")
        said, same = kill_and_go_on(run, arguments.kills, takes)
        lines.append(f"killed -9 at: {', '.join(said)}; verdicts {'the same, byte for byte' if same else 'DIFFER'}")
        left = left_over()
        lines.append(f"processes left behind: {left}")
    print("\n".join(lines))
    return 0 if same and not left else 1


if __name__ == "__main__":
    sys.exit(main())
