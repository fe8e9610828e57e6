"""Draws every model's responses to a set of items, by any of the engines."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from jaxdistill import tokenization
from jaxdistill.config import BenchmarkConfig, EvaluateConfig
from jaxdistill.evals.benchmarks import Item
from jaxdistill.evals.subjects import Subject
from jaxdistill.progress import bar, say
from jaxdistill.traces import engines

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class Drawing:
    """How a set's responses are drawn."""

    samples: int
    seeds: int
    seed: int
    temperature: float
    top_p: float
    max_tokens: int

    @property
    def total(self) -> int:
        """Responses a problem. Number s belongs to the seed `seed + s // samples`."""
        return self.samples * self.seeds


@dataclasses.dataclass(frozen=True)
class TestSet:
    """Items that all models answer in the same way, and where their scores lie, a folder a model."""

    name: str
    title: str
    items: list[Item]
    drawing: Drawing
    folder: Path


@dataclasses.dataclass(frozen=True)
class Response:
    """What one model said to one item."""

    item: Item
    sample: int
    text: str
    completion: engines.Completion


def drawing_of(settings: EvaluateConfig, benchmark: BenchmarkConfig | None = None) -> Drawing:
    """The section's settings, with what a benchmark has instead."""

    def of(name: str):
        own = getattr(benchmark, name) if benchmark else None
        return getattr(settings, name) if own is None else own

    return Drawing(of("samples"), settings.seeds, settings.seed, of("temperature"), settings.top_p, of("max_tokens"))


def draw(
    subject: Subject, tokenizer: PreTrainedTokenizerBase, sets: list[TestSet], settings: EvaluateConfig
) -> dict[str, tuple[list[Response], float]]:
    """All responses of one model to some sets, in the order of items and samples, and the seconds that each set took.

    Sets that are drawn alike go into the engine together, which is then started once; its seconds, from the loaded
    model to the last response, are shared out among them by tokens.
    """
    groups: dict[tuple, list[TestSet]] = {}
    for each in sets:
        key = (each.drawing.temperature, each.drawing.top_p, each.drawing.max_tokens)
        groups.setdefault(key, []).append(each)
    found = {}
    for group in groups.values():
        found |= _draw_group(subject, tokenizer, group, settings)
    return found


def _draw_group(
    subject: Subject, tokenizer: PreTrainedTokenizerBase, sets: list[TestSet], settings: EvaluateConfig
) -> dict[str, tuple[list[Response], float]]:
    drawing = sets[0].drawing
    requests: list[engines.Request] = []
    for each in sets:
        # instructions of code and choices say themselves how to answer; a math problem is asked as it is used to be
        for suffixed in (True, False):
            items = [item for item in each.items if (item.scorer == "math") == suffixed]
            prompts = tokenization.render_prompts(
                tokenizer,
                [item.problem.prompt for item in items],
                system=subject.system,
                suffix=subject.suffix if suffixed else "",
            ) if items else []  # fmt: skip
            for item, ids in zip(items, prompts, strict=True):
                for sample in range(each.drawing.total):
                    requests.append(_request(each, item, sample, ids))
    sampling = engines.Sampling(
        temperature=drawing.temperature,
        top_p=drawing.top_p,
        max_tokens=drawing.max_tokens,
        stop_ids=tokenization.stop_ids(subject.checkpoint, tokenizer),
    )
    completions, seconds = _sample(subject, requests, sampling, settings)
    tokens = {each.name: 0 for each in sets}
    responses: dict[str, list[Response]] = {each.name: [] for each in sets}
    for each in sets:
        for item in each.items:
            for sample in range(each.drawing.total):
                completion = completions[_id(each, item, sample)]
                text = completion.text
                if text is None:
                    text = tokenization.decode_response(tokenizer, completion.output_ids)
                responses[each.name].append(Response(item, sample, text, completion))
                tokens[each.name] += completion.output_tokens
    total = max(1, sum(tokens.values()))
    return {name: (responses[name], seconds * tokens[name] / total) for name in responses}


def _id(each: TestSet, item: Item, sample: int) -> str:
    prefix = "" if each.name == "heldout" else f"{each.name}:"
    return f"{prefix}{item.problem.id}/{sample}"


def _request(each: TestSet, item: Item, sample: int, prompt_ids: list[int]) -> engines.Request:
    drawing = each.drawing
    seed = drawing.seed + sample // drawing.samples
    return engines.Request(
        _id(each, item, sample), prompt_ids, sample_seed(seed, item.problem.id, sample % drawing.samples)
    )


def _sample(
    subject: Subject, requests: list[engines.Request], sampling: engines.Sampling, settings: EvaluateConfig
) -> tuple[dict[str, engines.Completion], float]:
    """All completions by request id, and the seconds from the loaded model to the last of them."""
    started = time.monotonic()

    def ready() -> None:
        nonlocal started
        started = time.monotonic()

    found: dict[str, engines.Completion] = {}
    tokens = 0
    completions = engines.generate(
        settings.engine,
        subject.checkpoint,
        requests,
        sampling,
        vllm=settings.vllm,
        batch=settings.batch,
        ready=ready,
        server=settings.server if settings.engine == "server" else None,
    )
    with bar(subject.name, len(requests)) as update, contextlib.closing(completions):
        for completion in completions:
            found[completion.id] = completion
            tokens += completion.output_tokens
            update(len(found), f"{tokens / max(time.monotonic() - started, 1e-9):,.0f} tokens/s")
    seconds = time.monotonic() - started
    assert len(found) == len(requests), f"{len(found)} completions of {len(requests)} requests"
    failures = Counter(completion.error for completion in found.values() if completion.error is not None)
    if failures:
        server = settings.server if settings.engine == "server" else None
        engines.check_answered(failures, len(found) - failures.total(), server)
        reason, times = failures.most_common(1)[0]
        say(f"  {failures.total():,} requests failed and count as wrong; most often ({times:,}): {reason}")
    return found, seconds


def sample_seed(seed: int, problem_id: str, sample: int) -> int:
    """One seed a sample, in 0..2**31-1, that no other problem or sample number changes."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{problem_id}/{sample}".encode()).digest()[:4]) >> 1
