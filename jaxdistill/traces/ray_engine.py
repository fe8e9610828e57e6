"""Engines on a Ray cluster: one on each worker, all fed from here, where what they answer is made durable.

A worker has as many requests under way as keep its engine busy, and is given more whenever it gives answers back. One
that dies is replaced, and what it was working on is asked again, of whoever has room. What is in memory here is what is
in flight.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, Literal

from jaxdistill.cluster import Cluster, Gone, Worker, joined
from jaxdistill.config import VLLMConfig
from jaxdistill.progress import say
from jaxdistill.traces.engines import Completion, Executor, Request, Sampling
from jaxdistill.traces.ray_worker import EngineWorker, Job

POLL_SECONDS = 1.0
JAX_BATCHES = 4
"""Batches that a JAX engine is given at once; rows are idle only at the end of the last of them."""
SECTION = "traces.ray"


def generate(
    engine: str,
    requests: Collection[Request],
    sampling: Sampling,
    *,
    vllm: VLLMConfig,
    batch: int,
    log: Path | None,
    ready: Callable[[], None],
    executor: Executor,
) -> Iterator[Completion]:
    """See `engines.generate`.

    Raises:
      ValueError: no cluster, no place on it within `ray.wait_s`, or no worker is left that can run the engine.
    """
    longest = max(request.room for request in requests)
    job = Job(engine, executor, sampling, vllm, batch, longest, log)
    most = 2 * vllm.max_num_seqs if engine == "vllm" else JAX_BATCHES * batch
    with joined(executor.ray, SECTION) as cluster:
        fleet = Fleet(cluster, job, requests, most, ready)
        with contextlib.closing(fleet):
            yield from fleet.run()


class Seat:
    """A worker's place in the fleet; the worker in it may be replaced."""

    def __init__(self, number: int):
        self.number = number
        self.worker: Worker | None = None
        self.call: Any = None
        """What is waited for: one call at a time; None if there is nothing to do."""
        self.step: Literal["where", "start", "exchange"] = "where"
        self.host = ""
        """Empty until it has a place."""
        self.in_flight: dict[str, Request] = {}
        self.alone = False
        """Whether what is in flight is to have no company."""
        self.deaths = 0
        """Since it last answered."""


class Fleet:
    """Workers, and the requests that they share."""

    def __init__(self, cluster: Cluster, job: Job, requests: Collection[Request], most: int, ready: Callable[[], None]):
        """Args: `most` is how many requests a worker may have."""
        self._cluster, self._job, self._ready = cluster, job, ready
        self._left = len(requests)
        self._requests = iter(requests)
        self._again: deque[Request] = deque()
        self._last: deque[Request] = deque()
        """Those whose next attempt is the last, which they have alone: most have only been in bad company."""
        self._attempts: Counter[str] = Counter()
        """Of requests whose worker died."""
        self._wanted = cluster.count()
        self._seats = [Seat(number) for number in range(self._wanted)]
        self._most = max(1, min(most, -(-self._left // self._wanted)))
        self._begun = self._lodged = time.monotonic()
        """When it began, and when a worker last had a place."""
        self._told_places = self._started = False

    def run(self) -> Iterator[Completion]:
        """Every request's completion, in the order in which they come."""
        for seat in self._seats:
            self._fill(seat)
        while self._left:
            calls = {seat.call: seat for seat in self._seats if seat.call is not None}
            for call in self._cluster.wait(list(calls), POLL_SECONDS):
                yield from self._harvest(calls[call])
            self._check_places()
            for seat in self._seats:
                self._hand_out(seat)

    def close(self) -> None:
        for seat in self._seats:
            if seat.worker is not None:
                seat.worker.stop()

    def _fill(self, seat: Seat) -> None:
        """Puts a new worker into a seat."""
        seat.host, seat.step = "", "where"
        seat.worker = self._cluster.start(EngineWorker, self._job, seat.number)
        seat.call = seat.worker.call("where")

    def _harvest(self, seat: Seat) -> Iterator[Completion]:
        """Takes in what a worker's call came to, and sees to what it does next."""
        call, seat.call = seat.call, None
        assert seat.worker is not None
        try:
            found = self._cluster.result(call)
        except Gone as error:
            yield from self._replace(seat, str(error))
        except ValueError as error:
            if seat.step != "start":
                yield from self._replace(seat, str(error))
            else:  # it would not do so elsewhere or later
                self._dismiss(seat, str(error))
        else:
            match seat.step:
                case "where":
                    seat.host, seat.step = found, "start"
                    seat.call = seat.worker.call("start")
                case "start":
                    seat.step = "exchange"
                    self._say_started()
                case "exchange":
                    yield from self._take(seat, found)

    def _take(self, seat: Seat, found: list[Completion]) -> Iterator[Completion]:
        if found:
            seat.deaths = 0
        for completion in found:
            if seat.in_flight.pop(completion.id, None) is not None:
                self._attempts.pop(completion.id, None)
                self._left -= 1
                yield completion

    def _hand_out(self, seat: Seat) -> None:
        """Gives an idle worker what it has room for."""
        if seat.call is not None or seat.step != "exchange":
            return
        given: list[Request] = []
        if not seat.in_flight:
            seat.alone = bool(self._last)
            given = [self._last.popleft()] if self._last else []
        while not seat.alone and len(seat.in_flight) + len(given) < self._most:
            request = self._again.popleft() if self._again else next(self._requests, None)
            if request is None:
                break
            given.append(request)
        seat.in_flight |= {request.id: request for request in given}
        if seat.in_flight:
            assert seat.worker is not None
            seat.call = seat.worker.call("exchange", given)

    # --------------------------------------------------------------------------------------------- what goes wrong

    def _replace(self, seat: Seat, reason: str) -> Iterator[Completion]:
        """Gives up a worker: what it was working on is asked again, or has failed if that was done often enough."""
        assert seat.worker is not None
        seat.worker.stop()  # it may be cut off and not dead
        retries, lost = self._cluster.config.retries, list(seat.in_flight.values())
        # what was alone with a worker is to blame, and not the worker
        seat.deaths += not (seat.alone and lost)
        seat.in_flight, seat.alone = {}, False
        for request in lost:
            self._attempts[request.id] += 1
            attempts = self._attempts[request.id]
            if attempts <= retries:
                (self._last if attempts == retries else self._again).append(request)
                continue
            del self._attempts[request.id]
            self._left -= 1
            error = f"the worker died over it ({reason}; the last of {retries + 1} attempts)"
            yield Completion(id=request.id, output_ids=[], finish_reason="error", error=error)
        if seat.deaths > retries:
            self._dismiss(seat, reason)
            return
        say(f"  a worker{_at(seat)} died, and is replaced; {len(lost):,} samples are lost with it: {reason}")
        self._fill(seat)

    def _dismiss(self, seat: Seat, reason: str) -> None:
        """Goes on without a worker that cannot be had.

        Raises:
          ValueError: it was the last one.
        """
        assert seat.worker is not None
        seat.worker.stop()
        self._seats.remove(seat)
        if not self._seats:
            raise ValueError(f"{SECTION}: no worker is left; the last one{_at(seat)}: {reason}")
        say(f"  going on without a worker{_at(seat)}: {reason}")

    def _check_places(self) -> None:
        """Nobody waits for ever for workers that find no place; where some have one, the work begins.

        Raises:
          ValueError: none of them has had a place for too long.
        """
        now, patience = time.monotonic(), self._cluster.config.wait_s
        placed = sum(bool(seat.host) for seat in self._seats)
        if placed:
            self._lodged = now
        elif now - self._lodged > patience:
            raise ValueError(self._cluster.too_small(self._wanted))
        if placed == len(self._seats) or now - self._begun < patience or self._told_places:
            return
        self._told_places = True
        say(f"  {placed} of {self._wanted} workers have a place on the cluster; the others join when they have one")

    def _say_started(self) -> None:
        if not self._started:
            self._started = True
            self._ready()


def _at(seat: Seat) -> str:
    return f" on {seat.host}" if seat.host else ""
