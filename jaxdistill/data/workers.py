"""Tokenizing in several processes: chunks of traces in, arrays out, in the order of the chunks.

What comes out depends on the chunks alone, never on how many processes work. Processes are spawned, not forked, and
import no JAX.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import multiprocessing
import multiprocessing.connection
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow.parquet as pq

from jaxdistill.data.examples import ANSWER, PROMPT, THINKING, count_steps, tokenize
from jaxdistill.data.sources import Candidate
from jaxdistill.data.teacher import Beside, rows_beside
from jaxdistill.data.templates import Ending
from jaxdistill.data.topk import TopK
from jaxdistill.tokenization import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK_TRACES, CHUNK_CHARACTERS = 1000, 2_000_000
"""A chunk ends at whichever comes first."""
WORTH_A_PROCESS = 30_000_000
"""Characters; a process starts in about the time that it takes to tokenize so many."""


@dataclass(frozen=True)
class Prompting:
    """How the prompts of one source are made."""

    system: str | None
    suffix: str
    ending: Ending


@dataclass(frozen=True)
class Job:
    """What is the same for every chunk."""

    tokenizer: Path
    response: Literal["reasoning", "answer"]
    promptings: tuple[Prompting, ...]
    """One a source."""
    topk: TopK | None = None
    """How the teacher's distributions are kept, if they are."""
    teacher: Path | None = None
    """Its tokenizer, where it is not the student's."""

    def beside(self) -> Beside | None:
        """How they come beside the tokens; loads the teacher's tokenizer."""
        if self.topk is None:
            return None
        return Beside(self.topk, load_tokenizer(str(self.teacher)) if self.teacher else None)


@dataclass(frozen=True)
class Chunk:
    """Tokenized traces, one behind the other; N traces."""

    ids: list[str]
    sources: np.ndarray
    domains: list[str]
    pass_rates: np.ndarray
    tokens: np.ndarray
    """Of all traces, int32."""
    lengths: np.ndarray
    """[N, 3]: tokens of prompt, thinking and answer, which follow each other."""
    steps: np.ndarray
    ends_early: np.ndarray
    """Whether a token that ends a response also stands, or is quoted, inside it."""
    topk: np.ndarray | None = None
    """Of all tokens, the teacher's packed distributions beside them: uint8, see `data.topk`."""
    covered: np.ndarray | None = None
    """[N]: response tokens that have one."""


def chunks_of(candidates: Iterable[Candidate]) -> Iterator[list[Candidate]]:
    """Cuts the candidates into chunks that fit into memory, however long the traces are."""
    chunk: list[Candidate] = []
    characters = 0
    for candidate in candidates:
        chunk.append(candidate)
        characters += len(candidate.text.response) + len(candidate.text.problem)
        if len(chunk) == CHUNK_TRACES or characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def tokenize_chunk(
    tokenizer: PreTrainedTokenizerBase, job: Job, chunk: Sequence[Candidate], beside: Beside | None = None
) -> Chunk:
    """Tokenizes one chunk; pure."""
    examples = {}
    for source in sorted({c.source for c in chunk}):
        where = [i for i, c in enumerate(chunk) if c.source == source]
        prompting = job.promptings[source]
        made = tokenize(
            tokenizer,
            [chunk[i].text for i in where],
            response=job.response,
            ending=prompting.ending,
            system=prompting.system,
            suffix=prompting.suffix,
        )
        examples.update(zip(where, made, strict=True))
    tokens = [np.asarray(examples[i].tokens, np.int32) for i in range(len(chunk))]
    regions = [np.bincount(np.asarray(examples[i].regions), minlength=3) for i in range(len(chunk))]
    lengths = np.stack(regions)[:, [PROMPT, THINKING, ANSWER]].astype(np.int32)
    packed = covered = None
    if beside is not None:
        parts = [
            rows_beside(examples[i], c.text.response, tokenizer, c.drawn, beside)
            for i, c in enumerate(chunk)
            if c.drawn is not None
        ]
        packed, covered = np.concatenate(parts), np.array([part.any(1).sum() for part in parts])
    return Chunk(
        ids=[c.text.trace_id for c in chunk],
        sources=np.array([c.source for c in chunk], np.int32),
        domains=[c.domain for c in chunk],
        pass_rates=np.array([c.pass_rate for c in chunk]),
        tokens=np.concatenate(tokens),
        lengths=lengths,
        steps=np.array([count_steps(c.text.response, c.text.content) for c in chunk], np.int32),
        ends_early=np.array([examples[i].ends_early for i in range(len(chunk))]),
        topk=packed,
        covered=covered,
    )


def default_workers(traces: Iterable[Path]) -> int:
    """As many processes as there are processors, or fewer where the traces are not worth their start."""
    characters = 0
    for file in (file for folder in traces for file in folder.glob("*.parquet")):
        data = pq.read_metadata(file)
        for group in map(data.row_group, range(data.num_row_groups)):
            columns = map(group.column, range(group.num_columns))
            characters += sum(c.total_uncompressed_size for c in columns if c.path_in_schema == "response")
    return max(1, min(os.cpu_count() or 1, characters // WORTH_A_PROCESS))


def tokenized(chunks: Iterable[list[Candidate]], job: Job, workers: int) -> Iterator[Chunk]:
    """Every chunk tokenized, in order; with one worker in this process.

    Raises:
      ValueError: a trace that cannot be tokenized, or a process that died.
    """
    if workers == 1:
        tokenizer, beside = load_tokenizer(str(job.tokenizer)), job.beside()
        yield from (tokenize_chunk(tokenizer, job, chunk, beside) for chunk in chunks)
        return
    waiting = iter(chunks)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context, _start, (job,)) as pool:
        # a few chunks ahead, not all: the traces do not fit into memory
        pending = deque(pool.submit(_work, chunk) for chunk in itertools.islice(waiting, 2 * workers))
        try:
            while pending:
                done = pending.popleft().result()
                pending.extend(pool.submit(_work, chunk) for chunk in itertools.islice(waiting, 1))
                yield done
        except concurrent.futures.BrokenExecutor:
            raise ValueError(
                "a process that tokenizes has died, perhaps for want of memory; set data.workers lower."
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


# ------------------------------------------------------------------------------------- in a worker's process

_state: tuple[PreTrainedTokenizerBase, Job, Beside | None] | None = None


def _start(job: Job) -> None:
    """Loads the tokenizer once a process."""
    global _state
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _state = load_tokenizer(str(job.tokenizer)), job, job.beside()


def _die_with_parent() -> None:
    """A worker would wait for its next chunk for ever, if `prepare` was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _work(chunk: list[Candidate]) -> Chunk:
    assert _state is not None
    tokenizer, job, beside = _state
    return tokenize_chunk(tokenizer, job, chunk, beside)
