"""Logprobs of traces that exist already: the teacher reads them, one prefill each, and draws nothing.

Prompt and response are tokenized as the teacher would have them: the problem by its chat template, the response as it
stands, with eos. What is scored goes into the journal like what is drawn, so that a run can be killed and gone on with.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from jaxdistill import tokenization
from jaxdistill.config import TracesConfig, to_dict
from jaxdistill.progress import bar, say
from jaxdistill.records import Problem, RunDir, Trace
from jaxdistill.traces import engines, logprobs
from jaxdistill.traces.engines import Request, Sampling
from jaxdistill.traces.journal import Journal
from jaxdistill.traces.work import WorkList

CHUNK = 256


class Responses(Collection[Request]):
    """Requests to score traces, tokenized anew each time they are gone through: their ids would not fit into memory."""

    def __init__(self, work: WorkList, traces: Callable[[], Iterator[Trace]], tokenizer, skip: Callable[[str], bool]):
        self._work, self._traces, self._tokenizer, self._skip = work, traces, tokenizer, skip
        self._count = sum(not skip(trace.id) for trace in traces())

    def __len__(self) -> int:
        return self._count

    def __contains__(self, _) -> bool:
        return False

    def __iter__(self) -> Iterator[Request]:
        part: list[Trace] = []
        for trace in self._traces():
            if not self._skip(trace.id):
                part.append(trace)
            if len(part) == CHUNK:
                yield from self._requests(part)
                part = []
        yield from self._requests(part)

    def _requests(self, traces: list[Trace]) -> Iterator[Request]:
        encoded = tokenization.encode_responses(self._tokenizer, [trace.response for trace in traces])
        for trace, (ids, _) in zip(traces, encoded, strict=True):
            number = self._work.number_of(f"{trace.problem_id}/{self._work.styles[0].name}/0")
            assert number is not None
            yield Request(trace.id, self._work.request(number).prompt_ids, 0, response_ids=ids)


def score(
    config: TracesConfig,
    checkpoint: Path,
    origin: logprobs.Origin,
    problems: list[Problem],
    traces: Callable[[], Iterator[Trace]],
    folder: Path,
    *,
    journal: str,
    log: str,
    check: bool = False,
) -> Iterator[Trace]:
    """Scores traces by the teacher's prefill, and writes `logprobs/logprobs.parquet`.

    Returns:
      the traces, in their order, with the ids of prompt and response that the logprobs belong to; one whose scoring
      failed is as it was, and `traces.retry_failed` tries it again.
    Raises:
      ValueError: a trace does not fit into the teacher's context, or the journal is of other settings.
    """
    tokenizer = tokenization.load_tokenizer(str(checkpoint), day=RunDir(folder.parent).first_day(note=False))
    work = WorkList(dataclasses.replace(config, samples=1), problems, tokenizer)
    numbers = {trace.id: number for number, trace in enumerate(traces())}
    section = to_dict(config)
    keys = ("engine", "teacher", "styles", "system", "suffix", "logprobs", "scorer")
    keys += ("logprobs_kind", "logprobs_temperature")
    header = {f"traces.{key}": section[key] for key in keys}
    if config.scorer == "server":
        header["traces.server.model"] = section["server"]["model"]
    header |= {"the teacher's weights": origin.revision, "the rendered prompts": work.hashes()[1]}
    options = {"size": len(numbers), "number_of": numbers.get, "retry_failed": config.retry_failed}
    with Journal(folder / journal, header, **options) as found:
        requests = Responses(work, traces, tokenizer, lambda name: found.has(numbers[name]))
        sampling = Sampling(
            temperature=0.0,
            top_p=1.0,
            max_tokens=1,
            stop_ids=[],
            logprobs=config.logprobs,
            random=config.logprobs_kind == "random",
            logprobs_temperature=config.logprobs_temperature,
        )
        completions = engines.generate(
            config.scorer,
            checkpoint,
            requests,
            sampling,
            vllm=config.vllm,
            server=config.server,
            batch=config.batch,
            log=folder / log,
            executor=engines.executor_of(config, origin.revision),
            check=check,
        )
        with contextlib.closing(completions), bar("scored", len(numbers), done=len(found)) as update:
            for completion in completions:
                found.add(completion)
                update(len(found), "")
        if not found.answered:
            engines.check_answered(found.failures(), 0, config.asked_server)
        logprobs.write_logprobs(folder / logprobs.FOLDER, _scored(found, len(numbers)), origin)
        for trace in traces():
            completion = found.read(numbers[trace.id])
            if completion.error is None:
                number = work.number_of(f"{trace.problem_id}/{work.styles[0].name}/0")
                assert number is not None
                prompt_ids = work.request(number).prompt_ids
                trace = dataclasses.replace(trace, prompt_ids=prompt_ids, output_ids=completion.output_ids)
            yield trace


def _scored(found: Journal, count: int) -> Iterator[tuple[str, logprobs.TopLogprobs]]:
    """What was scored, in order; at the end it is said what could not be."""
    failed: list[str] = []
    failures = 0
    for number in range(count):
        completion = found.read(number)
        if completion.logprobs is not None:
            yield completion.id, completion.logprobs
        elif completion.error is not None:
            failures += 1
            failed = failed or [completion.id, completion.error]
    if failed:
        say(f"  {failures:,} of {count:,} traces could not be scored; the first is {failed[0]}: {failed[1]}")
