"""What a Ray worker does for `ray_engine`: it holds one engine, and answers what it is given."""

from __future__ import annotations

import dataclasses
import socket
import time
from collections.abc import Callable
from pathlib import Path

from jaxdistill import hub
from jaxdistill.config import VLLMConfig
from jaxdistill.traces.engines import Completion, Executor, Request, Sampling, Session, check_checkpoint

HOLD_SECONDS = 0.2
"""What ends meanwhile comes in one piece: the messages of many workers would otherwise keep the driver busy."""


@dataclasses.dataclass(frozen=True)
class Job:
    """What all workers of a run are told; they differ in their number alone."""

    engine: str
    executor: Executor
    sampling: Sampling
    vllm: VLLMConfig
    batch: int
    longest: int
    """The most room that a request takes."""
    log: Path | None


class EngineWorker:
    """One engine. Its methods are called one after the other; each comes back when it is done."""

    def __init__(self, job: Job, number: int):
        self._job, self._number = job, number
        self._session: Session | None = None
        self._in_flight = 0

    def where(self) -> str:
        """The machine's name: the worker has a place there."""
        return socket.gethostname()

    def start(self) -> None:
        """Loads the model.

        Raises:
          ValueError: it cannot be had here, or is another one, or the engine refuses it.
        """
        job, executor = self._job, self._job.executor
        checkpoint = hub.fetch(executor.name, executor.fetched)
        if executor.revision and (here := hub.revision_of(checkpoint)) != executor.revision:
            raise ValueError(
                f"{checkpoint} is {here} there, but {executor.revision} where the run was begun; "
                "give every node the same checkpoint."
            )
        if executor.check:
            check_checkpoint(job.engine, checkpoint)
        self._session = SESSIONS[job.engine](
            checkpoint, job.sampling, vllm=job.vllm, batch=job.batch, log=self._log(), longest=job.longest
        )

    def exchange(self, requests: list[Request]) -> list[Completion]:
        """Takes more requests; gives what has ended, for which it waits.

        Raises:
          ValueError: the engine died.
        """
        assert self._session is not None
        self._session.give(requests)
        self._in_flight += len(requests)
        found: list[Completion] = []
        begun = time.monotonic()
        while self._in_flight and (not found or time.monotonic() - begun < HOLD_SECONDS):
            more = self._session.take(HOLD_SECONDS)
            self._in_flight -= len(more)
            found += more
        return found

    def _log(self) -> Path | None:
        """Beside the run's own, where its folder can be seen from here."""
        log = self._job.log
        if log is None or not log.parent.is_dir():
            return None
        return log.with_name(f"{log.stem}-ray-{self._number}{log.suffix}")


# imported when it is used, see `engines`


def _vllm(checkpoint: Path, sampling: Sampling, **options) -> Session:
    from jaxdistill.traces import vllm_engine

    return vllm_engine.Session(checkpoint, sampling, **options)


def _jax(checkpoint: Path, sampling: Sampling, **options) -> Session:
    from jaxdistill.traces import jax_engine

    return jax_engine.Session(checkpoint, sampling, **options)


SESSIONS: dict[str, Callable[..., Session]] = {"vllm": _vllm, "jax": _jax}
