"""What answers prompts: one interface for trace collection and evaluation, and the table of engines behind it.

An engine takes token ids and gives token ids, in whatever order samples finish; text is the caller's
(`tokenization.decode_response`). It is told of prompts by id, never of problems.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterator
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from jaxdistill import hub
from jaxdistill.config import RayConfig, ServerConfig, TracesConfig, VLLMConfig
from jaxdistill.traces import server_errors
from jaxdistill.traces.logprobs import TopLogprobs


@dataclasses.dataclass(frozen=True)
class Request:
    """One sample to be drawn."""

    id: str
    prompt_ids: list[int]
    seed: int
    """In 0..2**31-1. The same seed draws the same sample from the same distributions, whatever else is in the batch."""
    messages: list[dict[str, str]] | None = None
    """The chat that the prompt was rendered from; only servers with `api: chat` look at it."""
    response_ids: list[int] | None = None
    """Draw nothing: give the logprobs of this response, by one prefill. A server that is no vLLM cannot do it."""

    @property
    def room(self) -> int:
        """Tokens that the prompt takes, and the response where it is given."""
        return len(self.prompt_ids) + len(self.response_ids or ())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How all samples are drawn."""

    temperature: float
    """0 is greedy."""
    top_p: float
    max_tokens: int
    stop_ids: list[int]
    """Tokens that end a response (`tokenization.stop_ids`)."""
    logprobs: int = 0
    """So many likeliest tokens' logprobs at each position; 0 for none."""
    random: bool = False
    """So many random draws instead; only the engine `jax` does it."""
    logprobs_temperature: float = 1.0
    """Divides the logits of the distributions that are kept; only the engine `jax` does it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """One finished sample."""

    id: str
    output_ids: list[int]
    """The stop token included."""
    finish_reason: Literal["stop", "length", "error"]
    error: str | None = None
    """Why this one request failed; None exactly if it did not."""
    text: str | None = None
    """What a server wrote, thinking in `<think>` tags; None where `output_ids` say it."""
    tokens: int | None = None
    """How many tokens a server counted for `text` where it gives no ids."""
    prompt_ids: list[int] | None = None
    """The prompt as a chat server rendered it, if it tells."""
    logprobs: TopLogprobs | None = dataclasses.field(default=None, compare=False)

    @property
    def output_tokens(self) -> int:
        return len(self.output_ids) or self.tokens or 0


@runtime_checkable
class Session(Protocol):
    """An engine that is asked bit by bit, as where requests are handed out to several; made when its model is loaded.

    What it is made with is told by `vllm_engine.Session`.
    """

    def give(self, requests: list[Request]) -> None:
        """Requests, while others may be under way."""

    def take(self, seconds: float) -> list[Completion]:
        """Waits for what ends next; may give nothing after so many seconds."""
        ...

    def close(self) -> None:
        """Ends it, whatever is under way."""


@dataclasses.dataclass(frozen=True)
class Executor:
    """A Ray cluster in the place of this machine; each of its workers fetches the checkpoint for itself."""

    ray: RayConfig
    name: str
    """Of the checkpoint, see `hub.fetch`."""
    fetched: str | None
    """The revision to fetch."""
    revision: str
    """What `hub.revision_of` says of it here; empty if it is not here."""
    check: bool = False
    """See `generate`."""


def executor_of(config: TracesConfig, revision: str) -> Executor | None:
    """What `traces.executor` asks for; None for this machine. `revision` is the teacher's, as it is known here."""
    if config.executor == "local":
        return None
    assert config.teacher is not None
    return Executor(config.ray, config.teacher, config.revision, revision)


def generate(
    engine: str,
    checkpoint: Path,
    requests: Collection[Request],
    sampling: Sampling,
    *,
    vllm: VLLMConfig,
    batch: int,
    server: ServerConfig | None = None,
    log: Path | None = None,
    ready: Callable[[], None] = lambda: None,
    executor: Executor | None = None,
    check: bool = False,
) -> Generator[Completion, None, None]:
    """Draws every request's sample; yields completions as they finish, in any order, each request exactly once.

    Who stops before the end should `close()` what this returns, so that no process is left behind.

    Args:
      engine: a key of `ENGINES`.
      checkpoint: a Hugging Face folder.
      requests: gone through in order, one at a time, so that they may be made as they are asked for.
      batch: rows that the engine `jax` decodes at once; vLLM has `vllm.max_num_seqs`.
      server: which servers, for the engine `server`.
      log: where an engine with a process of its own keeps that process's output; a temporary file if absent.
      ready: called once, when the model is loaded and the first batch begins.
      executor: a Ray cluster to work on, for the engines `vllm` and `jax`; this machine if absent.
      check: compare a checkpoint that the engine `jax` reads with transformers first, see `start.check_start`.
    Raises:
      ValueError: a request does not fit into the model's context, or the engine cannot run this checkpoint.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine {engine!r} is not known; known are {', '.join(sorted(ENGINES))}.")
    chat = engine == "server" and server is not None and server.api == "chat"
    if not chat:  # a chat server renders its prompts itself
        check_context(requests, sampling.max_tokens, _context(engine, checkpoint, vllm))
    options = {"server": server} if engine == "server" else {}

    def run() -> Generator[
        Completion, None, None
    ]:  # the checks above are made at once, this begins with the first `next`
        if requests and executor is not None:
            from jaxdistill.traces import ray_engine

            on = dataclasses.replace(executor, check=check)
            yield from ray_engine.generate(
                engine, requests, sampling, vllm=vllm, batch=batch, log=log, ready=ready, executor=on
            )
        elif requests:
            if check:
                check_checkpoint(engine, checkpoint)
            yield from ENGINES[engine](
                checkpoint, requests, sampling, vllm=vllm, batch=batch, log=log, ready=ready, **options
            )

    return run()


def check_checkpoint(engine: str, checkpoint: Path) -> None:
    """Compares what the engine `jax` would read with transformers; other engines read checkpoints in their own way.

    Raises:
      ValueError: they differ, see `start.check_start`.
    """
    if engine == "jax":
        from jaxdistill.models.start import check_start

        check_start(checkpoint)


def check_context(requests: Collection[Request], max_tokens: int, context: int | None) -> None:
    """Refuses requests that could outgrow the model's context, before the first token is drawn."""
    if context is None or not requests:
        return
    length, name = max(((r.room, r.id) for r in requests), key=lambda found: found[0])
    if length + max_tokens > context:
        too_long = sum(request.room + max_tokens > context for request in requests)
        raise ValueError(
            f"{name}: a prompt of {length} tokens + max_tokens={max_tokens} > {context}, the model's context "
            f"({too_long} of {len(requests)} requests are too long); lower max_tokens, or leave such problems out."
        )


def check_answered(failures: Counter[str], answered: int, server: ServerConfig | None = None) -> None:
    """Refuses what looks like a result where every single request failed.

    Args:
      failures: reason -> requests.
      server: of the engine `server`.
    Raises:
      ValueError: that is so; with the most frequent reason, and what to do.
    """
    if answered or not failures:
        return
    reason, times = failures.most_common(1)[0]
    todo = "see to the engine" if server is None else server_errors.advice(reason, server)
    raise ValueError(
        f"all requests failed, most often ({times:,} of {failures.total():,}) so: {reason}; {todo}. The same command "
        "asks again."
    )


def _context(engine: str, checkpoint: Path, vllm: VLLMConfig) -> int | None:
    """Tokens that prompt and response may have together; None if the checkpoint does not say."""
    if engine in ("vllm", "server") and vllm.max_model_len is not None:
        return vllm.max_model_len
    if not (checkpoint / "config.json").is_file():  # of a server's model the tokenizer alone may be here
        return None
    config = hub.read_config(checkpoint)
    return config.get("max_position_embeddings", config.get("text_config", {}).get("max_position_embeddings"))


# An engine's module is imported when it is used: `traces.engine: import` needs neither JAX nor a second interpreter.


def _vllm(checkpoint: Path, requests: Collection[Request], sampling: Sampling, **options) -> Iterator[Completion]:
    from jaxdistill.traces import vllm_engine

    return vllm_engine.generate(checkpoint, requests, sampling, **options)


def _jax(checkpoint: Path, requests: Collection[Request], sampling: Sampling, **options) -> Iterator[Completion]:
    from jaxdistill.traces import jax_engine

    return jax_engine.generate(checkpoint, requests, sampling, **options)


def _server(checkpoint: Path, requests: Collection[Request], sampling: Sampling, **options) -> Iterator[Completion]:
    from jaxdistill.traces import server_engine

    return server_engine.generate(checkpoint, requests, sampling, **options)


ENGINES: dict[str, Callable[..., Iterator[Completion]]] = {"vllm": _vllm, "server": _server, "jax": _jax}
