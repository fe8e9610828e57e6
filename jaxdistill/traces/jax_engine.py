"""The engine `jax`: the embedded decoder, in this process."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from jaxdistill.config import VLLMConfig
from jaxdistill.tokenization import TokenMap
from jaxdistill.traces.engines import Completion, Request, Sampling

if TYPE_CHECKING:
    from typing import Literal

    from jaxdistill.models import Decoder


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
    """See `engines.generate`; `vllm` and `log` are of no use here."""
    del vllm, log
    from jaxdistill.models import load_hf

    requests = list(requests)
    model = load_hf(checkpoint, dtype="float32")
    ready()
    scored = [request for request in requests if request.response_ids is not None]
    drawn = [request for request in requests if request.response_ids is None]
    if not sampling.logprobs:
        yield from _decoded(model, drawn, sampling, batch)
        return
    from jaxdistill.traces.jax_scoring import Scorer

    size, temperature = TokenMap.of(checkpoint).size, sampling.logprobs_temperature
    scorer = Scorer(model, sampling.logprobs, size, random=sampling.random, temperature=temperature)
    completions = itertools.chain(
        (Completion(id=r.id, output_ids=r.response_ids or [], finish_reason="stop") for r in scored),
        _decoded(model, drawn, sampling, batch),
    )
    by_id = {request.id: request for request in requests}
    while part := list(itertools.islice(completions, SCORED_AT_ONCE)):
        asked = [dataclasses.replace(by_id[c.id], response_ids=c.output_ids) for c in part]
        for index, found in scorer.score(asked):
            yield dataclasses.replace(part[index], logprobs=found)


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
