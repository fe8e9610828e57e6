"""What OpenAI-compatible servers are asked and what they answer, as pure functions: no network, no clock.

A server's answer is not trusted: what is not a whole, consistent completion is a `Failed` attempt with its reason.
"""

from __future__ import annotations

import json
from typing import Any

from jaxdistill.traces import logprobs, thinking
from jaxdistill.traces.engines import Completion, Request, Sampling

PATHS = {"completions": "/completions", "chat": "/chat/completions"}
TOKEN = "token_id:"
"""vLLM writes tokens so, when it is asked for ids in the place of texts."""


class Failed(Exception):
    """One attempt at a request came to nothing."""

    def __init__(self, reason: str, *, retry: bool = True, wait_s: float | None = None):
        super().__init__(reason)
        self.retry, self.wait_s = retry, wait_s


class Refused(ValueError):
    """No request will be served: a wrong key, model or path. Ends the run."""


def make_body(request: Request, sampling: Sampling, model: str, api: str) -> dict[str, Any]:
    """The JSON of one request; what other servers than vLLM do not know is theirs to ignore."""
    if request.response_ids is not None:
        return _scoring_body(request, sampling, model)
    greedy = sampling.temperature == 0
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": 1.0 if greedy else sampling.top_p,
        "return_token_ids": True,
    }
    if not greedy:
        body["seed"] = request.seed
    if api == "chat":
        return body | {"messages": request.messages}
    body |= {"prompt": request.prompt_ids, "stop_token_ids": sampling.stop_ids}
    if sampling.logprobs:
        body |= {"logprobs": sampling.logprobs, "return_tokens_as_token_ids": True}
    return body


def _scoring_body(request: Request, sampling: Sampling, model: str) -> dict[str, Any]:
    """One prefill of vLLM's; the token that it draws besides is not looked at."""
    return {
        "model": model,
        "prompt": _whole(request),
        "max_tokens": 1,
        "temperature": 0.0,
        "prompt_logprobs": sampling.logprobs,
        "return_token_ids": True,
    }


def _whole(request: Request) -> list[int]:
    return request.prompt_ids + (request.response_ids or [])


def check_status(status: int, headers: Any, data: bytes, url: str) -> None:
    """Sorts out HTTP errors.

    Raises:
      Refused: nobody would be served (401, 403, 404, or more logprobs than the server gives).
      Failed: this request was not; 408, 409, 425, 429 and 5xx are worth another attempt.
    """
    if status == 200:
        return
    reason = f"HTTP {status}: {_error_message(data)}"
    if status in (401, 403):
        raise Refused(f"{url}: {reason}; put the key into the environment variable that server.api_key_env names.")
    if status == 404:
        raise Refused(f"{url}: {reason}; correct traces.server.model, .urls or .api.")
    if status == 400 and "logprobs" in reason and "max allowed" in reason:
        raise Refused(
            f"{url}: {reason}; start it with --max-logprobs so high, or lower traces.logprobs "
            "(on policy: train.on_policy.topk)."
        )
    raise Failed(reason, retry=status in (408, 409, 425, 429) or status >= 500, wait_s=_retry_after(headers))


def read_completion(data: bytes, request: Request, sampling: Sampling, api: str) -> Completion:
    """One completion out of a reply.

    Raises:
      Failed: the reply is not JSON, or not one whole completion of this request.
    """
    try:
        reply = json.loads(data)
    except ValueError:
        raise Failed(f"a reply that is not JSON: {_short(data)}") from None
    choices = reply.get("choices") if isinstance(reply, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        count = len(choices) if isinstance(choices, list) else "no"
        raise Failed(f"a reply with {count} choices instead of one")
    choice = choices[0]
    if request.response_ids is not None:
        return _read_scored(choice, reply, request, sampling.logprobs)
    reason = choice.get("finish_reason")
    if reason not in ("stop", "length"):
        raise Failed(f"the server ended it with finish_reason {reason!r}")
    _check_prompt(choice.get("prompt_token_ids", reply.get("prompt_token_ids")), request, api)
    output_ids = _ids(choice.get("token_ids"), "token_ids")
    counted = _count(reply)
    if output_ids is not None:
        _check_count(output_ids, counted, reason, sampling)
    text = _text(choice, api)
    # the text is needed where ids do not say it, or where a reasoning parser has taken it apart
    if (output_ids is None or api == "chat") and not text.strip():
        raise Failed("an empty response")
    return Completion(
        id=request.id,
        output_ids=output_ids or [],
        finish_reason=reason,
        text=text if output_ids is None or api == "chat" else None,
        tokens=counted if output_ids is None else None,
        prompt_ids=_ids(choice.get("prompt_token_ids", reply.get("prompt_token_ids")), "") if api == "chat" else None,
        logprobs=_logprobs(choice, output_ids, sampling.logprobs) if sampling.logprobs else None,
    )


def _read_scored(choice: dict[str, Any], reply: dict[str, Any], request: Request, k: int) -> Completion:
    """The logprobs of a response that came as part of the prompt."""
    whole, response_ids = _whole(request), request.response_ids or []
    _check_prompt(choice.get("prompt_token_ids", reply.get("prompt_token_ids")), request, "completions")
    found = choice.get("prompt_logprobs", reply.get("prompt_logprobs"))
    if not isinstance(found, list):
        raise Failed("no prompt_logprobs, which vLLM's completions have; another server cannot score")
    if len(found) != len(whole):  # the first of them is null, as nothing comes before it
        raise Failed(f"prompt_logprobs at {len(found)} positions for {len(whole)} tokens")
    try:
        positions = [
            {int(token): float(entry["logprob"]) for token, entry in row.items()}
            for row in found[len(request.prompt_ids) :]
        ]
    except (KeyError, TypeError, ValueError, AttributeError):
        raise Failed("prompt_logprobs that are not in vLLM's form") from None
    return Completion(
        id=request.id, output_ids=response_ids, finish_reason="stop", logprobs=_sorted(positions, response_ids, k)
    )


def _check_prompt(found: Any, request: Request, api: str) -> None:
    if api == "completions" and found is not None and found != _whole(request):
        raise Failed("the server answered another prompt than it was sent")


def _check_count(output_ids: list[int], counted: int | None, reason: str, sampling: Sampling) -> None:
    if not output_ids:
        raise Failed("an empty response")
    if counted is not None and counted != len(output_ids):
        raise Failed(f"{len(output_ids)} token ids, but the server counted {counted}")
    if len(output_ids) > sampling.max_tokens or (reason == "length" and len(output_ids) != sampling.max_tokens):
        raise Failed(f"{len(output_ids)} token ids with max_tokens {sampling.max_tokens}, ended by {reason}")


def _ids(found: Any, name: str) -> list[int] | None:
    if found is None:
        return None
    # bool is an int to Python
    if not isinstance(found, list) or not all(type(token) is int and 0 <= token < 1 << 31 for token in found):
        raise Failed(f"{name} that are no list of token ids")
    return found


def _count(reply: dict[str, Any]) -> int | None:
    usage = reply.get("usage")
    count = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return count if type(count) is int else None


def _text(choice: dict[str, Any], api: str) -> str:
    if api == "completions":
        text = choice.get("text", "")
        if not isinstance(text, str):
            raise Failed("a text that is none")
        return text
    message = choice.get("message")
    if not isinstance(message, dict):
        raise Failed("a chat reply without a message")
    thoughts = message.get("reasoning_content") or message.get("reasoning")
    content = message.get("content") or ""
    if not isinstance(content, str) or not isinstance(thoughts, str | None):
        raise Failed("a message whose content is not text")
    return thinking.join(thoughts, content)


def _logprobs(choice: dict[str, Any], output_ids: list[int] | None, k: int) -> logprobs.TopLogprobs:
    if output_ids is None:
        raise Failed("no token ids, which logprobs need")
    try:
        found = choice["logprobs"]
        positions = [
            {int(name.removeprefix(TOKEN)): float(value) for name, value in row.items()}
            for row in found["top_logprobs"]
        ]
        for position, token, value in zip(positions, output_ids, found["token_logprobs"], strict=True):
            position.setdefault(token, float(value))
    except (KeyError, TypeError, ValueError, AttributeError):
        raise Failed("logprobs that are missing or not in vLLM's form") from None
    return _sorted(positions, output_ids, k)


def _sorted(positions: list[dict[int, float]], output_ids: list[int], k: int) -> logprobs.TopLogprobs:
    try:
        return logprobs.from_candidates(positions, output_ids, k)
    except ValueError as error:
        raise Failed(str(error)) from None


def _retry_after(headers: Any) -> float | None:
    """Seconds of a `Retry-After` header; its other form, a date, is not heeded."""
    value = headers.get("Retry-After", "")
    return min(float(value), 600.0) if value.strip().replace(".", "", 1).isdigit() else None


def _error_message(data: bytes) -> str:
    try:
        reply = json.loads(data)
    except ValueError:
        return _short(data)
    error = reply.get("error", reply.get("detail")) if isinstance(reply, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    return _short(str(message).encode()) if message else _short(data)


def _short(data: bytes, limit: int = 200) -> str:
    text = " ".join(data[: 4 * limit].decode(errors="replace").split())
    return text[:limit] or "nothing"
