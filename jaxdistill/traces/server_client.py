"""The client of OpenAI-compatible servers: one asyncio loop that keeps any number of them busy.

Every server has as many slots as it may have requests in flight; whoever holds a slot asks that server. A failed
attempt is repeated, at whichever server has a slot then. A server that cannot be reached keeps its slots until it is
back, and costs no request an attempt; one of our own that has died is started again. One that limits its rate gets its
slot back when it wants the next request. The loop runs only while the caller waits for the next completion, so that
what is in memory is what is in flight.

A failure is given only when a later request was answered, or at the end: where all fail, the run stops with what the
server says, and nobody has noted as failed what should be asked again.
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
    wait_exponential,
    wait_random,
)

from jaxdistill.config import ServerConfig
from jaxdistill.progress import say
from jaxdistill.traces import engines
from jaxdistill.traces.engines import Completion, Request, Sampling
from jaxdistill.traces.replies import PATHS, make_body, read_completion
from jaxdistill.traces.server_errors import PROBES, Failed, Refused, Tally, advice, check_status
from jaxdistill.traces.server_models import UNLISTED, Server, choose_model, read_models, speaks_vllm
from jaxdistill.traces.servers import ManagedServer

LONGEST_WAIT = 60.0
"""Seconds between two attempts at a request, at most."""
POLL_SECONDS = 0.5
"""Between two looks at a server that is not up."""
CONNECT_SECONDS = 10.0
PROBE_SECONDS = 2.0
"""How long all but the first requests wait for the first answer; a server that refuses them all does so at once."""


def _error_of(state: RetryCallState) -> BaseException | None:
    return state.outcome.exception() if state.outcome else None


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
        probe: bool = True,
    ):
        """
        Args:
          probe: a few requests go first, see `PROBE_SECONDS`.
        """
        self.config, self.sampling, self.requests, self.ready = config, sampling, requests, ready
        self.servers = [Server(each.url, in_flight, each) for each in managed]
        self.servers += [Server(url, in_flight) for url in config.urls]
        self.key = os.environ.get(config.api_key_env)
        # requests that wait for their next attempt hold no slot, hence twice as many workers as slots
        self.width = min(len(requests), 2 * in_flight * len(self.servers))
        self.left = self.unfinished = len(requests)
        self.interrupted = False
        self.tally, self.probe = Tally(self.width), probe
        self.held: list[Completion] = []
        """Failures that nothing was answered after yet."""
        self.models: list[str] = []

    async def start(self) -> None:
        self.slots: asyncio.Queue[Server] = asyncio.Queue()
        self.results: asyncio.Queue[Completion | Exception | None] = asyncio.Queue()
        self.session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=self.config.timeout_s, sock_connect=CONNECT_SECONDS),
            headers={"Authorization": f"Bearer {self.key}"} if self.key else {},
        )
        waiting = enumerate(self.requests)
        self.begun = False
        self.gate = asyncio.Event()
        if not self.probe:
            self.gate.set()
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

    async def _work(self, waiting: Iterator[tuple[int, Request]]) -> None:
        for number, request in waiting:
            if number >= PROBES:
                await self.gate.wait()
            self._give(await self._complete(request))

    def _give(self, completion: Completion) -> None:
        self.unfinished -= 1
        if completion.error is None:
            self.tally.answer()
            self.gate.set()
        else:
            self.held.append(completion)
        if completion.error is None or not self.unfinished:
            for each in self.held:
                self.results.put_nowait(each)
            self.held = []
        if completion.error is None:
            self.results.put_nowait(completion)

    async def _open_gate(self) -> None:
        await asyncio.sleep(PROBE_SECONDS)
        self.gate.set()

    # ------------------------------------------------------------------------------------------------- one request

    async def _complete(self, request: Request) -> Completion:
        """The completion of a request, or the failure of its last attempt.

        Raises:
          Refused: it is not this request alone that fails.
        """
        begun = time.monotonic()
        attempts = limited = 0
        self.tally.asked += 1

        def is_over(state: RetryCallState) -> bool:
            if isinstance(error := _error_of(state), Failed) and error.limited:
                return time.monotonic() - begun > self.config.patience_s
            return attempts - limited > self.config.retries

        retrying = AsyncRetrying(
            stop=is_over,
            wait=self._wait,
            retry=retry_if_exception(lambda error: isinstance(error, Failed) and error.retry),
            reraise=True,
        )
        try:
            async for attempt in retrying:
                with attempt:
                    attempts += 1
                    return await self._attempt(request)
                limited += isinstance(error := _error_of(attempt.retry_state), Failed) and error.limited
        except Failed as error:
            self._judge(error)
            reason = str(error) if attempts == 1 else f"{error} (the last of {attempts} attempts)"
            return Completion(id=request.id, output_ids=[], finish_reason="error", error=self._without_key(reason))
        raise AssertionError("tenacity gives a result or an error")

    def _judge(self, error: Failed) -> None:
        """Ends the run if it is not this request alone that fails."""
        if not error.of_all:
            self.gate.set()
        if stop := self.tally.fail(error):
            todo = advice(str(error), self.config, self.models) if error.of_all else "see to the server"
            raise Refused(self._without_key(f"{stop}; {todo}. The same command asks again."))

    def _wait(self, state: RetryCallState) -> float:
        error = _error_of(state)
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
            pause = 0.0
            try:
                return await self._ask(server, request)
            except (
                aiohttp.ClientConnectorError,
                aiohttp.ConnectionTimeoutError,
            ):  # never delivered, so not this request's fault
                self._lose(server)
            except Failed as error:
                if error.limited:  # what waits is the slot, or the next request would be one too many as well
                    pause = self.config.backoff_s if error.wait_s is None else error.wait_s
                raise
            finally:
                if pause:
                    asyncio.get_running_loop().call_later(pause, self._give_back, server)
                else:
                    self._give_back(server)

    def _give_back(self, server: Server) -> None:
        """A slot."""
        if server.up:
            self.slots.put_nowait(server)
        else:
            server.parked += 1

    async def _ask(self, server: Server, request: Request) -> Completion:
        body = make_body(request, self.sampling, server.model, self.config, vllm=server.vllm)
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
        try:
            check_status(reply.status, reply.headers, data, url)
            return read_completion(data, request, self.sampling, self.config.api, url)
        except Refused as refused:
            raise self._explained(refused) from None

    def _explained(self, refused: Refused) -> Refused:
        """With what only the client knows: whether there was a key, and which models there are."""
        more = ""
        if "server.api_key_env" in str(refused) and not self.key:
            more = f" {self.config.api_key_env} is not set."
        elif "server.model" in str(refused) and self.models:
            more = f" The server lists {', '.join(self.models[:8])}."
        return Refused(self._without_key(str(refused)) + more)

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
            self.tasks.append(asyncio.create_task(self._open_gate()))

    async def _is_up(self, server: Server) -> bool:
        """Asks for the models that a server has.

        Raises:
          ValueError: it refuses the key, has not our model, or too small a context.
        """
        timeout = aiohttp.ClientTimeout(total=CONNECT_SECONDS)
        url = f"{server.url}/models"
        try:
            async with self.session.get(url, timeout=timeout) as reply:
                data = await reply.read()
            if reply.status in UNLISTED and self.config.model is not None:  # it need not tell; requests will
                server.model, server.vllm = self.config.model, server.vllm or self.config.dialect == "vllm"
                return True
            check_status(reply.status, reply.headers, data, server.url)
            models = read_models(data)
        except (aiohttp.ClientError, TimeoutError) as error:
            self._say_once(server, str(error) or type(error).__name__)
            return False
        except Failed as error:
            if not error.retry:
                raise Refused(f"{url}: {error}; see server.urls.") from None
            self._say_once(server, str(error))
            return False
        except Refused as refused:
            raise self._explained(refused) from None
        if models is None:
            raise Refused(f"{url}: not the answer of an OpenAI-compatible server; see server.urls.")
        self.models = list(models)
        server.model = choose_model(self.models, self.config.model, server.url)
        server.vllm = server.vllm or speaks_vllm(models[server.model], self.config)
        if self.sampling.logprobs and not server.vllm:  # they come with token ids from vLLM alone
            raise Refused(
                f"{server.url}: logprobs need vLLM's server, and the list of models does not say that it is one; set "
                "server.dialect: vllm if it is, or traces.logprobs: 0."
            )
        if self.config.api == "completions" and not self.begun:
            context = models[server.model].get("max_model_len")
            engines.check_context(self.requests, self.sampling.max_tokens, context if type(context) is int else None)
        return True

    def _say_once(self, server: Server, why: str) -> None:
        """What a server that we wait for is missing; one of our own takes its time to start."""
        if server.managed is None and server.said != why:
            server.said = why
            say(f"  {server.url} is not there yet ({self._without_key(why)}); waiting for it")

    def _check_patience(self) -> None:
        """Ends the run when nothing has been reachable for too long; it goes on when it is started again."""
        now, patience = time.monotonic(), self.config.patience_s
        if all(not each.up and now - each.down_since > patience for each in self.servers):
            urls = ", ".join(each.url for each in self.servers)
            raise ValueError(f"no server could be reached for {patience:g} s ({urls}); start one, then run this again.")
