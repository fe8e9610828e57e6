"""The parent's side of the sandbox: starts and probes spawners, gives them jobs, and outlives all of them.

A spawner is a process of its own (`spawner`), so nothing is forked from a process with threads, and what hangs or dies
is killed and replaced. Jobs and answers are JSON over private sockets; nothing is ever unpickled or evaluated here.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

from jaxdistill.config import CodeLimitsConfig

Tier = Literal["full", "namespaces", "filters", "limits"]
TIERS: dict[Tier, set[str]] = {
    "full": {"namespaces", "capabilities", "seccomp", "landlock"},
    "namespaces": {"namespaces", "capabilities", "seccomp"},
    "filters": {"capabilities", "seccomp", "landlock"},
    "limits": set(),
}
"""Tiers of isolation, strongest first, and the layers that each has; every one has limits of memory and time.

`namespaces`: a private read-only root, no network, no other process in sight. `filters`: the system's files can be read
where Landlock allows it (Python's and the system's libraries), nothing written. `limits`: a program can do all that its
user can, and is only stopped when it takes too long.
"""

_START_S, _GRACE_S = 60.0, 20.0  # a spawner's start, and what a job may take beyond its limit, on a busy machine
_BOOT = """
import sys, types
for name in ("jaxdistill", "jaxdistill.verify", "jaxdistill.verify.code"):
    module = sys.modules[name] = types.ModuleType(name)
    module.__path__ = [sys.argv[1]] if name.endswith("code") else []
from jaxdistill.verify.code import spawner
spawner.main()
"""  # our packages without their __init__, which would import much that has no place in there


class SandboxError(Exception):
    """A job came to no result for reasons of our own; the spawner has been replaced."""


class Sandbox:
    """So many programs at a time, each confined; a context manager, safe to be used from several threads.

        with Sandbox(workers=2) as sandbox:
            check_code(response, tests, sandbox=sandbox)

    Args:
      workers: jobs at a time.
      isolation: the weakest tier that is accepted.
    Raises:
      ValueError: on entering, if this machine allows only a weaker tier.
    """

    def __init__(self, *, workers: int = 1, isolation: Tier = "namespaces") -> None:
        self.tier: Tier = "limits"
        """What was found by trying, when the sandbox was entered."""
        self.layers: list[str] = []
        self._isolation = isolation
        self._workers = workers
        self._free: queue.LifoQueue[_Spawner] = queue.LifoQueue()

    def __enter__(self) -> Sandbox:
        for _ in range(self._workers):
            self._free.put(_Spawner())
        try:
            self._probe()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        while not self._free.empty():
            self._free.get_nowait().stop()

    def run(self, parts: list[dict[str, Any]], wall_s: float) -> list[dict[str, Any]]:
        """Runs the one or two parts of a job at the same time, and returns what became of each.

        Raises:
          SandboxError: no answer in `wall_s` and some grace, or a spawner that died.
        """
        spawner = self._free.get()
        try:
            return spawner.run(parts, wall_s)
        finally:
            self._free.put(spawner)

    def _probe(self) -> None:
        try:
            found = self.run([{"kind": "probe", "stdin": "", "limits": limits_of(CodeLimitsConfig())}], 30)[0]
            self.layers = json.loads(found["report"])["layers"]
        except (SandboxError, ValueError, OSError) as error:
            raise ValueError(f"the sandbox for programs does not start ({error}); it needs Linux.") from None
        self.tier = next(tier for tier, layers in TIERS.items() if layers <= set(self.layers))
        if list(TIERS).index(self.tier) > list(TIERS).index(self._isolation):
            missing = ", ".join(sorted(TIERS[self._isolation] - set(self.layers)))
            raise ValueError(
                f"programs can be isolated here only by {self.tier!r} ({missing} cannot be had); allow user namespaces "
                f"and seccomp (in a container: its profile), or set verify.code.isolation: {self.tier}."
            )


def limits_of(limits: CodeLimitsConfig) -> dict[str, Any]:
    """Limits as a spawner takes them."""
    return {
        "cpu_s": limits.cpu_s,
        "wall_s": limits.wall_s,
        "memory_bytes": limits.memory_mib << 20,
        "output_bytes": limits.output_mib << 20,
        "file_bytes": limits.tmp_mib << 20,
        "threads": limits.threads,
    }


class _Spawner:
    """One spawner process, started when it is first needed, and again after it was killed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    def run(self, parts: list[dict[str, Any]], wall_s: float) -> list[dict[str, Any]]:
        try:
            control = self._control or self._start()
            return self._run(control, parts, time.monotonic() + wall_s + _GRACE_S)
        except BaseException as error:
            self.stop()
            if isinstance(error, OSError | ValueError):
                raise SandboxError(str(error) or type(error).__name__) from error
            raise

    def _start(self) -> socket.socket:
        self._control, theirs = socket.socketpair()
        with theirs:
            # no environment: a library path may be what Python itself needs; a fixed hash seed repeats verdicts
            environment = {"PYTHONHASHSEED": "0"}
            environment |= {k: os.environ[k] for k in ("LD_LIBRARY_PATH",) if k in os.environ}
            self._process = subprocess.Popen(
                [sys.executable, "-s", "-S", "-P", "-c", _BOOT, str(Path(__file__).parent)],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env=environment,
                start_new_session=True,
            )
        self._control.settimeout(_START_S)
        hello = b""
        while not hello.endswith(b"\n"):
            chunk = self._control.recv(4096)
            if not chunk:
                raise OSError("its process ended at once")
            hello += chunk
        return self._control

    def _run(self, control: socket.socket, parts: list[dict[str, Any]], deadline: float) -> list[dict[str, Any]]:
        pairs = [socket.socketpair() for _ in parts]
        try:
            control.settimeout(_GRACE_S)
            socket.send_fds(control, [b"J"], [theirs.fileno() for _, theirs in pairs])
            for (ours, theirs), part in zip(pairs, parts, strict=True):
                theirs.close()
                ours.settimeout(max(1.0, deadline - time.monotonic()))
                ours.sendall(json.dumps(part).encode())
                ours.shutdown(socket.SHUT_WR)
            found = _receive([ours for ours, _ in pairs], deadline)
            if control.recv(1) != b".":
                raise OSError("the spawner died")
            return [json.loads(text) for text in found]
        finally:
            for pair in pairs:
                for end in pair:
                    end.close()

    def stop(self) -> None:
        """Kills the spawner, its keepers and their programs; a later job starts a new one."""
        if self._control:
            self._control.close()
        if self._process:
            with contextlib.suppress(ProcessLookupError):  # it may be gone already
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._process = self._control = None


def _receive(connections: list[socket.socket], deadline: float) -> list[bytes]:
    """Everything that comes over the connections until they are closed."""
    found = {connection: bytearray() for connection in connections}
    still = set(connections)
    while still:
        ready = select.select(list(still), [], [], max(0.0, deadline - time.monotonic()))[0]
        if not ready:
            raise TimeoutError("no answer in time")
        for connection in ready:
            chunk = connection.recv(1 << 20)
            found[connection] += chunk
            if not chunk:
                still.remove(connection)
    return [bytes(found[connection]) for connection in connections]
