"""The client of OpenAI-compatible servers: one asyncio loop that keeps any number of them busy.

Every server has as many slots as it may have requests in flight; whoever holds a slot asks that server. A failed
attempt is repeated, at whichever server has a slot then. A server that cannot be reached keeps its slots until it is
back, and costs no request an attempt; one of our own that has died is started again. The loop runs only while the
caller waits for the next completion, so that what is in memory is what is in flight.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Collection, Iterator

import aiohttp
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception,
    stop_after_attempt,
    wait_exponential,
    wait_random,
)

from jaxdistill.config import ServerConfig
from jaxdistill.progress import say
from jaxdistill.traces import engines
from jaxdistill.traces.engines import Completion, Request, Sampling
from jaxdistill.traces.replies import PATHS, Failed, Refused, check_status, make_body, read_completion
from jaxdistill.traces.servers import ManagedServer

LONGEST_WAIT = 60.0
"""Seconds between two attempts at a request, at most."""
POLL_SECONDS = 0.5
"""Between two looks at a server that is not up."""
CONNECT_SECONDS = 10.0


class Server:
    """One server, as the client knows it."""

    def __init__(self, url: str, slots: int, managed: ManagedServer | None = None):
        self.url, self.managed = url.rstrip("/"), managed
        self.up, self.parked = False, slots
        """Slots are parked while the server is not up."""
        self.model = ""
        self.down_since = time.monotonic()


class Client:
    """Works through requests; `finished` gives completions as they come, and nothing after the last one."""

    def __init__(
        self,
        config: ServerConfig,
        managed: list[ManagedServer],
        requests: Collection[Request],
        sampling: Sampling,
        ready: Callable[[], None],
        *,
        in_flight: int,
    ):
        self.config, self.sampling, self.requests, self.ready = config, sampling, requests, ready
        self.servers = [Server(each.url, in_flight, each) for each in managed]
        self.servers += [Server(url, in_flight) for url in config.urls]
        self.key = os.environ.get(config.api_key_env)
        # requests that wait for their next attempt hold no slot, hence twice as many workers as slots
        self.width = min(len(requests), 2 * in_flight * len(self.servers))
        self.left = len(requests)
        self.interrupted = False

    async def start(self) -> None:
        self.slots: asyncio.Queue[Server] = asyncio.Queue()
        self.results: asyncio.Queue[Completion | Exception | None] = asyncio.Queue()
        self.session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=self.config.timeout_s, sock_connect=CONNECT_SECONDS),
            headers={"Authorization": f"Bearer {self.key}"} if self.key else {},
        )
        waiting = iter(self.requests)
        self.begun = False
        self.tasks = [asyncio.create_task(self._guard(self._revive(each))) for each in self.servers]
        self.tasks += [asyncio.create_task(self._guard(self._work(waiting))) for _ in range(self.width)]

    async def stop(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await self.session.close()

    def interrupt(self) -> None:
        """Lets `finished` give nothing more; what has come in until now it still gives."""
        self.interrupted = True
        self.results.put_nowait(None)

    async def finished(self) -> list[Completion]:
        """The next completions, at least one; none if all have been given, or after `interrupt`."""
        if not self.left or self.interrupted:
            return []
        found = [await self.results.get()]
        while not self.results.empty():
            found.append(self.results.get_nowait())
        completions = [each for each in found if isinstance(each, Completion)]
        for error in (each for each in found if isinstance(each, Exception)):
            if not completions:
                raise error
            self.results.put_nowait(error)  # next time: what has come in first
        self.left -= len(completions)
        return completions

    async def _guard(self, work) -> None:
        """What ends a task ends the run."""
        try:
            await work
        except Exception as error:
            self.results.put_nowait(error)

    async def _work(self, waiting: Iterator[Request]) -> None:
        for request in waiting:
            self.results.put_nowait(await self._complete(request))

    # ------------------------------------------------------------------------------------------------- one request

    async def _complete(self, request: Request) -> Completion:
        """The completion of a request, or the failure of its last attempt."""
        attempts = 0
        retrying = AsyncRetrying(
            stop=stop_after_attempt(self.config.retries + 1),
            wait=self._wait,
            retry=retry_if_exception(lambda error: isinstance(error, Failed) and error.retry),
            reraise=True,
        )
        try:
            async for attempt in retrying:
                with attempt:
                    attempts += 1
                    return await self._attempt(request)
        except Failed as error:
            reason = str(error) if attempts == 1 else f"{error} (the last of {attempts} attempts)"
            return Completion(id=request.id, output_ids=[], finish_reason="error", error=self._without_key(reason))
        raise AssertionError("tenacity gives a result or an error")

    def _wait(self, state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        if isinstance(error, Failed) and error.wait_s is not None:
            return error.wait_s
        backoff = self.config.backoff_s
        return (wait_exponential(multiplier=backoff, max=LONGEST_WAIT) + wait_random(0, backoff))(state)

    async def _attempt(self, request: Request) -> Completion:
        while True:
            server = await self.slots.get()
            if not server.up:
                server.parked += 1
                continue
            try:
                return await self._ask(server, request)
            except (
                aiohttp.ClientConnectorError,
                aiohttp.ConnectionTimeoutError,
            ):  # never delivered, so not this request's fault
                self._lose(server)
            finally:
                if server.up:
                    self.slots.put_nowait(server)
                else:
                    server.parked += 1

    async def _ask(self, server: Server, request: Request) -> Completion:
        body = make_body(request, self.sampling, server.model, self.config.api)
        url = server.url + PATHS[self.config.api]
        try:
            async with self.session.post(url, json=body) as reply:
                data = await reply.read()
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError):
            raise
        except TimeoutError:
            raise Failed(f"no answer within {self.config.timeout_s:g} s") from None
        except aiohttp.ClientError as error:
            raise Failed(f"the connection was lost ({type(error).__name__})") from None
        check_status(reply.status, reply.headers, data, url)
        return read_completion(data, request, self.sampling, self.config.api)

    def _without_key(self, text: str) -> str:
        return text.replace(self.key, "***") if self.key else text

    # ------------------------------------------------------------------------------------------------- the servers

    def _lose(self, server: Server) -> None:
        """Takes a server out until it can be reached again."""
        if not server.up:
            return
        server.up, server.down_since = False, time.monotonic()
        say(f"  {server.url} cannot be reached; waiting for it")
        self.tasks.append(asyncio.create_task(self._guard(self._revive(server))))

    async def _revive(self, server: Server) -> None:
        """Waits until a server is up, then lets requests go to it."""
        while True:
            if server.managed is not None:
                server.managed.keep_running()
            if await self._is_up(server):
                break
            self._check_patience()
            await asyncio.sleep(POLL_SECONDS)
        if server.managed is not None:
            server.managed.served = True
        server.up = True
        for _ in range(server.parked):
            self.slots.put_nowait(server)
        server.parked = 0
        if not self.begun:
            self.begun = True
            self.ready()

    async def _is_up(self, server: Server) -> bool:
        """Asks for the models that a server has.

        Raises:
          ValueError: it refuses the key, has not our model, or too small a context.
        """
        timeout = aiohttp.ClientTimeout(total=CONNECT_SECONDS)
        try:
            async with self.session.get(f"{server.url}/models", timeout=timeout) as reply:
                data = await reply.read()
                check_status(reply.status, reply.headers, data, server.url)
                models = (await reply.json(content_type=None))["data"]
                names = {model["id"]: model.get("max_model_len") for model in models}
        except (aiohttp.ClientError, TimeoutError, Failed):
            return False
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, Refused):
                raise
            raise Refused(
                f"{server.url}/models: not the answer of an OpenAI-compatible server; see server.urls."
            ) from None
        server.model = self._choose(server, list(names))
        if self.config.api == "completions" and not self.begun:
            engines.check_context(self.requests, self.sampling.max_tokens, names[server.model])
        return True

    def _choose(self, server: Server, names: list[str]) -> str:
        wanted = self.config.model
        if wanted is None and len(names) == 1:
            return names[0]
        if wanted not in names:
            what = "several models" if wanted is None else f"no model {wanted!r}"
            raise Refused(f"{server.url} serves {what} ({', '.join(names[:5])}); name one of these in server.model.")
        return wanted

    def _check_patience(self) -> None:
        """Ends the run when nothing has been reachable for too long; it goes on when it is started again."""
        now, patience = time.monotonic(), self.config.patience_s
        if all(not each.up and now - each.down_since > patience for each in self.servers):
            urls = ", ".join(each.url for each in self.servers)
            raise ValueError(f"no server could be reached for {patience:g} s ({urls}); start one, then run this again.")
