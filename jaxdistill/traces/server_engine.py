"""The engine `server`: any number of OpenAI-compatible servers, some of our own perhaps, see `server_client`."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import tempfile
import threading
from collections.abc import Callable, Collection, Generator, Iterator
from pathlib import Path

from jaxdistill.config import ServerConfig, VLLMConfig
from jaxdistill.traces import servers
from jaxdistill.traces.engines import Completion, Request, Sampling
from jaxdistill.traces.server_client import Client
from jaxdistill.traces.servers import ManagedServer


def generate(
    checkpoint: Path,
    requests: Collection[Request],
    sampling: Sampling,
    *,
    vllm: VLLMConfig,
    batch: int,
    server: ServerConfig,
    log: Path | None,
    ready: Callable[[], None],
) -> Iterator[Completion]:
    """See `engines.generate`; `batch` is of no use here.

    Raises:
      ValueError: no server can be reached, the key or the model is refused, or a server of our own does not start.
    """
    del batch
    longest = max(request.room for request in requests)
    with contextlib.closing(Fleet(checkpoint, sampling, vllm=vllm, server=server, log=log, longest=longest)) as fleet:
        yield from fleet.ask(requests, ready)


class Fleet:
    """Servers that are asked again and again; those of our own run from the first time until `close`."""

    def __init__(
        self,
        checkpoint: Path,
        sampling: Sampling,
        *,
        vllm: VLLMConfig,
        server: ServerConfig,
        log: Path | None,
        longest: int,
    ):
        """
        Args:
          longest: the most room that a request takes.
        """
        self._config, self._sampling = server, sampling
        self._in_flight = server.in_flight or 2 * vllm.max_num_seqs
        self._stack = contextlib.ExitStack()
        self._managed: list[ManagedServer] = []
        self._asked = False
        if server.start:
            folder = log.parent if log else Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
            room = longest + sampling.max_tokens if server.api == "completions" else None
            name = log.name if log else "vllm.log"
            self._managed = servers.describe(checkpoint, server.start, vllm, room, sampling.logprobs, folder / name)
            for each in self._managed:
                self._stack.callback(each.stop)

    def ask(
        self, requests: Collection[Request], ready: Callable[[], None] = lambda: None
    ) -> Generator[Completion, None, None]:
        """Completions as they finish, in any order; see `generate`."""
        servers.allow_connections(self._in_flight * max(self._config.start, len(self._config.urls)))
        options = {"in_flight": self._in_flight, "probe": not self._asked}
        client = Client(self._config, self._managed, requests, self._sampling, ready, **options)
        self._asked = True
        with contextlib.ExitStack() as stack:
            loop = stack.enter_context(contextlib.closing(asyncio.new_event_loop()))
            # not asyncio.Runner: its KeyboardInterrupt may come up in the middle of any callback, and break the loop
            if threading.current_thread() is threading.main_thread():
                loop.add_signal_handler(signal.SIGINT, client.interrupt)
            loop.run_until_complete(client.start())
            stack.callback(lambda: loop.run_until_complete(client.stop()))
            while found := loop.run_until_complete(client.finished()):
                yield from found
            if client.interrupted:
                raise KeyboardInterrupt

    def close(self) -> None:
        self._stack.close()
