"""What a machine with one GPU (or TPU) does, on one page: the pipeline, training beside Hugging Face with Liger's
kernels, attention, losses, decoding, repeatability, and planned against resident memory.

    PYTHONPATH=. python tools/bench_accelerator.py                          everything that fits into 8 minutes
    PYTHONPATH=. python tools/bench_accelerator.py --seconds 1500           with time for all of it
    PYTHONPATH=. python tools/bench_accelerator.py --only training attention --json runs/bench.json
    PYTHONPATH=. python tools/bench_accelerator.py --tiny                   tiny shapes, on any machine: does it run?

It needs a checkout and the JAX that is installed, no installation of this package. Each section works in processes of
its own: one that dies, or takes longer than its limit, costs its row, and the rest goes on. Rows are measured in the
order of the table, the ones that matter most first; what does not fit into --seconds is named at the end.

  ms         the median of five steps after two; of decoding: of a token step, prefill included
  tok/s      real tokens of packed rows, without padding; Hugging Face's rows have none
  MFU        model FLOPs (`jaxdistill.train.flops`) by the device's bf16 peak; causal pairs within segments alone
  peak GiB   the most that was resident: of the device in JAX (`peak_bytes_in_use`), of PyTorch's tensors (allocated).
             Weights are made array by array, so that the peak is that of the step; where it is not, the row says so
  planned    what the compiler and `jaxdistill.plan.workspaces` say of the same program; what `plan` would print
  ratio      our tokens a second by Hugging Face's, in the same run; of losses Liger's ms by ours; of attention the ms
             of a whole row, by the kernel that is fastest there, by the row's: below 1 it is slower than a whole row

Training rows are 8,192 tokens in 6 segments, AdamW, bf16 products on fp32 weights (Qwen3-8B: adapters of rank 16 on a
frozen bf16 model). Hugging Face gets the same tokens, each row as one segment, for which its attention is the fastest.

Packages by section, beside JAX with its plugin:
  all            flax optax orbax-checkpoint qwix numpy pydantic PyYAML jaxtyping rich
  pipeline       the above and grain array-record pyarrow datasketch lark mpmath regex Jinja2 tenacity tensorboardX
                 py3langid tokenizers transformers safetensors torch huggingface_hub aiohttp matplotlib
  training, losses and decoding beside others: torch transformers liger-kernel
A machine without a network takes them along:
  pip download --no-deps -d wheels --python-version 3.12 --only-binary=:all: qwix pydantic pydantic-core \
      annotated-types typing-inspection jaxtyping wadler-lindig rich markdown-it-py mdurl pygments grain array-record \
      datasketch lark mpmath tenacity tensorboardX protobuf py3langid liger-kernel
  python -m pip install --no-index --no-deps --find-links wheels wheels/*
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

TINY_LIMIT = 4
"""Times a job's limit with tiny shapes, which are for slow machines."""
TOOLS = Path(__file__).resolve().parent
sys.path[:0] = [str(TOOLS), str(TOOLS.parent)]

from accelerator import table  # noqa: E402
from accelerator.common import ROW, say, short  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Job:
    """One call that measures something; it prints rows."""

    section: str
    name: str
    call: str
    """module.function of `accelerator`"""
    arguments: tuple[Any, ...] = ()
    process: str = ""
    """Jobs of one process follow each other in it; alone if empty."""
    limit: float = 120.0
    """Seconds, the start of the process included."""
    folder: bool = False
    """Whether it is given the folder of this run."""
    tiny: bool = True
    """Whether it says something with tiny shapes that the other jobs do not say."""


def training(name: str, rows: int, remat: str, base: str | None = None, *, tiny: bool = True) -> Job:
    # a process of its own: the peak of one would hide what the next one needs
    return Job("training", f"{name}, {rows} rows, {remat}", "training.ours", (name, rows, remat, base), tiny=tiny)


def hugging_face(name: str, rows: int, *, tiny: bool = True) -> Job:
    return Job("training", f"{name}, {rows} rows, HF", "training.hugging_face", (name, rows), "torch", tiny=tiny)


# what matters most comes first: the rest may find no time
JOBS = [
    Job("facts", "facts", "serving.facts", process="jax", limit=60),
    Job("pipeline", "pipeline", "serving.pipeline", limit=180, folder=True),
    training("Qwen3-0.6B", 4, "attention"),
    hugging_face("Qwen3-0.6B", 4),
    hugging_face("Qwen3-1.7B", 4, tiny=False),
    training("Qwen3-1.7B", 4, "attention", tiny=False),
    Job("decoding", "Qwen3-0.6B, 64 x 256", "serving.decode", ("Qwen3-0.6B",), "jax"),
    Job("attention", "attention", "kernels.attention", process="jax", limit=150),
    training("Qwen3-8B", 1, "full", "bfloat16"),
    Job("determinism", "train.deterministic", "serving.repeats", (True,), "jax"),
    Job("determinism", "kill + resume", "serving.resume", limit=240, folder=True, tiny=False),
    Job("losses", "cross-entropy", "kernels.losses", ("ce",), "jax"),
    Job("losses", "forward KL", "kernels.losses", ("forward_kl",), "jax"),
    Job("losses", "cross-entropy", "kernels.liger", ("ce",), "torch"),
    Job("losses", "forward KL", "kernels.liger", ("forward_kl",), "torch"),
    Job("decoding", "Qwen3-0.6B, 64 x 256, HF", "serving.hugging_face_decode", ("Qwen3-0.6B",), "torch"),
    training("Qwen3-0.6B", 4, "full", tiny=False),
    training("Qwen3-1.7B", 4, "full", tiny=False),
    Job("determinism", "default", "serving.repeats", (False,), "jax", tiny=False),
]
SECTIONS = list(dict.fromkeys(job.section for job in JOBS))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--seconds", type=float, default=470.0, help="for all of it (%(default).0f)")
    parser.add_argument("--json", type=Path, help="a file for the rows")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to see that the tool runs")
    parser.add_argument("--child", type=int, nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return child(arguments.child, arguments.folder, arguments.tiny)
    wanted = [
        i for i, job in enumerate(JOBS)
        if (not arguments.only or job.section in arguments.only) and (job.tiny or not arguments.tiny)
    ]  # fmt: skip
    begun = time.monotonic()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for row in measure(wanted, Path(folder), arguments.tiny, begun + arguments.seconds):
            print(table.line(row), flush=True)
            rows.append(row)
            if arguments.json:
                arguments.json.parent.mkdir(parents=True, exist_ok=True)
                arguments.json.write_text(json.dumps(table.with_ratios(rows), indent=1) + "\n")
    print(f"\n{time.monotonic() - begun:.0f} s")
    table.show(rows)
    return int(any("failed" in row for row in rows))


def measure(wanted: Sequence[int], folder: Path, tiny: bool, deadline: float) -> Iterator[dict[str, Any]]:
    """The rows of these jobs, as they come; a job without rows gives one that says why."""
    left = list(wanted)
    while left:
        process = process_of(JOBS[left[0]], tiny)
        same = [i for i in left if process and process_of(JOBS[i], tiny) == process]
        together = consecutive(same or left[:1], left, tiny)
        if time.monotonic() >= deadline:
            for i in left:
                yield titled(i, {"left_out": "no time was left for it; see --seconds and --only"})
            return
        seen = 0
        for i, row in run_child(together, folder, tiny, deadline):
            seen = max(seen, together.index(i) + 1)
            yield titled(i, row)
        done = together[: max(seen, 1)]
        left = [i for i in left if i not in done]


def process_of(job: Job, tiny: bool) -> str:
    """The process that a job may share; "" if it has one of its own. Tiny trainings have no peak worth telling."""
    return job.process or ("jax" if tiny and job.call == "training.ours" else "")


def consecutive(same: Sequence[int], left: Sequence[int], tiny: bool) -> list[int]:
    """Of the jobs that may share a process, those that follow each other; if tiny all, for most of it is imports."""
    if tiny:
        return list(same)
    found = [same[0]]
    for i in same[1:]:
        if left.index(i) != left.index(found[-1]) + 1:
            break
        found.append(i)
    return found


def titled(i: int, row: dict[str, Any]) -> dict[str, Any]:
    return {"section": JOBS[i].section, "name": JOBS[i].name} | row


def run_child(jobs: Sequence[int], folder: Path, tiny: bool, deadline: float) -> Iterator[tuple[int, dict[str, Any]]]:
    """Runs jobs in one process, and gives (job, row). It ends early if the process dies or a job takes too long: the
    last job that is named is the one that did, and has a row that says so."""
    command = [sys.executable, str(TOOLS / "bench_accelerator.py"), "--folder", str(folder), "--child", *map(str, jobs)]
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.93", "HF_HUB_OFFLINE": "1"} | os.environ
    if tiny:  # PyTorch's threads wait for each other, which takes very long where others want the cores
        environment["OMP_NUM_THREADS"] = "1"
        environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()
    with open(folder / "stderr", "w+") as errors:
        process = subprocess.Popen(
            command + (["--tiny"] if tiny else []), stdout=subprocess.PIPE, stderr=errors, text=True, env=environment,
            start_new_session=True,
        )  # fmt: skip
        lines: queue.Queue[str | None] = queue.Queue()
        reader = threading.Thread(target=pump, args=(process, lines), daemon=True)
        reader.start()
        current, ends = jobs[0], end_of(jobs[0], tiny, deadline)
        try:
            while True:
                line = lines.get(timeout=max(0.01, ends - time.monotonic()))
                if line is None:
                    break
                if not line.startswith(ROW):
                    continue
                row = json.loads(line.removeprefix(ROW))
                if "begins" in row:
                    current, ends = row["begins"], end_of(row["begins"], tiny, deadline)
                else:
                    yield current, row
            if process.wait() != 0:
                errors.seek(0)
                last = [text.strip() for text in errors.read().splitlines() if text.strip()][-1:]
                yield current, {"failed": f"its process died ({process.returncode}): {' '.join(last)[:300]}"}
        except queue.Empty:
            why = "--seconds were over" if time.monotonic() >= deadline else "it took longer than its limit"
            yield current, {"failed": f"stopped: {why}"}
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and the processes that it has started
            process.wait()
            reader.join()


def end_of(job: int, tiny: bool, deadline: float) -> float:
    """When a job that begins now is stopped."""
    return min(deadline, time.monotonic() + JOBS[job].limit * (TINY_LIMIT if tiny else 1))


def pump(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    assert process.stdout is not None
    with process.stdout as out:
        for line in out:
            lines.put(line)
    lines.put(None)


def child(jobs: Sequence[int], folder: Path, tiny: bool) -> int:
    """Runs jobs one after the other; one that fails says so, and the next begins."""
    for i in jobs:
        job = JOBS[i]
        say(begins=i)
        try:
            module, function = job.call.split(".")
            call = getattr(importlib.import_module(f"accelerator.{module}"), function)
            call(*((folder,) if job.folder else ()), *job.arguments, tiny)
        except Exception as error:
            traceback.print_exc()
            say(failed=short(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
