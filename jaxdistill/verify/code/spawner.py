"""The sandbox's own process: starts confined programs, one job at a time, and never sees what is in them.

Started by `sandbox` with Python's standard library alone, an empty environment and a socket as standard input. A job
is one byte and one or two descriptors. For each of them a keeper is forked, which reads its part of the job there, runs
it in a confined child and answers there. So the process of a candidate descends from none that has held the tests.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import select
import signal
import socket
import sys
import time
from typing import Any

from jaxdistill.verify.code import candidate, confine, grader

# what programs use most: imported once here, not once a program
PRELOADED = """
    abc bisect collections copy dataclasses datetime decimal fractions functools hashlib heapq io itertools json math
    operator queue random re statistics string struct textwrap time traceback typing
"""
_READY, _DONE = b"+", b"."


def main() -> None:
    """Confines itself, says which layers there are, and serves jobs until standard input is closed."""
    control = socket.socket(fileno=os.dup(0))
    confined, faults = _enter()
    for name in PRELOADED.split():
        __import__(name)
    control.sendall(json.dumps({"namespaces": confined, "faults": faults}).encode() + b"\n")
    while True:
        job, descriptors, _, _ = socket.recv_fds(control, 1, 2)
        if not job:
            return
        link = socket.socketpair() if len(descriptors) == 2 else None
        keepers = []
        for i, descriptor in enumerate(descriptors):
            pid = os.fork()
            if not pid:
                _keep_and_exit(descriptor, link[i].detach() if link else None, confined)
            keepers.append(pid)
        for descriptor in descriptors:
            os.close(descriptor)
        for end in link or ():
            end.close()
        for pid in keepers:
            os.waitpid(pid, 0)
        control.sendall(_DONE)


def _enter() -> tuple[bool, list[str]]:
    """Tries the namespaces in a child first: a half-way failure would leave this process unusable."""
    pid = os.fork()
    if not pid:
        try:
            confine.enter_namespaces()
            confine.enter_own_processes(1 << 20)
        except OSError as error:
            os.write(1, str(error).encode())
            os._exit(1)
        os._exit(0)
    if os.waitpid(pid, 0)[1]:
        return False, ["namespaces"]
    confine.enter_namespaces()
    return True, []


# ------------------------------------------------------------------------------------------------- keepers


def _keep_and_exit(descriptor: int, link: int | None, confined: bool) -> None:
    try:
        confine.die_with_parent()
        _close_all_but({descriptor, link})
        with socket.socket(fileno=descriptor) as parent:
            part = json.loads(_read_all(parent))
            parent.sendall(json.dumps(_keep(part, link, confined)).encode())
        os._exit(0)
    finally:
        os._exit(1)


def _keep(part: dict[str, Any], link: int | None, confined: bool) -> dict[str, Any]:
    """Runs one part of a job in a confined child, and watches over it.

    Returns:
      `ended`: `exit`, `signal`, `wall` or `output`; `code`: exit status or signal; `cpu` and `wall` seconds;
      `output`: of its standard output; `report`: what it wrote on the report's descriptor; `faults`: missing layers.
    """
    limits = part["limits"]
    if confined:
        confine.enter_own_processes(limits["file_bytes"] + len(part["stdin"]))
    output, report = os.pipe(), os.pipe()
    start = time.monotonic()
    pid = os.fork()
    if not pid:
        _run_and_exit(part, output[1], report[1], link, confined)
    for end in (output[1], report[1], *([link] if link is not None else [])):
        os.close(end)
    caps = {output[0]: limits["output_bytes"], report[0]: 1 << 16}
    deadline = start + limits["wall_s"]
    found, why = _collect(caps, deadline, pid)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    counted = _counted_cpu(pid)
    _, status, usage = os.wait4(pid, 0)  # of process 1: all others of its namespace are gone then
    ended = why or ("exit" if os.WIFEXITED(status) else "signal")
    return {
        "ended": ended,
        "code": os.WEXITSTATUS(status) if os.WIFEXITED(status) else os.WTERMSIG(status),
        "cpu": max(counted, usage.ru_utime + usage.ru_stime),
        "wall": time.monotonic() - start,
        "output": found[output[0]].decode("utf-8", "backslashreplace"),
        "report": found[report[0]].decode("utf-8", "backslashreplace"),
    }


def _counted_cpu(pid: int) -> float:
    """Seconds of an ended child by the clock that RLIMIT_CPU is held against (CPUCLOCK_PROF of posix-timers.h).

    It counts the timer's ticks. What `wait4` gives is scaled to the time that really ran, and is far less on a virtual
    machine whose processors are taken away: a program killed by its limit would seem to have been killed by others.
    """
    try:
        return time.clock_gettime(~pid << 3)
    except OSError:  # a kernel without clocks of other processes
        return 0.0


def _collect(caps: dict[int, int], deadline: float, pid: int) -> tuple[dict[int, bytearray], str]:
    """Reads until the child has ended; kills it at the deadline, or when a descriptor gives more than its cap."""
    found = {descriptor: bytearray() for descriptor in caps}
    still = set(caps)
    pause = 0.0002
    while True:
        # a program may close its streams and go on, so the end of them is not the end of it
        ended = not still and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        if ended:
            return found, ""
        if time.monotonic() >= deadline:
            os.kill(pid, signal.SIGKILL)
            return found, "wall"
        if not still:
            time.sleep(pause)
            pause = min(2 * pause, 0.02)
            continue
        for descriptor in select.select(list(still), [], [], max(0.0, deadline - time.monotonic()))[0]:
            data = os.read(descriptor, 1 << 16)
            found[descriptor] += data
            if not data:
                still.remove(descriptor)
            elif len(found[descriptor]) > caps[descriptor]:
                os.kill(pid, signal.SIGKILL)
                return found, "output"


# ------------------------------------------------------------------------------------------ confined children


def _run_and_exit(part: dict[str, Any], output: int, report: int, link: int | None, confined: bool) -> None:
    try:
        _arrange_descriptors(part["stdin"], output, report, link, confined)
        faults = _confine(part["limits"], confined)
        os._exit(_run(part, faults))
    finally:
        os._exit(120)


def _arrange_descriptors(text: str, output: int, report: int, link: int | None, confined: bool) -> None:
    """0 input, 1 output, 2 nothing, `REPORT`, `LINK`; all others are closed."""
    if confined:
        stdin = os.open(f"{confine.TMP}/.stdin", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    else:
        stdin = os.memfd_create("stdin")
    data = text.encode("utf-8", "surrogatepass")
    while data:
        data = data[os.write(stdin, data) :]
    os.lseek(stdin, 0, os.SEEK_SET)
    nothing = os.open("/dev/null", os.O_RDWR)
    wanted = [stdin, output if link is None else nothing, nothing, report] + ([link] if link is not None else [])
    high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 100) for descriptor in wanted]  # above all targets
    for target, descriptor in enumerate(high):
        os.dup2(descriptor, target, inheritable=False)
    _close_all_but(set(range(len(wanted))))


def _confine(limits: dict[str, Any], confined: bool) -> list[str]:
    """All layers that there are; the names of those that there are not."""
    faults = []
    os.environ.clear()
    os.umask(0o077)
    if confined:
        os.chdir(confine.TMP)
    confine.set_limits(limits["memory_bytes"], limits["cpu_s"], limits["file_bytes"], limits["threads"])
    confine.die_with_parent()
    for name, apply in (
        ("landlock", lambda: confine.landlock(confine.TMP if confined else None)),
        ("capabilities", confine.drop_privileges),
        ("seccomp", confine.filter_calls),
    ):
        try:
            apply()
        except (OSError, ValueError, AttributeError):
            faults.append(name)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    return faults


def _run(part: dict[str, Any], faults: list[str]) -> int:
    random.seed(0)  # the same verdict every time
    kind = part["kind"]
    if kind == "script":
        return candidate.run_script(part["source"])
    if kind == "serve":
        return candidate.serve(part["source"], part["context"], part["entry"])
    if kind == "asserts":
        grader.report(grader.run_asserts(part["context"], part["setup"], part["tests"], part["entry"]))
        return 0
    if kind == "calls":
        grader.report(grader.run_calls(part["entry"], part["cases"]))
        return 0
    return _probe(faults)


def _probe(faults: list[str]) -> int:
    """Tries what must not work; reports the layers that do not hold."""
    outside = {
        "namespaces": os.getppid() == 0 and os.getpid() == 1 and not os.path.exists("/proc/self"),
        "landlock": "landlock" not in faults and not _works(lambda: os.listdir("/")),
        "capabilities": "capabilities" not in faults,
        "seccomp": not _works(lambda: socket.socket().close()) and not _works(_fork),
    }
    data = json.dumps({"layers": [name for name, holds in outside.items() if holds]}).encode()
    os.write(candidate.REPORT, data + b"\n")
    return 0


def _works(action: Any) -> bool:
    try:
        action()
    except OSError:
        return False
    return True


def _fork() -> None:
    if not os.fork():
        os._exit(0)


def _close_all_but(kept: set[int | None]) -> None:
    start = 0
    for descriptor in sorted(d for d in kept if d is not None):
        if start < descriptor:  # an empty range that starts at 0 would close everything
            os.closerange(start, descriptor)
        start = descriptor + 1
    os.closerange(start, 1 << 16)


def _read_all(connection: socket.socket) -> bytes:
    chunks = []
    while chunk := connection.recv(1 << 20):
        chunks.append(chunk)
    return b"".join(chunks)


if __name__ == "__main__":
    sys.exit("started by jaxdistill.verify.code.sandbox")
