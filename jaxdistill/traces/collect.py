"""Stage `generate`: a teacher answers every problem, and nothing that it has answered is lost.

The list of work is a pure function of config and problems. Each finished sample is a line in `journal.jsonl` at once;
a run that was killed reads the journal and asks only for what is missing. `traces.parquet` is written at the end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxdistill import hub, tokenization
from jaxdistill.config import RunConfig, TracesConfig, fingerprint, to_dict
from jaxdistill.progress import bar, say
from jaxdistill.records import Problem, RunDir, Trace, read_records, split_response, write_records
from jaxdistill.traces import engines
from jaxdistill.traces.engines import Completion, Request, Sampling
from jaxdistill.traces.journal import Journal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STYLE = "plain"
TRACES = "traces.parquet"
JOURNAL = "journal.jsonl"
VLLM_LOG = "vllm.log"


def generate(config: RunConfig, run: RunDir) -> dict[str, Any]:
    """Stage: writes `traces.parquet`, one row a sample, in the order of problems and sample numbers.

    Raises:
      ValueError: no problems, a prompt that does not fit, an engine that cannot run, or a journal of another config.
    """
    problems = list(read_records(run.problems, Problem))
    if config.traces.engine == "import":
        return _import(problems, run)
    assert config.traces.teacher is not None
    checkpoint = hub.fetch(config.traces.teacher, config.traces.revision)
    tokenizer = tokenization.load_tokenizer(str(checkpoint))
    revision = hub.revision_of(checkpoint)
    work = plan_work(config.traces, problems, tokenizer)
    with Journal(run.traces / JOURNAL, _header(config.traces, work, revision)) as journal:
        resumed = len(journal.done)
        counts = _collect(config.traces, checkpoint, tokenizer, work, journal, run.traces / VLLM_LOG)
        done = journal.done
    traces = [_trace(config.traces, item, done[item.request.id], revision, tokenizer) for item in work]
    write_records(run.traces / TRACES, Trace, traces)
    return _summary(traces, resumed=resumed) | counts


# ------------------------------------------------------------------------------------------------- the work to do


@dataclasses.dataclass(frozen=True)
class Work:
    """One sample that is to be drawn."""

    problem: Problem
    sample: int
    request: Request


def plan_work(config: TracesConfig, problems: list[Problem], tokenizer: PreTrainedTokenizerBase) -> list[Work]:
    """All samples of all problems, in order; a problem's samples lie side by side, so that they share its prompt."""
    work = []
    for problem in problems:
        prompt_ids = tokenization.render_prompt(tokenizer, problem.prompt, system=config.system, suffix=config.suffix)
        for sample in range(config.samples):
            name = trace_id(problem, sample)
            work.append(Work(problem, sample, Request(name, prompt_ids, sample_seed(config.seed, name))))
    return work


def trace_id(problem: Problem, sample: int) -> str:
    return f"{problem.id}/{STYLE}/{sample}"


def sample_seed(seed: int, name: str) -> int:
    """A trace's own seed in 0..2**31-1: the same on every machine, and whatever else there is to do."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:4]) >> 1


def _header(config: TracesConfig, work: list[Work], revision: str) -> dict[str, Any]:
    """What must not change between a journal's lines. How fast and on what the teacher ran may."""
    section = to_dict(config)
    del section["batch"]
    vllm = section.pop("vllm")
    return {
        **{f"traces.{key}": value for key, value in section.items()},
        **{f"traces.vllm.{key}": vllm[key] for key in ("dtype", "quantization")},
        "the teacher's weights": revision,
        "the problems": fingerprint([[item.problem.id, item.problem.prompt] for item in work]),
        "the rendered prompts": fingerprint([item.request.prompt_ids for item in work]),
    }


# ------------------------------------------------------------------------------------------------------- the stage


def _collect(
    config: TracesConfig,
    checkpoint: Path,
    tokenizer: PreTrainedTokenizerBase,
    work: list[Work],
    journal: Journal,
    log: Path,
) -> dict[str, Any]:
    """Draws what the journal does not have yet. Gives the timings, which are about these samples alone."""
    missing = [item.request for item in work if item.request.id not in journal.done]
    if len(missing) < len(work):
        say(f"  {len(work) - len(missing):,} of {len(work):,} samples are in the journal already")
    sampling = Sampling(
        temperature=config.temperature,
        top_p=config.top_p,
        max_tokens=config.max_tokens,
        stop_ids=tokenization.stop_ids(checkpoint, tokenizer),
    )
    start = ready = last = time.monotonic()

    def is_ready() -> None:
        nonlocal ready
        ready = time.monotonic()

    completions = engines.generate(
        config.engine, checkpoint, missing, sampling, vllm=config.vllm, batch=config.batch, log=log, ready=is_ready
    )
    tokens = 0
    with contextlib.closing(completions), bar("traces", len(work), done=len(journal.done)) as update:
        for completion in completions:
            journal.add(completion)
            tokens += len(completion.output_ids)
            last = time.monotonic()
            update(len(journal.done), f"{tokens / max(last - ready, 1e-9):,.0f} tokens/s")
    return {
        "seconds": round(time.monotonic() - start, 2),
        "engine_start_seconds": round(ready - start, 2),
        "tokens_per_second": round(tokens / (last - ready), 1) if last > ready else 0.0,
    }


def _trace(
    config: TracesConfig, item: Work, completion: Completion, revision: str, tokenizer: PreTrainedTokenizerBase
) -> Trace:
    assert config.teacher is not None
    response = tokenization.decode_response(tokenizer, completion.output_ids)
    thinking, content = split_response(response)
    return Trace(
        id=item.request.id,
        problem_id=item.problem.id,
        style=STYLE,
        sample=item.sample,
        engine=config.engine,
        teacher=config.teacher,
        revision=revision,
        temperature=config.temperature,
        top_p=config.top_p,
        max_tokens=config.max_tokens,
        seed=item.request.seed,
        prompt_ids=item.request.prompt_ids,
        output_ids=completion.output_ids,
        response=response,
        thinking=thinking,
        content=content,
        finish_reason=completion.finish_reason,
        error=completion.error,
    )


def _import(problems: list[Problem], run: RunDir) -> dict[str, Any]:
    """Takes the solutions that came with the problems for traces; no model is asked."""
    traces = [_imported(problem, problem.solution) for problem in problems if problem.solution]
    if not traces:
        raise ValueError(
            f"traces.engine: import takes the problems' own solutions, but none of {len(problems)} problems has one; "
            "use source demo or gsm8k, or let a teacher write them (traces.engine: vllm)."
        )
    write_records(run.traces / TRACES, Trace, traces)
    return _summary(traces, without_solution=len(problems) - len(traces))


def _imported(problem: Problem, solution: str) -> Trace:
    thinking, content = split_response(solution)
    return Trace(
        id=trace_id(problem, 0),
        problem_id=problem.id,
        style=STYLE,
        sample=0,
        engine="import",
        teacher=problem.source,
        revision="",
        temperature=0.0,
        top_p=1.0,
        max_tokens=0,
        seed=0,
        prompt_ids=[],
        output_ids=[],
        response=solution,
        thinking=thinking,
        content=content,
        finish_reason="imported",
    )


def _summary(traces: list[Trace], **more: int) -> dict[str, Any]:
    """Counts of a finished stage, said in one line too."""
    finished = dict(sorted(Counter(trace.finish_reason for trace in traces).items()))
    tokens = sum(len(trace.output_ids) for trace in traces)
    say(
        f"  {len(traces):,} traces ({', '.join(f'{count:,} {reason}' for reason, count in finished.items())})"
        + (f", {tokens:,} tokens" if tokens else "")
    )
    return {"samples": len(traces), "finished": finished, "output_tokens": tokens, **more}
