"""Who grades what the student has sampled, where the teacher is not on the mesh: servers, by one prefill an answer.

The first process asks, and all get the same grades.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jaxdistill import hub
from jaxdistill.config import RunConfig, TracesConfig
from jaxdistill.data.examples import PROMPT
from jaxdistill.data.packing import Row, unpack
from jaxdistill.export.writer import by_the_writer
from jaxdistill.parallel import processes
from jaxdistill.records import RunDir
from jaxdistill.tokenization import TokenMap
from jaxdistill.traces.engines import Completion, Request, Sampling
from jaxdistill.train.distill import SERVED, same_vocabulary, served_shapes

Place = tuple[int, int]
"""(row, position) of an answer's first token."""


@runtime_checkable
class Grader(Protocol):
    """A teacher that is elsewhere."""

    def __call__(self, rows: Row) -> Row:
        """What the teacher says of rows [N, T]: `distill.SERVED`, by name.

        Raises:
          ValueError: it could not be asked.
        """
        ...

    def close(self) -> None:
        """Ends what it has started."""


class ByServers:
    """vLLM's servers, some of our own perhaps, which are started when they are asked for the first time."""

    def __init__(
        self, traces: TracesConfig, checkpoint: Path, *, topk: int, vocabulary: int, row_tokens: int, log: Path
    ):
        """
        Args:
          checkpoint: the teacher's folder, which needs weights only where the servers are our own.
          vocabulary: tokens at or above it are padded columns, of which the student knows nothing.
        """
        from jaxdistill.traces.server_engine import Fleet  # its client is imported where there are servers

        sampling = Sampling(temperature=0.0, top_p=1.0, max_tokens=1, stop_ids=[], logprobs=topk)
        self._fleet = Fleet(checkpoint, sampling, vllm=traces.vllm, server=traces.server, log=log, longest=row_tokens)
        self._topk, self._vocabulary = topk, vocabulary

    def __call__(self, rows: Row) -> Row:
        found = by_the_writer(lambda: self._ask(rows))
        return processes.from_first(no_grades(rows["tokens"].shape, self._topk) if found is None else found)

    def _ask(self, rows: Row) -> Row:
        requests, places = to_grade(rows)
        grades = no_grades(rows["tokens"].shape, self._topk)
        with contextlib.closing(self._fleet.ask(requests)) as completions:
            for completion in completions if requests else ():
                if completion.error is not None:
                    raise ValueError(
                        f"train.on_policy: the teacher's servers could not grade an answer ({completion.error}); see "
                        "to them, then run this again: it goes on from the newest checkpoint."
                    )
                write_grade(grades, places[completion.id], completion, self._vocabulary)
        return grades

    def close(self) -> None:
        self._fleet.close()


def set_up_grader(
    config: RunConfig, run: RunDir, row_tokens: int, columns: int
) -> tuple[int | None, Grader | None, dict[str, Any]]:
    """(number of real tokens, the servers, what identifies the teacher), each empty where it is not behind servers.

    Args:
      columns: of the student's projection.
    Raises:
      ValueError: a teacher of another tokenizer.
    """
    own, traces = config.train.on_policy, config.traces
    if own is None or own.grader == "online":
        return None, None, {}
    name = traces.teacher
    assert name is not None
    folder = hub.fetch(name, traces.revision, weights=traces.server.start > 0)
    vocabulary = same_vocabulary(TokenMap.of(run.tokenizer), TokenMap.of(folder), name, columns)
    log = run.root / "vllm-teacher.log"
    grader = ByServers(traces, folder, topk=own.topk, vocabulary=vocabulary, row_tokens=row_tokens, log=log)
    return vocabulary, grader, {"teacher": {"name": name, "revision": traces.revision}}


def to_grade(rows: Row) -> tuple[list[Request], dict[str, Place]]:
    """Requests to score the answers of rows [N, T], and where each stands, by the request's id; none for empty ones."""
    requests: list[Request] = []
    places: dict[str, Place] = {}
    for number in range(len(rows["tokens"])):
        start = 0
        for tokens, regions in unpack({name: array[number] for name, array in rows.items()}):
            prompt = regions.count(PROMPT)
            if prompt < len(tokens):
                name = f"{number}/{start}"
                requests.append(Request(name, tokens[:prompt], 0, response_ids=tokens[prompt:]))
                places[name] = number, start + prompt
            start += len(tokens)
    return requests, places


def no_grades(shape: tuple[int, int], k: int) -> Row:
    """`distill.SERVED` of rows [N, T] of which nothing is known."""
    found: Row = {name: np.zeros((*shape, *more), np.float32) for name, more in served_shapes(k).items()}
    return found | {SERVED[0]: np.full((*shape, k), -1, np.int32)}


def write_grade(grades: Row, place: Place, completion: Completion, vocabulary: int) -> None:
    """Writes what was said of one answer to its place."""
    said, (row, first) = completion.logprobs, place
    assert said is not None
    where = row, slice(first, first + len(said.sampled))
    values = np.where(said.ids < vocabulary, said.ids, -1), said.logprobs, said.sampled
    for name, value in zip(SERVED, values, strict=True):
        grades[name][where] = value
