"""What OpenAI-compatible servers are asked and what they answer, as pure functions: no network, no clock.

A server's answer is not trusted: what is not a whole, consistent completion is a `Failed` attempt with its reason.
"""

from __future__ import annotations

import contextlib
import json
from typing import Any, Literal

from jaxdistill.config import ServerConfig
from jaxdistill.traces import logprobs, thinking
from jaxdistill.traces.content import THOUGHT_FIELDS, THOUGHT_PARTS, thoughts_of
from jaxdistill.traces.engines import Completion, Request, Sampling
from jaxdistill.traces.server_errors import Failed, check_reply, short
from jaxdistill.traces.values import BadRow

PATHS = {"completions": "/completions", "chat": "/chat/completions"}
TOKEN = "token_id:"
"""vLLM writes tokens so, when it is asked for ids in the place of texts."""
STOPPED = ("stop", "eos", "eos_token", "stop_sequence", "end_turn")
CUT_OFF = ("length", "max_tokens", "max_output_tokens")
"""Words for how a response ended: the API's first, then those of servers that pass on their own."""


def make_body(request: Request, sampling: Sampling, model: str, config: ServerConfig, *, vllm: bool) -> dict[str, Any]:
    """The JSON of one request: documented fields alone, vLLM's own where the server is vLLM, and the user's.

    Args:
      vllm: whether the server is asked in vLLM's dialect. Without it tokens end where the server's own settings say.
    """
    if request.response_ids is not None:
        return _scoring_body(request, sampling, model)
    greedy = sampling.temperature == 0
    body: dict[str, Any] = {
        "model": model,
        config.max_tokens_field: sampling.max_tokens,
        "temperature": sampling.temperature,
        # said even where it is 1: servers take what they are not told from the checkpoint, or from their own defaults
        "top_p": 1.0 if greedy else sampling.top_p,
    }
    if not greedy:
        body["seed"] = request.seed
    if vllm:
        body["return_token_ids"] = True
    if config.api == "chat":
        body |= {"messages": request.messages}
    else:
        body |= {"prompt": request.prompt_ids}
        if vllm:
            body |= {"stop_token_ids": sampling.stop_ids}
    if sampling.logprobs:
        body |= {"logprobs": sampling.logprobs, "return_tokens_as_token_ids": True}
    return {name: value for name, value in body.items() if name not in config.omit} | config.extra


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


def read_completion(data: bytes, request: Request, sampling: Sampling, api: str, url: str = "") -> Completion:
    """One completion out of a reply.

    Raises:
      Failed: the reply is not JSON, or not one whole completion of this request.
      Refused: it is an error that all requests would meet, in a reply of status 200.
    """
    try:
        reply = json.loads(data)
    except ValueError:
        raise Failed(f"a reply that is not JSON: {short(data)}") from None
    check_reply(reply, url)
    choices = reply.get("choices") if isinstance(reply, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        count = len(choices) if isinstance(choices, list) else "no"
        raise Failed(f"a reply with {count} choices instead of one")
    choice = choices[0]
    if request.response_ids is not None:
        return _read_scored(choice, reply, request, sampling.logprobs)
    reason = _finish(choice)
    _check_prompt(choice.get("prompt_token_ids", reply.get("prompt_token_ids")), request, api)
    output_ids = _ids(choice.get("token_ids"), "token_ids")
    counted = _count(reply)
    if output_ids is not None:
        _check_count(output_ids, counted, reason, sampling)
    text = _text(choice, api, reason)
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


def _finish(choice: dict[str, Any]) -> Literal["stop", "length"]:
    """How a response ended, in the API's words; servers that pass on other ones are understood."""
    found = choice.get("finish_reason")
    word = found.lower() if isinstance(found, str) else ""
    if word in STOPPED:
        return "stop"
    if word in CUT_OFF:
        return "length"
    # the same request would be filtered again
    raise Failed(f"the server ended it with finish_reason {found!r}", retry=word not in ("content_filter", "safety"))


def _text(choice: dict[str, Any], api: str, reason: str) -> str:
    if api == "completions":
        text = choice.get("text", "")
        if not isinstance(text, str):
            raise Failed("a text that is none")
        return text
    message = choice.get("message")
    if not isinstance(message, dict):
        raise Failed("a chat reply without a message")
    thoughts, content = _parts(message.get("content"))
    if refusal := message.get("refusal"):
        raise Failed(f"the model refused: {short(str(refusal).encode())}", retry=False)
    # the fields of servers with a reasoning parser; one of them is enough, as some fill two with the same
    for name in THOUGHT_FIELDS:
        if not thoughts and message.get(name):
            with contextlib.suppress(BadRow):  # hidden thoughts are none: the answer is there, and paid for
                thoughts = thoughts_of(message[name], name)
    thoughts = thinking.bare(thoughts)
    if thinking.OPEN in content or thinking.CLOSE in content:  # left there although it was also taken out
        return content
    if thoughts and not content.strip() and reason == "length":  # cut off before the thinking was over
        return f"{thinking.OPEN}\n{thoughts.strip(chr(10))}"
    return thinking.join(thoughts, content)


def _parts(content: Any) -> tuple[str, str]:
    """(thoughts, text) of a message's content: a text, nothing, or a list of parts, as Mistral's servers have it."""
    if content is None:
        return "", ""
    if isinstance(content, str):
        return "", content
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise Failed("a message whose content is not text")
    of = {True: "", False: ""}
    for part in content:
        of[part.get("type") in THOUGHT_PARTS] += _flat(part)
    return of[True], of[False]


def _flat(value: Any) -> str:
    """The text of a block, or of a list of blocks; what is encrypted or summed up is left out."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "".join(_flat(each) for each in value)
    if isinstance(value, dict):
        return next((_flat(value[key]) for key in ("text", "thinking", "reasoning", "content") if value.get(key)), "")
    raise Failed("a message whose content is not text")


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
