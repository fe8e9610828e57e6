"""Judges many answers on several processors, in warm processes that may be killed.

Every pair has the same processor time and memory, whatever else the machine does; the wall clock is only the last
resort. A process that runs out of either is killed and replaced, and the pair that did it is undecided. Pairs and
checks travel as lines of JSON, so that nothing a process has read can run code in its parent. The same processes
compare two answers, extract them, and measure the quality of a text.
"""

from __future__ import annotations

import json
import os
import queue
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from jaxdistill.config import FiltersConfig
from jaxdistill.verify.answers import check_math, compare_math
from jaxdistill.verify.compare import Check
from jaxdistill.verify.extract import extract_answer

CPU_SECONDS = 2
"""Of processor time for one pair; a usual one takes a thousandth."""
MEMORY_MIB = 512
"""Of address space for one process."""
CHUNK = 64
"""Pairs that a process is sent at once."""
WALL_SECONDS = 300
"""After which a process that has not answered is killed, whether it computes or not."""
GAVE_UP = Check("undecided", None, "out of time or memory", "")

Pair = tuple[str, str] | tuple[str, str, str]
"""(response, gold answer), or these and the problem's text, see `check_math`."""
Item = Sequence[Any]
"""The arguments of a task, as JSON can hold them."""


def check_math_many(pairs: Iterable[Pair], *, workers: int | None = None) -> list[Check]:
    """`check_math` for every pair, in order, each bounded in processor time and memory.

    Args:
      pairs: (response, gold answer), or these and the problem's text.
      workers: processes; as many as there are processors if absent.
    Returns:
      one check a pair; a pair that ran out of time or memory is undecided.
    Raises:
      ValueError: `workers` is not positive.
    """
    todo = list(pairs)
    if workers is None:
        workers = max(1, min(len(os.sched_getaffinity(0)), len(todo) // CHUNK))
    with MathPool(workers) as pool:
        return pool.check(todo)


P = TypeVar("P", bound="Pool")


class Pool:
    """Warm processes for the `TASKS`, to be used as a context; a process takes half a second to start."""

    def __init__(self, workers: int, *, cpu_seconds: int = CPU_SECONDS, memory_mib: int = MEMORY_MIB) -> None:
        """Starts nothing yet.

        Args:
          workers: processes, each with `cpu_seconds` of processor time for one item; `memory_mib` of address space for
            a process.

        Raises:
          ValueError: one of them is not positive.
        """
        if min(workers, cpu_seconds, memory_mib) < 1:
            raise ValueError(
                f"workers={workers}, cpu_seconds={cpu_seconds}, memory_mib={memory_mib}: set at least 1 of each."
            )
        self._idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        self._all = [_Process(cpu_seconds, memory_mib) for _ in range(workers)]
        for process in self._all:
            self._idle.put(process)
        self._threads = ThreadPoolExecutor(workers)

    def __enter__(self: P) -> P:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)
        for process in self._all:
            process.stop()

    def submit(self, task: str, items: Sequence[Item]) -> list[Future[list[Any]]]:
        """One result an item, in order, chunk by chunk; None for an item that ran out of time or memory."""
        chunks = [items[start : start + CHUNK] for start in range(0, len(items), CHUNK)]
        return [self._threads.submit(self._do, task, chunk) for chunk in chunks]

    def _do(self, task: str, chunk: Sequence[Item]) -> list[Any]:
        process = self._idle.get()
        try:
            results = process.ask(task, chunk)
            if results is not None:
                return results
            # one of them killed the process: each alone, so that no other pays for it
            return [found[0] if (found := process.ask(task, [item])) else None for item in chunk]
        finally:
            self._idle.put(process)


class MathPool(Pool):
    """Warm processes for `check_math`."""

    def check(self, pairs: Sequence[Pair]) -> list[Check]:
        """One check a pair, in order."""
        return [to_check(found) for future in self.submit("check", pairs) for found in future.result()]


def to_check(found: dict[str, Any] | None) -> Check:
    """The check that a process sent."""
    return GAVE_UP if found is None else Check(**found)


class _Process:
    """One process, started when it is asked and replaced when it has died."""

    def __init__(self, cpu_seconds: int, memory_mib: int) -> None:
        self._limits = (cpu_seconds, memory_mib)
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, task: str, items: Sequence[Item]) -> list[Any] | None:
        """Their results; None if the process died over them."""
        process = self._process or self._start()
        assert process.stdin and process.stdout
        watch = threading.Timer(WALL_SECONDS, process.kill)
        watch.start()
        try:
            process.stdin.write(json.dumps([task, items]).encode() + b"\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = b""
        finally:
            watch.cancel()
        if not answer.endswith(b"\n"):
            self.stop()
            return None
        return json.loads(answer)

    def _start(self) -> subprocess.Popen[bytes]:
        root = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        environment = os.environ | {"PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"}
        command = [sys.executable, "-c", f"from {__name__} import serve; serve{self._limits}"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
        )
        return self._process

    def stop(self) -> None:
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue  # what was written to a dead process is lost with it
        self._process = None


# ------------------------------------------------------------------------------------------- in the process


def serve(cpu_seconds: int, memory_mib: int) -> None:
    """Answers lines of a task and its items with lines of results, until there are no more."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_mib << 20, memory_mib << 20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin.buffer:
        task, items = json.loads(line)
        results = [_bounded(TASKS[task], item, cpu_seconds=cpu_seconds) for item in items]
        sys.stdout.write(json.dumps(results) + "\n")
        sys.stdout.flush()


def _bounded(task: Callable[..., Any], item: Item, *, cpu_seconds: int) -> Any:
    used = resource.getrusage(resource.RUSAGE_SELF)
    # the kernel kills the process at this limit, also inside one long operation
    limit = int(used.ru_utime + used.ru_stime) + 1 + cpu_seconds
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
    try:
        return task(*item)
    except (MemoryError, RecursionError):
        return None


def _check(response: str, gold: str, problem: str | None = None) -> dict[str, str | None]:
    return asdict(check_math(response, gold, problem=problem))


def _compare(answer: str, gold: str) -> dict[str, str | None]:
    return asdict(compare_math(answer, gold))


def _extract(response: str) -> list[str | None]:
    """The final answer, and the reason if there is none."""
    found = extract_answer(response)
    return [found.answer, found.reason]


def _measure(response: str, prompt: str, filters: dict[str, Any], with_signature: bool) -> dict[str, Any]:
    from jaxdistill.verify.measuring import measure

    return measure(response, prompt, FiltersConfig(**filters), with_signature=with_signature)


TASKS: dict[str, Callable[..., Any]] = {
    "check": _check,
    "compare": _compare,
    "extract": _extract,
    "measure": _measure,
}
"""What a process can be asked for, by name, and one item's work."""
