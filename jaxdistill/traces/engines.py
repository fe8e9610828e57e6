"""What answers prompts: one interface for trace collection and evaluation, and the table of engines behind it.

An engine takes token ids and gives token ids, in whatever order samples finish; text is the caller's
(`tokenization.decode_response`). It is told of prompts by id, never of problems.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Literal

from jaxdistill import hub
from jaxdistill.config import VLLMConfig


@dataclasses.dataclass(frozen=True)
class Request:
    """One sample to be drawn."""

    id: str
    prompt_ids: list[int]
    seed: int
    """In 0..2**31-1. The same seed draws the same sample from the same distributions, whatever else is in the batch."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How all samples are drawn."""

    temperature: float
    """0 is greedy."""
    top_p: float
    max_tokens: int
    stop_ids: list[int]
    """Tokens that end a response (`tokenization.stop_ids`)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """One finished sample."""

    id: str
    output_ids: list[int]
    """The stop token included."""
    finish_reason: Literal["stop", "length", "error"]
    error: str | None = None
    """Why this one request failed; None exactly if it did not."""


def generate(
    engine: str,
    checkpoint: Path,
    requests: list[Request],
    sampling: Sampling,
    *,
    vllm: VLLMConfig,
    batch: int,
    log: Path | None = None,
    ready: Callable[[], None] = lambda: None,
) -> Generator[Completion, None, None]:
    """Draws every request's sample; yields completions as they finish, in any order, each request exactly once.

    Who stops before the end should `close()` what this returns, so that no process is left behind.

    Args:
      engine: a key of `ENGINES`.
      checkpoint: a Hugging Face folder.
      batch: rows that the engine `jax` decodes at once; vLLM has `vllm.max_num_seqs`.
      log: where an engine with a process of its own keeps that process's output; a temporary file if absent.
      ready: called once, when the model is loaded and the first batch begins.
    Raises:
      ValueError: a request does not fit into the model's context, or the engine cannot run this checkpoint.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine {engine!r} is not known; known are {', '.join(sorted(ENGINES))}.")
    check_context(requests, sampling.max_tokens, _context(engine, checkpoint, vllm))

    def run() -> Generator[
        Completion, None, None
    ]:  # the checks above are made at once, this begins with the first `next`
        if requests:
            yield from ENGINES[engine](checkpoint, requests, sampling, vllm=vllm, batch=batch, log=log, ready=ready)

    return run()


def check_context(requests: list[Request], max_tokens: int, context: int | None) -> None:
    """Refuses requests that could outgrow the model's context, before the first token is drawn."""
    if context is None or not requests:
        return
    longest = max(requests, key=lambda request: len(request.prompt_ids))
    length = len(longest.prompt_ids)
    if length + max_tokens > context:
        too_long = sum(len(request.prompt_ids) + max_tokens > context for request in requests)
        raise ValueError(
            f"{longest.id}: a prompt of {length} tokens + max_tokens={max_tokens} > {context}, the model's context "
            f"({too_long} of {len(requests)} requests are too long); lower max_tokens, or leave such problems out."
        )


def _context(engine: str, checkpoint: Path, vllm: VLLMConfig) -> int | None:
    """Tokens that prompt and response may have together; None if the checkpoint does not say."""
    if engine == "vllm" and vllm.max_model_len is not None:
        return vllm.max_model_len
    config = hub.read_config(checkpoint)
    return config.get("max_position_embeddings", config.get("text_config", {}).get("max_position_embeddings"))


# An engine's module is imported when it is used: `traces.engine: import` needs neither JAX nor a second interpreter.


def _vllm(checkpoint: Path, requests: list[Request], sampling: Sampling, **options) -> Iterator[Completion]:
    from jaxdistill.traces import vllm_engine

    return vllm_engine.generate(checkpoint, requests, sampling, **options)


def _jax(checkpoint: Path, requests: list[Request], sampling: Sampling, **options) -> Iterator[Completion]:
    from jaxdistill.traces import jax_engine

    return jax_engine.generate(checkpoint, requests, sampling, **options)


ENGINES: dict[str, Callable[..., Iterator[Completion]]] = {"vllm": _vllm, "jax": _jax}
