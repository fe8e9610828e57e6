"""The engine `jax`: the embedded decoder, in this process."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from jaxdistill.config import VLLMConfig
from jaxdistill.traces.engines import Completion, Request, Sampling

if TYPE_CHECKING:
    from typing import Literal


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
    from jaxdistill.generate import decode
    from jaxdistill.models import load_hf

    requests = list(requests)
    model = load_hf(checkpoint, dtype="float32")
    ready()
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
