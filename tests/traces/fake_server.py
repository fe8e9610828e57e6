"""An OpenAI-compatible server without a model: answers are a function of prompt and seed, faults are on demand.

python tests/traces/fake_server.py PORT [SECONDS]      a well-behaved one, which takes SECONDS for each answer
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import sys
import threading
from collections import Counter
from typing import Any

from aiohttp import web

MODEL, CONTEXT = "fake", 256


def answer(prompt: list[int], seed: int | None, stop: int) -> list[int]:
    """The tokens that this server "samples": 3 to 30, the stop token last."""
    rng = random.Random(hashlib.sha256(json.dumps([prompt, seed]).encode()).digest())
    return [*rng.choices(range(10, 400), k=rng.randint(2, 29)), stop]


def reply_to(body: dict[str, Any]) -> dict[str, Any]:
    """vLLM's reply to a request for a completion, so far as it is looked at."""
    if k := body.get("prompt_logprobs"):
        return _scored(body["prompt"], k)
    ids = answer(body["prompt"], body.get("seed"), body["stop_token_ids"][0])
    choice: dict[str, Any] = {"index": 0, "text": "words", "finish_reason": "stop", "token_ids": ids}
    choice["prompt_token_ids"] = body["prompt"]
    if len(ids) > body["max_tokens"]:
        choice |= {"token_ids": ids[: body["max_tokens"]], "finish_reason": "length"}
    if k := body.get("logprobs"):
        rows = [{f"token_id:{token + n}": -1.0 - n for n in range(k)} for token in choice["token_ids"]]
        choice["logprobs"] = {"top_logprobs": rows, "token_logprobs": [-1.0] * len(rows)}
    return {"choices": [choice], "usage": {"completion_tokens": len(choice["token_ids"])}}


def _scored(prompt: list[int], k: int) -> dict[str, Any]:
    """Each token of the prompt with a logprob of its own, and k likelier ones."""
    rows: list[dict[str, Any] | None] = [
        {
            str(token): {"logprob": -token / 10 - 1, "rank": k + 1, "decoded_token": "x"},
            **{str(token + n): {"logprob": -n / 10, "rank": n, "decoded_token": "x"} for n in range(1, k + 1)},
        }
        for token in prompt
    ]
    choice = {"index": 0, "text": "w", "finish_reason": "length", "token_ids": [9], "prompt_token_ids": prompt}
    return {"choices": [choice | {"prompt_logprobs": [None, *rows[1:]]}], "usage": {"completion_tokens": 1}}


def chat_reply_to(body: dict[str, Any]) -> dict[str, Any]:
    """The reply of a chat server that has a reasoning parser and tells no token ids."""
    question = body["messages"][-1]["content"]
    message = {"role": "assistant", "reasoning_content": f"Thinking of {question}", "content": "It is \\boxed{1}."}
    return {"choices": [{"message": message, "finish_reason": "stop"}], "usage": {"completion_tokens": 7}}


class FakeServer:
    """The server in a thread of its own; as a context manager it gives itself.

    Args:
      faults: seed, or the first token of what is to be scored -> (a key of `FAULTS`, how many times); that request is
        treated so, so many times.
      key: an API key that is required.
    """

    def __init__(self, faults: dict[int, tuple[str, int]] | None = None, *, key: str = "", models=(MODEL,), delay=0.0):
        self.faults, self.key, self.models, self.delay = faults or {}, key, models, delay
        self.asked: list[dict[str, Any]] = []
        self.at_once = self.most_at_once = 0
        self._times: Counter[int] = Counter()
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> FakeServer:
        started = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, args=(started,), daemon=True)
        self._thread.start()
        assert started.wait(10)
        return self

    def __exit__(self, *_) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join(10)
        self._loop.close()

    def _run(self, started: threading.Event) -> None:
        self._loop.run_until_complete(self.serve(started.set))
        left = asyncio.all_tasks(self._loop)  # answers that nobody waits for any more
        for task in left:
            task.cancel()
        if left:
            self._loop.run_until_complete(asyncio.wait(left))

    async def serve(self, started=lambda: None) -> None:
        self._ended = asyncio.Event()
        app = web.Application()
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/completions", self._complete)
        app.router.add_post("/v1/chat/completions", self._complete)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", self.port)
        await site.start()
        self.port = runner.addresses[0][1]
        started()
        await self._ended.wait()
        await runner.cleanup()

    def _refuses(self, request: web.Request) -> bool:
        return bool(self.key) and request.headers.get("Authorization") != f"Bearer {self.key}"

    async def _models(self, request: web.Request) -> web.StreamResponse:
        if self._refuses(request):
            return web.json_response({"error": {"message": "wrong key"}}, status=401)
        rows = [{"id": name, "max_model_len": CONTEXT, "owned_by": "vllm"} for name in self.models]
        return web.json_response({"object": "list", "data": rows})

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.asked.append(body)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await asyncio.sleep(self.delay)
            return await self._reply(request, body)
        finally:
            self.at_once -= 1

    async def _reply(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        reply = reply_to(body) if "prompt" in body else chat_reply_to(body)
        seed = body.get("seed", body["prompt"][0] if "prompt_logprobs" in body else -1)
        fault, times = self.faults.get(seed, ("", 0))
        self._times[seed] += 1
        if self._times[seed] <= times:
            return await (FAULTS | SCORED_FAULTS)[fault](request, reply)
        return web.json_response(reply)


# ------------------------------------------------------------------------------------------------------------ faults


async def _stall(request: web.Request, reply: dict) -> web.StreamResponse:
    await asyncio.sleep(5)
    return web.json_response(reply)


async def _close(request: web.Request, reply: dict) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.close()
    return web.Response()


async def _cut(request: web.Request, reply: dict) -> web.StreamResponse:
    """Half of a reply, and no more."""
    data = json.dumps(reply).encode()
    response = web.StreamResponse(headers={"Content-Length": str(len(data)), "Content-Type": "application/json"})
    await response.prepare(request)
    await response.write(data[: len(data) // 2])
    assert request.transport is not None
    request.transport.close()
    return response


def _status(status: int, **headers: str):
    async def fault(request: web.Request, reply: dict) -> web.StreamResponse:
        return web.json_response({"error": {"message": f"no, {status}"}}, status=status, headers=headers)

    return fault


def _status_text(status: int, message: str):
    async def fault(request: web.Request, reply: dict) -> web.StreamResponse:
        return web.json_response({"error": {"message": message}}, status=status)

    return fault


def _text(text: str):
    async def fault(request: web.Request, reply: dict) -> web.StreamResponse:
        return web.Response(text=text, content_type="text/html")

    return fault


def _changed(change):
    async def fault(request: web.Request, reply: dict) -> web.StreamResponse:
        change(reply, reply["choices"][0])
        return web.json_response(reply)

    return fault


def _nan(reply: dict, choice: dict) -> None:
    choice["logprobs"]["token_logprobs"][0] = float("nan")
    choice["logprobs"]["top_logprobs"][0] = dict.fromkeys(choice["logprobs"]["top_logprobs"][0], float("nan"))


def _nan_prompt(reply: dict, choice: dict) -> None:
    next(iter(choice["prompt_logprobs"][-1].values()))["logprob"] = float("nan")


FAULTS = {
    "stall": _stall,
    "close": _close,
    "cut": _cut,
    "429": _status(429, **{"Retry-After": "0.05"}),
    "500": _status(500),
    "400": _status(400),
    "html": _text("<html>Bad Gateway</html>"),
    "broken": _text('{"choices": [{"text": "'),
    "list": _text("[1, 2]"),
    "no choice": _changed(lambda reply, choice: reply.update(choices=[])),
    "two choices": _changed(lambda reply, choice: reply["choices"].append(choice)),
    "wrong count": _changed(lambda reply, choice: reply["usage"].update(completion_tokens=1)),
    "too long": _changed(lambda reply, choice: (choice.update(token_ids=[9] * 999), reply.pop("usage"))),
    "no tokens": _changed(lambda reply, choice: choice.update(token_ids=[])),
    "bad tokens": _changed(lambda reply, choice: choice.update(token_ids=[1.5, "x"])),
    "empty": _changed(lambda reply, choice: (choice.pop("token_ids"), choice.update(text=" "))),
    "other prompt": _changed(lambda reply, choice: choice.update(prompt_token_ids=[1])),
    "aborted": _changed(lambda reply, choice: choice.update(finish_reason="abort")),
    "nan": _changed(_nan),
    "no logprobs": _changed(lambda reply, choice: choice.update(logprobs=None)),
    "few logprobs": _changed(lambda reply, choice: choice["logprobs"]["top_logprobs"].pop()),
}
SCORED_FAULTS = {
    "prompt nan": _changed(_nan_prompt),
    "prompt short": _changed(lambda reply, choice: choice["prompt_logprobs"].pop()),
    "prompt none": _changed(lambda reply, choice: choice.pop("prompt_logprobs")),
    "prompt null": _changed(lambda reply, choice: choice["prompt_logprobs"].__setitem__(-1, None)),
    "prompt few": _changed(lambda reply, choice: [choice["prompt_logprobs"][-1].popitem() for _ in range(2)]),
    "prompt text": _changed(lambda reply, choice: choice["prompt_logprobs"].__setitem__(-1, {"a": {"logprob": -1}})),
    "too many": _status_text(400, "Requested prompt logprobs of 50, which is greater than max allowed: 20"),
}


if __name__ == "__main__":
    server = FakeServer(delay=float(sys.argv[2]) if len(sys.argv) > 2 else 0.0)
    server.port = int(sys.argv[1])
    asyncio.run(server.serve())
