"""Kills the trace collector and its vLLM server with SIGKILL at random moments, and checks that nothing came of it.

    python tools/kill_collector.py [--samples 2000] [--kills 30] [--folder FOLDER] [--seed 0] [--max-num-seqs 64]

A real server process answers the demo problems with the demo teacher. Collector and server are killed in turn, whenever
the journal has grown to a random length, and started again at once. At the end every (problem, style, sample) is there
exactly once, in the journal too, without a failure; prompts, seeds and everything else that went in are those of an
undisturbed run, byte for byte. Exit code 0 exactly if that is so. Whether the sampled tokens are the same is told
besides: they are on one machine's CPU, and vLLM does not promise it elsewhere.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import yaml

from jaxdistill import hub
from jaxdistill.records import RunDir, Trace, read_manifest, read_records

ROOT = Path(__file__).parent.parent
STYLES = ["plain", "cot"]
SAMPLES_EACH = 2
VLLM = (
    "{python} -m vllm.entrypoints.openai.api_server --model {model} --host 127.0.0.1 --port {port} --dtype float32 "
    "--max-model-len 256 --max-num-seqs {max_num_seqs} --enforce-eager --no-enable-chunked-prefill "
    "--max-num-batched-tokens 4096 --generation-config vllm --disable-log-stats --uvicorn-log-level warning"
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def write_config(folder: Path, name: str, port: int, samples: int) -> Path:
    per_problem = len(STYLES) * SAMPLES_EACH
    config = {
        "name": name,
        "run_dir": str(folder / name),
        "problems": {"source": "demo", "count": samples // per_problem, "seed": 3},
        "traces": {
            "engine": "server",
            "teacher": "demo",
            "styles": STYLES,
            "samples": SAMPLES_EACH,
            "max_tokens": 96,
            "server": {"urls": [f"http://127.0.0.1:{port}/v1"], "in_flight": 64, "backoff_s": 0.2, "retries": 12},
        },
        "data": {"row_tokens": 136},
        "student": {"init": "demo"},
        "train": {"batch_rows": 16, "steps": 1, "optimizer": {"learning_rate": 1e-3}},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


class Process:
    """A command in a session of its own, which can be killed with all its children and started again."""

    def __init__(self, command: Sequence[str], log: Path):
        self.command, self.log = command, log
        self.process = self._start()

    def _start(self) -> subprocess.Popen:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
        with open(self.log, "ab") as out:
            return subprocess.Popen(self.command, stdout=out, stderr=out, env=environment, start_new_session=True)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def restart(self) -> None:
        self.kill()
        self.process = self._start()


def wait_for_server(port: int, server: Process, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            raise ValueError(f"the server ended; see {server.log}")
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=2),
        ):
            return
        time.sleep(0.2)
    raise ValueError(f"the server was not up after {seconds:.0f} s; see {server.log}")


def lines_of(journal: Path) -> int:
    """Completions in a journal; its first line is a header."""
    with contextlib.suppress(FileNotFoundError):
        return max(0, journal.read_bytes().count(b"\n") - 1)
    return 0


def disturb(
    collector: Process, server: Process, journal: Path, samples: int, kills: int, rng: random.Random
) -> Counter:
    """Kills one of the two each time the journal has grown to a random length; gives how often which."""
    killed: Counter[str] = Counter()
    moments = sorted(rng.randrange(samples) for _ in range(kills))
    for number, moment in enumerate(moments):
        while lines_of(journal) < moment and collector.process.poll() is None:
            time.sleep(0.005)
        time.sleep(rng.choice([0.0, 0.0, rng.uniform(0, 1.5)]))  # sometimes while the last victim is starting
        if collector.process.poll() is not None and lines_of(journal) >= samples:
            break
        name, victim = ("server", server) if number % 2 else ("collector", collector)
        print(f"  killed the {name} at {lines_of(journal):,} of {samples:,}", flush=True)
        victim.restart()
        killed[name] += 1
    return killed


def faults_of(disturbed: RunDir, undisturbed: RunDir, samples: int) -> list[str]:
    """What is wrong with the disturbed run; empty if nothing is."""
    found = []
    traces, expected = (list(read_records(run.traces, Trace)) for run in (disturbed, undisturbed))
    if len(traces) != samples or len({trace.id for trace in traces}) != samples:
        found.append(f"{len(traces)} traces, {len({t.id for t in traces})} different ones, instead of {samples}")
    with open(disturbed.traces / "journal.jsonl") as file:
        next(file)
        times = Counter(json.loads(line)["id"] for line in file)
    if set(times) != {trace.id for trace in expected} or max(times.values()) > 1:
        found.append(f"the journal has {len(times)} ids, {sum(n > 1 for n in times.values())} of them repeated")
    failed = [trace for trace in traces if trace.error is not None]
    if failed:
        found.append(f"{len(failed)} failed, such as {failed[0].id}: {failed[0].error}")
    names = ("id", "problem_id", "style", "sample", "prompt_ids", "seed", "teacher", "revision", "temperature")
    for one, other in zip(traces, expected, strict=False):
        if any(getattr(one, name) != getattr(other, name) for name in names):
            found.append(f"{one.id} was asked otherwise than in the undisturbed run")
            break
    same = sum(one.output_ids == other.output_ids for one, other in zip(traces, expected, strict=False))
    print(f"{same:,} of {samples:,} responses are those of the undisturbed run, token for token")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--folder", type=Path, help="where the two runs go; a temporary folder if absent")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--server", default=VLLM, help="another server's command, with {port}")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    samples = arguments.samples - arguments.samples % (len(STYLES) * SAMPLES_EACH)
    port = free_port()
    command = arguments.server.format(
        python=sys.executable, model=hub.demo_teacher(), port=port, max_num_seqs=arguments.max_num_seqs
    )
    server = Process(shlex.split(command), folder / "server.log")
    collector = None
    try:
        wait_for_server(port, server)
        for name in ("undisturbed", "disturbed"):
            begun, killed = time.monotonic(), Counter()
            config = write_config(folder, name, port, samples)
            collect = [sys.executable, "-m", "jaxdistill", "generate", str(config)]
            collector = Process(collect, folder / f"{name}.log")
            journal = RunDir(folder / name).traces / "journal.jsonl"
            if name == "disturbed":
                killed = disturb(collector, server, journal, samples, arguments.kills, random.Random(arguments.seed))
            collector.process.wait()
            if read_manifest(journal.parent) is None:
                print(f"the {name} run did not end well; see {collector.log}")
                return 1
            counts = ", ".join(f"{count} kills of the {victim}" for victim, count in killed.items())
            print(f"{name}: {time.monotonic() - begun:.0f} s{', ' + counts if counts else ''}", flush=True)
    finally:
        server.kill()
        if collector is not None:
            collector.kill()
    found = faults_of(RunDir(folder / "disturbed"), RunDir(folder / "undisturbed"), samples)
    print(f"faults: {'; '.join(found) or 'none'}")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
