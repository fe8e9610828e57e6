"""What servers say when they do not answer, as pure functions: whether to ask again, to go on, or to stop; what to do.

Servers agree on little. An error may come as HTTP status or inside a reply of status 200 (OpenRouter); as
`{"error": {"message": ...}}`, `{"message": ...}` (older vLLM) or `{"detail": [{"loc": ..., "msg": ...}]}` (FastAPI); as
a page of HTML from whatever stands between.
"""

from __future__ import annotations

import datetime
import email.utils
import html
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from jaxdistill.config import ServerConfig
from jaxdistill.config.traces import OMITTABLE

AGAIN = (408, 409, 425, 429)
"""Statuses below 500 that are worth another attempt."""
LONGEST_WAIT_S = 600.0
"""However long a server asks for."""
PROBES = 8
"""Requests that go first. If all of them are refused for one reason, so would all others be."""
STREAK = 64
"""Requests that fail one after the other, each after all its attempts, before a run stops; more where more are asked at
a time."""
VLLM_FIELDS = ("return_token_ids", "stop_token_ids", "return_tokens_as_token_ids", "prompt_logprobs")
"""Of a request; the API does not document them."""


class Failed(Exception):
    """One attempt at a request came to nothing."""

    def __init__(self, reason: str, *, retry: bool = True, wait_s: float | None = None, status: int | None = None):
        super().__init__(reason)
        self.retry, self.wait_s, self.status = retry, wait_s, status

    @property
    def limited(self) -> bool:
        """Whether the server only has too much to do."""
        return self.status == 429

    @property
    def of_all(self) -> bool:
        """Whether the request is refused for what all requests have in common, as far as one can tell."""
        said = str(self)
        if self.retry or self.status is None:
            return False
        return not _OF_ONE.search(said) or bool(_OF_SETTINGS.search(said) and "context" not in said.lower())

    @property
    def kind(self) -> str:
        """The reason without what only this request has: two requests that fail alike have one."""
        return _ITS_OWN.sub("...", str(self))


class Refused(ValueError):
    """No request will be served: a wrong key, model, path or field, or no money left. Ends the run."""


_OF_ONE = re.compile(
    r"context|too long|too large|token limit|exceed|prompt is|content.?(filter|polic|management)|moderat|flagged"
    r"|safety",
    re.I,
)
"""In a refusal: it may well be this request's own fault."""
_OF_SETTINGS = re.compile(
    r"\bmax_(?:completion_|output_|new_)?tokens\b.{0,40}(?:too large|too high|exceed|at most|greater|<=)", re.I
)
"""In a refusal: what is too large is a setting of all requests, and not this one's prompt."""
_ITS_OWN = re.compile(
    r"\b(?=\w*\d)[0-9a-f]{8,}\b|\b[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b"
    r"|\b(?:req|chatcmpl|cmpl|call|msg|trace)[-_]\w{6,}|\b\d{6,}\w*",
    re.I,
)
"""Names of single requests, which servers put into what they say, and times."""
_SPENT = re.compile(
    r"insufficient.?(quota|balance|credits?|funds)|exceeded your current quota|billing|payment|per[ -]day|daily"
    r"|quota.{0,60}exhaust|exhaust.{0,60}quota",
    re.I,
)
"""In a 429: waiting some minutes does not help."""


def check_status(status: int, headers: Mapping[str, str], data: bytes, url: str) -> None:
    """Sorts out HTTP errors.

    Raises:
      Refused: nobody would be served (401, 402, 403, 404, 405, 501, a spent quota, more logprobs than there are).
      Failed: this request was not; 408, 409, 425, 429 and 5xx are worth another attempt.
    """
    if status == 200:
        return
    message = error_message(data)
    reason = f"HTTP {status}: {message}"
    if status == 401 or (status == 403 and not _OF_ONE.search(message)):
        raise Refused(f"{url}: {reason}; put the key into the environment variable that server.api_key_env names.")
    if status == 402 or (status == 429 and _SPENT.search(message)):
        raise Refused(
            f"{url}: {reason}; see to the account's quota, then give the same command again: it goes on from here."
        )
    if status in (404, 405, 501):
        raise Refused(f"{url}: {reason}; correct server.model, server.urls or server.api.")
    if status == 400 and "logprobs" in message and "max allowed" in message:
        raise Refused(
            f"{url}: {reason}; start it with --max-logprobs so high, or lower traces.logprobs "
            "(on policy: train.on_policy.topk)."
        )
    again = status in AGAIN or status >= 500
    raise Failed(reason, retry=again, wait_s=retry_after(headers), status=status)


def check_reply(reply: Any, url: str) -> None:
    """Errors that come in a reply of status 200: at its top (OpenRouter), or in its choice.

    Raises:
      Refused, Failed: as `check_status`, by the code in it.
    """
    if not isinstance(reply, dict):
        return
    choices = reply.get("choices")
    first = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    error = reply.get("error") if not choices else first.get("error")
    if not error:
        return
    code = error.get("code", error.get("status")) if isinstance(error, dict) else None
    code = int(code) if isinstance(code, str) and code.isdigit() else code
    if not isinstance(code, int) or not 400 <= code < 600:
        raise Failed(f"an error instead of an answer: {error_message(json.dumps({'error': error}).encode())}")
    check_status(code, {}, json.dumps({"error": error}).encode(), url)


def error_message(data: bytes) -> str:
    """What a server says in the body of an error, in one short line."""
    try:
        reply = json.loads(data)
    except ValueError:
        return short(data)
    for key in ("error", "detail", "message", "errors", "msg"):
        if isinstance(reply, dict) and reply.get(key):
            return short(_said(reply[key]).encode())
    return short(data)


def _said(value: Any) -> str:
    """The words of an error, whatever it is wrapped in."""
    if isinstance(value, dict):
        words = next(
            (_said(value[k]) for k in ("message", "msg", "error", "detail") if value.get(k)), json.dumps(value)
        )
        place = value.get("loc")
        if isinstance(place, list):
            words = f"{'.'.join(str(part) for part in place)}: {words}"
        inner = value.get("metadata", {}).get("raw") if isinstance(value.get("metadata"), dict) else None
        return f"{words} ({inner})" if isinstance(inner, str) and inner not in words else words
    if isinstance(value, list):
        return "; ".join(_said(each) for each in value[:3])
    return str(value)


def short(data: bytes, limit: int = 200) -> str:
    """The beginning of a text in one line; of a page of HTML its title, or its words."""
    text = data[: 16 * limit].decode(errors="replace")
    if text.lstrip()[:1] == "<":
        title = re.search(r"<title[^>]*>(.*?)</title>", text, re.I | re.S)
        words = title.group(1) if title and title.group(1).strip() else re.sub(r"<[^>]*>", " ", text)
        text = "a page of HTML: " + html.unescape(words)
    text = " ".join(text.split())
    return text[:limit] or "nothing"


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds of a `retry-after-ms` or `Retry-After` header, whose other form is a date."""
    exact, value = headers.get("retry-after-ms", "").strip(), headers.get("Retry-After", "").strip()
    for text, unit in ((exact, 1000), (value, 1)):
        if text.replace(".", "", 1).isdigit():
            return min(float(text) / unit, LONGEST_WAIT_S)
    try:
        when = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    if when.tzinfo is None:
        when = when.replace(tzinfo=datetime.UTC)
    seconds = (when - datetime.datetime.now(datetime.UTC)).total_seconds()
    return min(max(seconds, 0.0), LONGEST_WAIT_S)


def advice(reason: str, config: ServerConfig, models: Sequence[str] = ()) -> str:
    """What to do about a refusal, by the words in it; the section is `traces.server`, or another's `server`."""
    said = reason.lower()
    if any(name in said for name in VLLM_FIELDS):
        return "set server.dialect: openai, which leaves vLLM's own fields out"
    if "max_completion_tokens" in said and config.max_tokens_field == "max_tokens":
        return "set server.max_tokens_field: max_completion_tokens"
    if "max_tokens" in said and config.max_tokens_field != "max_tokens":
        return "set server.max_tokens_field: max_tokens"
    if _OF_SETTINGS.search(said):
        return "lower traces.max_tokens"
    for name in config.extra:
        if name.lower() in said:
            return f"take {name} out of server.extra"
    refused = [name for name in OMITTABLE if name in said and name not in config.omit]
    if refused:
        return f"set server.omit: [{', '.join((*config.omit, *refused))}], and the server samples by its own"
    if "context length" in said or "too long" in said:
        return "lower traces.max_tokens, or leave such problems out"
    if config.api == "completions" and re.search(r"\bmessages\b|\bprompt\b", said):
        return "set server.api: chat"
    if config.api == "chat" and re.search(r"\bprompt\b.*\brequired|chat template", said):
        return "set server.api: completions"
    # a server of one model speaks of it whatever is wrong
    if "model" in said and (len(models) > 1 or (models and config.model not in (None, *models))):
        return f"set server.model to what the server has: {', '.join(models[:8])}"
    return "see what the server wants (server.omit, server.extra, server.dialect, server.max_tokens_field, server.api)"


class Tally:
    """How the requests of a run have ended so far, and whether there is any sense in going on."""

    def __init__(self, width: int):
        """
        Args:
          width: requests that are asked at a time.
        """
        self._longest = max(STREAK, width)
        self.asked = self.answered = self._streak = 0
        self._refused: Counter[str] = Counter()

    def answer(self) -> None:
        self.answered += 1
        self._streak = 0

    def fail(self, error: Failed) -> str | None:
        """Counts a request that failed for good; gives the reason to stop the run, if there is one now."""
        reason = str(error)
        if error.of_all and not self.answered:
            self._refused[error.kind] += 1
            times = self._refused[error.kind]
            if times >= PROBES and 2 * times >= self.asked:
                return f"the first {times} requests were refused, all for one reason: {reason}"
        if error.retry:
            self._streak += 1
            if self._streak >= self._longest:
                return f"the last {self._streak} requests failed after all their attempts, the last one so: {reason}"
        return None
