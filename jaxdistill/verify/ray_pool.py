"""`pool` and the sandbox on the workers of a Ray cluster: the same checks, made where there is room.

Every worker has one warm process of `pool` and one sandbox, with the same limits as here, and finds out for itself how
well it can isolate a program. What a worker was doing when it died is done by another one.
"""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

from jaxdistill.cluster import Cluster, Gone, Worker
from jaxdistill.config import CodeConfig
from jaxdistill.verify.code import Sandbox, check_code
from jaxdistill.verify.compare import Check
from jaxdistill.verify.pool import CHUNK, Item, Pool

POLL_SECONDS = 1.0


class Judge:
    """What a Ray worker is; its methods are called one after the other, and end with its process."""

    def __init__(self, code: CodeConfig):
        self._code = code
        self._stack = ExitStack()
        self._pool: Pool | None = None
        self._sandbox: Sandbox | None = None

    def where(self) -> str:
        """The machine's name: the worker has a place there."""
        return socket.gethostname()

    def do(self, task: str, items: Sequence[Item]) -> list[Any]:
        """See `Pool.submit`."""
        if self._pool is None:
            self._pool = self._stack.enter_context(Pool(1))
        return [found for future in self._pool.submit(task, items) for found in future.result()]

    def check(self, response: str, tests: str) -> tuple[Check, str, str]:
        """A program's check, the machine's name, and the tier of isolation that was found there.

        Raises:
          ValueError: it is too weak.
        """
        if self._sandbox is None:
            try:
                self._sandbox = self._stack.enter_context(Sandbox(isolation=self._code.isolation))
            except ValueError as error:
                raise ValueError(f"{socket.gethostname()}: {error}") from None
        return check_code(response, tests, limits=self._code.limits, sandbox=self._sandbox), *self._place()

    def _place(self) -> tuple[str, str]:
        assert self._sandbox is not None
        return socket.gethostname(), self._sandbox.tier


class RayPool:
    """Workers of a cluster in the place of a `Pool` and a sandbox; a context manager."""

    def __init__(self, cluster: Cluster, code: CodeConfig):
        self._cluster, self._code = cluster, code
        self.workers = cluster.count()
        self.tiers: dict[str, str] = {}
        """Machine -> how programs were isolated there."""
        self._idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._all: set[Worker] = set()
        self._closed = False
        self._placed, self._lodged = 0, time.monotonic()
        """Workers that have a place, and when there last was one."""
        self._lost, self._reason = 0, ""
        # a worker that waits for a place keeps a thread, so that these are apart from those with something to do
        self._places = ThreadPoolExecutor(self.workers)
        self._threads = ThreadPoolExecutor(self.workers)

    def __enter__(self) -> RayPool:
        for _ in range(self.workers):
            self._places.submit(self._add)
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._closed = True
            workers = list(self._all)
        for worker in workers:
            worker.stop()
        for threads in (self._places, self._threads):
            threads.shutdown(cancel_futures=True)

    def submit(self, task: str, items: Sequence[Item]) -> list[Future[list[Any]]]:
        """See `Pool.submit`."""
        chunks = [items[start : start + CHUNK] for start in range(0, len(items), CHUNK)]
        return [self._threads.submit(self._do, "do", task, chunk) for chunk in chunks]

    def check(self, response: str, tests: str) -> Future[Check]:
        """See `check_code`."""
        return self._threads.submit(self._check, response, tests)

    def _check(self, response: str, tests: str) -> Check:
        check, host, tier = self._do("check", response, tests)
        self.tiers[host] = tier
        return check

    def _do(self, method: str, *arguments: Any) -> Any:
        """Calls a method of whichever worker is free.

        Raises:
          ValueError: there is no worker, it refuses, or one after the other died over it.
        """
        reason = ""
        for _ in range(self._cluster.config.retries + 1):
            worker = self._take()
            try:
                found = self._cluster.result(worker.call(method, *arguments))
            except Gone as error:
                reason = str(error)
                self._drop(worker)
                with self._lock:
                    self._placed -= 1
                    self._lodged = time.monotonic()
                    if not self._closed:
                        self._places.submit(self._add)
            except BaseException:
                self._idle.put(worker)
                raise
            else:
                self._idle.put(worker)
                return found
        raise ValueError(f"{self._cluster.section}: workers die over the same traces, the last one: {reason}")

    def _take(self) -> Worker:
        """The next free worker.

        Raises:
          ValueError: there has been none for too long.
        """
        while True:
            try:
                return self._idle.get(timeout=POLL_SECONDS)
            except queue.Empty:
                with self._lock:
                    homeless = not self._placed and time.monotonic() - self._lodged > self._cluster.config.wait_s
                if self._closed or self._lost == self.workers:
                    raise ValueError(f"{self._cluster.section}: no worker is left: {self._reason}") from None
                if homeless:
                    raise ValueError(self._cluster.too_small(self.workers)) from None

    def _add(self) -> None:
        """Starts a worker, and hands it out when it has a place."""
        for _ in range(self._cluster.config.retries + 1):
            with self._lock:
                if self._closed:
                    return
                worker = self._cluster.start(Judge, self._code)
                self._all.add(worker)
            try:
                self._cluster.result(worker.call("where"))
            except Gone as error:
                self._reason = str(error)
                self._drop(worker)
                continue
            with self._lock:
                self._placed += 1
            self._idle.put(worker)
            return
        with self._lock:
            self._lost += 1

    def _drop(self, worker: Worker) -> None:
        worker.stop()  # it may be cut off and not dead
        with self._lock:
            self._all.discard(worker)
