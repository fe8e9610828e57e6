"""Decodes any number of prompts in a fixed number of rows; a row that has ended is given to the next prompt at once.

A row's output is a pure function of its prompt, its seed and the sampling parameters. Rows do not see each other, and
whatever is computed has a shape that no other prompt changes: prompts are prefilled in groups of one size, padded to a
width that follows from their own length, and decoded in `batch` rows, used or not. The one shape that follows from
others is the cache's length, and longer caches add zeros to the same sums (see `attention.cached`).
"""

from __future__ import annotations

import dataclasses
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Literal

from jaxdistill.generate.rows import CHUNK, Engine, Entry, Prefilled, Rows, Sampler
from jaxdistill.models import Decoder
from jaxdistill.models.attention import platform_of

Finished = tuple[int, list[int], Literal["stop", "length"]]
"""(index, output ids with the stop token, why it ended)"""

PREFILL_TOKENS = {"cpu": 512, "gpu": 4096, "tpu": 4096}
"""Tokens of prompts that are prefilled at once; with few of them, a GPU would mostly start kernels."""

SLOTS = 64
"""The shortest cache; longer ones are `bucket`s of it."""

WIDTH = 32
"""What the shortest prompts are padded to; likewise."""

LANE_ROWS = 8
"""Rows that are worth a thread of their own on CPUs, at least."""


@dataclasses.dataclass(frozen=True)
class Request:
    index: int
    seed: int
    sample: int
    limit: int


@dataclasses.dataclass
class Prompt:
    """A prompt with all requests for it; it is prefilled once."""

    ids: Sequence[int]
    requests: list[Request]


def decode(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    *,
    max_tokens: int | Sequence[int],
    temperature: float,
    top_p: float = 1.0,
    top_k: int = 0,
    samples: int = 1,
    stop_ids: Sequence[int],
    batch: int = 256,
) -> Iterator[Finished]:
    """Yields (index, output ids with the stop token, `stop` or `length`) in the order in which rows end.

    Sample j of prompt i has the index i * samples + j. Equal prompts are prefilled once. Other weights of the same
    config compile nothing.

    Args:
      seeds: one a prompt, 0..2**32-1; unused where `temperature` is 0 (greedy).
      max_tokens: of all outputs, or one number a prompt.
      top_p: a nucleus with at least this share of the probability; 1 is all.
      top_k: the most probable tokens to choose from; 0 is all.
      samples: how many outputs a prompt, each with a random stream of its own.
      stop_ids: tokens that end an output.
      batch: rows decoded at once, rounded up to what the mesh or the threads share evenly. Other numbers of rows may
        round sums differently, on most devices.
    Raises:
      ValueError: a parameter out of its range, or a prompt that does not fit into the model's context.
    """
    limits = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else list(max_tokens)
    _check(model, prompts, seeds, limits, temperature, top_p, top_k, samples, stop_ids, batch)
    sampler = Sampler(temperature=float(temperature), top_p=float(top_p), top_k=top_k, stop_ids=tuple(stop_ids))
    found: dict[tuple[int, ...], Prompt] = {}
    for i, prompt in enumerate(prompts):
        requests = [Request(i * samples + j, seeds[i], j, limits[i]) for j in range(samples)]
        found.setdefault(tuple(prompt), Prompt(prompt, [])).requests.extend(requests)
    return _decode(model, sampler, list(found.values()), batch)


def _check(model, prompts, seeds, limits, temperature, top_p, top_k, samples, stop_ids, batch) -> None:
    vocab, context = model.config.vocab_size, model.config.max_position_embeddings
    for name, value, least in (("top_k", top_k, 0), ("samples", samples, 1), ("batch", batch, 1)):
        if value < least:
            raise ValueError(f"{name} is {value}; set {least} or more.")
    if not temperature >= 0:
        raise ValueError(f"temperature is {temperature}; set 0 (greedy) or more.")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; set a share above 0, and 1 for all tokens.")
    for name, values in (("seeds", seeds), ("max_tokens", limits)):
        if len(values) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts and {len(values)} {name}; give one a prompt.")
    wrong = next((i for i in stop_ids if not 0 <= i < vocab), None)
    if wrong is not None:
        raise ValueError(f"stop id {wrong} is not one of the model's {vocab} tokens; take stop ids of its tokenizer.")
    for i, (prompt, seed, limit) in enumerate(zip(prompts, seeds, limits, strict=True)):
        if not 0 <= seed < 2**32:
            raise ValueError(f"prompt {i}: seed {seed} is not in 0..2**32-1.")
        if not len(prompt):
            raise ValueError(f"prompt {i} is empty; begin it with one token at least, as the start token.")
        if limit < 1:
            raise ValueError(f"prompt {i}: max_tokens is {limit}; set 1 or more.")
        if len(prompt) + limit > context:
            raise ValueError(
                f"prompt {i}: {len(prompt)} tokens + max_tokens={limit} > {context}, the model's context; "
                "lower max_tokens, or leave the prompt out."
            )
        if not 0 <= min(prompt) <= max(prompt) < vocab:
            raise ValueError(f"prompt {i} has a token that is not one of the model's {vocab}; take its own tokenizer.")


def _decode(model: Decoder, sampler: Sampler, prompts: list[Prompt], batch: int) -> Iterator[Finished]:
    if not prompts:
        return
    ways = 1 if model.mesh is None else model.mesh.shape["data"] * model.mesh.shape["fsdp"]
    lanes = _lanes(model, batch)
    size = -(-batch // (ways * lanes)) * ways
    queue = _Queue(Engine(model, sampler), prompts, size, ways)
    working: dict[Future, _Lane] = {}
    idle = [_Lane(queue, size) for _ in range(lanes)]
    # one thread a lane waits for its device; all else happens in this one
    with ThreadPoolExecutor(lanes, "decode") as pool:
        while True:
            for lane in idle:
                if lane.refill():
                    working[pool.submit(lane.rows.run, lane.goes_on())] = lane
            if not working:
                return
            finished, _ = wait(working, return_when=FIRST_COMPLETED)
            idle = [working.pop(future) for future in finished]
            for future, lane in zip(finished, idle, strict=True):
                yield from lane.harvest(*future.result())


def _lanes(model: Decoder, batch: int) -> int:
    """Batches that are decoded side by side: one, but on a CPU, whose small matrix products keep one core busy each."""
    if model.mesh is not None or platform_of(None) != "cpu":
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, batch // LANE_ROWS))


def bucket(tokens: int, least: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, ... times `least`: every size is compiled once."""
    size = least
    while size < tokens:
        size *= 2
    smaller = size // 4 * 3
    return smaller if smaller >= tokens and smaller % least == 0 else size


class _Queue:
    """Prompts that wait for a row: they are prefilled a whole group at a time, and handed out one by one."""

    def __init__(self, engine: Engine, prompts: list[Prompt], size: int, ways: int):
        self.engine, self.size, self.ways = engine, size, ways
        # prompts of one width follow each other, so that groups are full
        self._waiting = deque(sorted(prompts, key=lambda prompt: bucket(len(prompt.ids), WIDTH)))
        self._prefilled: Prefilled | None = None
        self._ready: deque[tuple[int, int, Request]] = deque()

    @property
    def is_empty(self) -> bool:
        return not self._waiting and not self._ready

    def take(self, count: int) -> tuple[Prefilled, list[tuple[int, int, Request]]] | None:
        """Up to `count` of (source, tokens of the prompt, request), of one group; None if no prompt waits."""
        if not self._ready:
            if not self._waiting:
                return None
            self._prefilled = self._prefill()
        assert self._prefilled is not None
        taken = [self._ready.popleft() for _ in range(min(count, len(self._ready)))]
        return self._prefilled, taken

    def _prefill(self) -> Prefilled:
        width = bucket(len(self._waiting[0].ids), WIDTH)
        tokens = PREFILL_TOKENS[platform_of(self.engine.model.mesh)]
        rows = -(-max(1, min(self.size, tokens // width)) // self.ways) * self.ways
        group = []
        while self._waiting and len(group) < rows and bucket(len(self._waiting[0].ids), WIDTH) == width:
            group.append(self._waiting.popleft())
        self._ready.extend((i, len(p.ids), request) for i, p in enumerate(group) for request in p.requests)
        return self.engine.prefill([prompt.ids for prompt in group], rows=rows, width=width)


@dataclasses.dataclass
class _Work:
    """A request that a row works on."""

    request: Request
    length: int
    """Tokens in the cache."""
    output: list[int] = dataclasses.field(default_factory=list)


class _Lane:
    """A batch of rows, and what each of them is working on."""

    def __init__(self, queue: _Queue, size: int):
        self.queue = queue
        self.rows = Rows(queue.engine, size, SLOTS)
        self.work: list[_Work | None] = [None] * size

    def refill(self) -> bool:
        """Gives every free row to a request, as long as there are any; False if no row has work."""
        free = [row for row, work in enumerate(self.work) if work is None]
        plan = []
        while free and (found := self.queue.take(len(free))):
            prefilled, taken = found
            entries = []
            for source, length, request in taken:
                row = free.pop()
                self.work[row] = _Work(request, length)
                entries.append(Entry(row, source, length, request.limit, request.seed, request.sample))
            plan.append((prefilled, entries))
        longest = max((work.length for work in self.work if work), default=0)
        if longest:
            self._fit(longest + self.rows.begun + CHUNK)
        for prefilled, entries in plan:
            self.rows.insert(prefilled, entries)
        return longest > 0

    def goes_on(self) -> bool:
        """Whether the chunk after the next one is sure to be wanted just as it is: no prompt waits for a row, a row has
        tokens to go after the chunks that have begun, if it does not stop before, and the cache has the room."""
        if not self.queue.engine.ahead or not self.queue.is_empty:
            return False
        working = [work for work in self.work if work]
        longest = max(work.length for work in working)
        wanted = any(max(1, len(work.output)) + CHUNK < work.request.limit for work in working)
        return wanted and longest + 2 * CHUNK <= self.rows.slots

    def _fit(self, slots: int) -> None:
        """Makes room for a chunk more; a cache that is much too long is cut, for every step reads all of it."""
        if slots > self.rows.slots or 2 * bucket(slots, SLOTS) <= self.rows.slots:
            self.rows.resize(bucket(slots, SLOTS))

    def harvest(self, tokens, counts, dones) -> Iterator[Finished]:
        """Takes in the tokens of a chunk, and yields the requests that are done."""
        for row, work in enumerate(self.work):
            if work is None:
                continue
            new = int(counts[row]) - len(work.output)
            # a row that was filled before the chunk has its first token from then
            first = 1 if work.output else 0
            work.output += tokens[row, first : first + new].tolist()
            work.length += CHUNK
            if dones[row]:
                self.work[row] = None
                stopped = work.output[-1] in self.queue.engine.sampler.stop_ids
                yield work.request.index, work.output, "stop" if stopped else "length"
