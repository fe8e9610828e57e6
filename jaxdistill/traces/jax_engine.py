"""The engine `jax`: the embedded decoder, in this process."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jaxdistill.config import VLLMConfig
from jaxdistill.tokenization import TokenMap
from jaxdistill.traces.engines import Completion, Request, Sampling

if TYPE_CHECKING:
    from jaxdistill.models import Decoder
    from jaxdistill.traces.jax_scoring import Scorer


def generate(
    checkpoint: Path,
    requests: Collection[Request],
    sampling: Sampling,
    *,
    vllm: VLLMConfig,
    batch: int,
    log: Path | None,
    ready: Callable[[], None],
) -> Iterator[Completion]:
    """See `engines.generate`; of `vllm` the dtype counts, and `log` is of no use here."""
    del log
    answerer = _Answerer(checkpoint, sampling, batch, vllm.dtype)
    ready()
    yield from answerer.answer(list(requests))


class Session:
    """A model that is asked bit by bit. See `engines.Session`."""

    def __init__(
        self,
        checkpoint: Path,
        sampling: Sampling,
        *,
        vllm: VLLMConfig,
        batch: int,
        log: Path | None,
        longest: int,
    ):
        """Returns when the model is loaded; of `vllm` the dtype counts, `log` and `longest` are of no use here."""
        del log, longest
        self._answerer = _Answerer(checkpoint, sampling, batch, vllm.dtype)
        self._waiting: list[Request] = []
        self._running: Iterator[Completion] = iter(())

    def give(self, requests: list[Request]) -> None:
        self._waiting += requests

    def take(self, seconds: float) -> list[Completion]:
        """The next completion, however long it takes; what comes in meanwhile is begun when all before it is done."""
        del seconds
        found = next(self._running, None)
        if found is None and self._waiting:
            self._running, self._waiting = self._answerer.answer(self._waiting), []
            found = next(self._running, None)
        return [found] if found else []

    def close(self) -> None:
        self._running = iter(())


def decoding_dtype(wanted: str, config: Mapping[str, Any], platform: str) -> Literal["float32", "bfloat16"]:
    """What the decoder computes in: `traces.vllm.dtype`; for `auto` the checkpoint's dtype, but fp32 on CPUs.

    Args:
      config: the checkpoint's `config.json`.
    """
    if wanted == "auto":
        own = config.get("dtype") or config.get("torch_dtype") or "float32"
        wanted = "float32" if platform == "cpu" else str(own).removeprefix("torch.")
    return "float32" if wanted == "float32" else "bfloat16"


class _Answerer:
    """A loaded model."""

    def __init__(self, checkpoint: Path, sampling: Sampling, batch: int, dtype: str):
        import jax

        from jaxdistill import hub
        from jaxdistill.models import load_hf
        from jaxdistill.models.adapters import base_of

        self._checkpoint, self._sampling, self._batch = checkpoint, sampling, batch
        dtype = decoding_dtype(dtype, hub.read_config(base_of(checkpoint)), jax.default_backend())
        self._model = load_hf(checkpoint, dtype=dtype, param_dtype=dtype)
        self._scorer = self._make_scorer() if sampling.logprobs else None

    def answer(self, requests: list[Request]) -> Iterator[Completion]:
        model, sampling, batch = self._model, self._sampling, self._batch
        scored = [request for request in requests if request.response_ids is not None]
        drawn = [request for request in requests if request.response_ids is None]
        if self._scorer is None:
            yield from _decoded(model, drawn, sampling, batch)
            return
        completions = itertools.chain(
            (Completion(id=r.id, output_ids=r.response_ids or [], finish_reason="stop") for r in scored),
            _decoded(model, drawn, sampling, batch),
        )
        by_id = {request.id: request for request in requests}
        while part := list(itertools.islice(completions, SCORED_AT_ONCE)):
            asked = [dataclasses.replace(by_id[c.id], response_ids=c.output_ids) for c in part]
            for index, found in self._scorer.score(asked):
                yield dataclasses.replace(part[index], logprobs=found)

    def _make_scorer(self) -> Scorer:
        from jaxdistill.traces.jax_scoring import Scorer

        sampling, size = self._sampling, TokenMap.of(self._checkpoint).size
        temperature = sampling.logprobs_temperature
        return Scorer(self._model, sampling.logprobs, size, random=sampling.random, temperature=temperature)


SCORED_AT_ONCE = 256


def _decoded(model: Decoder, requests: list[Request], sampling: Sampling, batch: int) -> Iterator[Completion]:
    if not requests:
        return
    from jaxdistill.generate import decode

    finished: Iterator[tuple[int, list[int], Literal["stop", "length"]]] = decode(
        model,
        [request.prompt_ids for request in requests],
        [request.seed for request in requests],
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        stop_ids=sampling.stop_ids,
        batch=batch,
    )
    for index, output_ids, reason in finished:
        yield Completion(id=requests[index].id, output_ids=output_ids, finish_reason=reason)
