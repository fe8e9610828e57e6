"""How much memory collecting traces takes, against how many there are: the collector's peak with few and with many.

    python tools/memory_traces.py                           2,000 against 20,000 samples, about two minutes
    python tools/memory_traces.py --few 200 --many 2000     quick, and less exact

A server in a process of its own answers at once, 64 tokens a sample; the whole stage is run, from the list of problems
to `traces.parquet`. Every row of the table is two fresh processes. `idle` is what the collector holds when everything
is imported, `peak` the largest resident set that Linux has seen (VmHWM). growth = (peak of many - peak of few) / more
samples. A sample itself takes 2,500 bytes in Python, with logprobs 10,000, and the peak of one and the same run differs
by 5 MB from time to time. Exits with 1 if a growth is not below its limit: 600 bytes a sample (what is held of it are
25), and 3,000 a problem, as problems and their prompts are held.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TOKENS = 64
PROBLEMS = 200
# samples of how many problems, with how many logprobs, and the limit of bytes a sample
CASES = {
    "samples of 200 problems": (PROBLEMS, 0, 600),
    "the same with top-4 logprobs": (PROBLEMS, 4, 600),
    "a sample of each problem": (None, 0, 3000),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--few", type=int, default=2000)
    parser.add_argument("--many", type=int, default=20_000)
    parser.add_argument("--limit", type=float, help="bytes a sample, in the place of the cases' own")
    parser.add_argument("--serve", type=int, metavar="PORT", help=argparse.SUPPRESS)
    parser.add_argument("--child", nargs=4, metavar=("URL", "FOLDER", "CASE", "SAMPLES"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if arguments.serve:
        serve(arguments.serve)
        return 0
    if arguments.child:
        url, folder, case, samples = arguments.child
        print(json.dumps(measure(url, Path(folder), *CASES[case][:2], int(samples))))
        return 0
    if sys.platform != "linux":
        print("memory_traces.py reads /proc/self/status, which only Linux has.", file=sys.stderr)
        return 1
    with running_server() as url:
        return report(url, arguments.few, arguments.many, arguments.limit)


def report(url: str, few: int, many: int, limit: float | None) -> int:
    """Measures every case twice, and prints the table."""
    print(f"  {'MB':<30}{'idle':>7}{f'{few:,}':>10}{f'{many:,}':>10}{'growth':>16}   below")
    failed = False
    for name, (problems, _, own_limit) in CASES.items():
        found = []
        for samples in (few, many):
            with tempfile.TemporaryDirectory() as folder:
                write_problems(Path(folder), problems or samples)
                command = [sys.executable, __file__, "--child", url, folder, name, str(samples)]
                ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found.append(json.loads(ran.stdout.splitlines()[-1]))
        growth = (found[1]["peak"] - found[0]["peak"]) / (many - few)
        most = own_limit if limit is None else limit
        failed |= not growth < most
        idle, *peaks = (bytes_ / 1e6 for bytes_ in (found[1]["idle"], found[0]["peak"], found[1]["peak"]))
        print(
            f"  {name:<30}{idle:>7,.0f}{peaks[0]:>10,.1f}{peaks[1]:>10,.1f}"
            f"{growth:>9,.0f} bytes   {most:,g} {'' if growth < most else 'NO'}   {found[1]['seconds']:,.0f} s",
            flush=True,
        )
    return int(failed)


def measure(url: str, folder: Path, problems: int | None, logprobs: int, samples: int) -> dict[str, float]:
    """Collects the traces in this process: bytes, idle and at the peak; seconds."""
    from jaxdistill.records import RunDir
    from jaxdistill.traces import collect, server_engine  # noqa: F401  (a part of what is idle)

    run, count = RunDir(folder), problems or samples
    config = make_config(url, samples // count, logprobs)
    collect.find_teacher(config.traces)  # a part of it too
    idle, begun = resident("VmRSS"), time.monotonic()
    reset_peak()
    counts = collect.generate(config, run)
    assert counts["finished"] == {"length": samples // count * count}, counts
    return {"idle": idle, "peak": resident("VmHWM"), "seconds": time.monotonic() - begun}


def write_problems(folder: Path, count: int) -> None:
    from jaxdistill.records import Problem, RunDir, write_records

    rows = (
        Problem(id=f"s:{n}", prompt=f"Ann has {n} pens. " * 8, answer=str(n), domain="math", source=f"s:{n}")
        for n in range(count)
    )
    write_records(RunDir(folder).problems / "problems.parquet", Problem, rows)


def make_config(url: str, samples: int, logprobs: int) -> Any:
    from jaxdistill import config as configs

    return configs.build(
        {
            "name": "memory",
            "run_dir": "unused",
            "problems": {"source": "demo", "count": 1},
            "traces": {
                "engine": "server",
                "teacher": "demo",
                "samples": samples,
                "max_tokens": TOKENS,
                "logprobs": logprobs,
                "server": {"urls": [url], "in_flight": 64, "dialect": "vllm"},
            },
            "data": {"row_tokens": 136},
            "student": {"init": "demo"},
            "train": {"batch_rows": 16, "steps": 1, "optimizer": {"learning_rate": 1e-3}},
        }
    )


def resident(field: str) -> int:
    """Bytes: VmRSS is what is resident now, VmHWM the most there has been."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def reset_peak() -> None:
    with contextlib.suppress(OSError):  # not allowed everywhere; the peak is then that of all before, too
        Path("/proc/self/clear_refs").write_text("5")


# ---------------------------------------------------------------------------------------------------- the server


@contextlib.contextmanager
def running_server() -> Iterator[str]:
    """A server in a process of its own; gives its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}/v1"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, __file__, "--serve", str(port)], env=environment) as process:
        try:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/models", timeout=2):
                    break
                time.sleep(0.1)
            yield url
        finally:
            process.kill()


def serve(port: int) -> None:
    """Answers as vLLM does, with the same words to everybody."""
    from aiohttp import web

    ids = [(7 * n) % 250 + 5 for n in range(TOKENS)]
    row = {f"token_id:{token}": -1.0 - token / 100 for token in range(300, 303)}
    rows = [{f"token_id:{token}": -0.5} | row for token in ids]
    found = {"top_logprobs": rows, "token_logprobs": [-0.5] * TOKENS}
    choice = {"index": 0, "text": "words", "finish_reason": "length", "token_ids": ids}
    usage = {"completion_tokens": TOKENS}
    plain = json.dumps({"choices": [choice], "usage": usage})
    scored = json.dumps({"choices": [choice | {"logprobs": found}], "usage": usage})

    async def complete(request: web.Request) -> web.Response:
        body = await request.json()
        return web.Response(text=scored if body.get("logprobs") else plain, content_type="application/json")

    async def models(_: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "fake", "max_model_len": 4096}]})

    app = web.Application()
    app.router.add_get("/v1/models", models)
    app.router.add_post("/v1/completions", complete)
    web.run_app(app, host="127.0.0.1", port=port, print=None)


if __name__ == "__main__":
    sys.exit(main())
