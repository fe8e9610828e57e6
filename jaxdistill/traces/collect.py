"""Stage `generate`: a teacher answers every problem, and nothing that it has answered is lost.

The list of work is a pure function of config and problems. Each finished sample is a line in `journal.jsonl` at once;
a run that was killed reads the journal and asks only for what is missing. `traces.parquet` is written at the end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxdistill import hub, tokenization
from jaxdistill.config import RunConfig, TracesConfig, to_dict
from jaxdistill.progress import bar, say
from jaxdistill.records import Problem, RunDir, Trace, count_records, read_records, split_response
from jaxdistill.traces import engines, hub_sets, imports, logprobs, resample, scoring, thinking
from jaxdistill.traces.engines import Completion, Sampling
from jaxdistill.traces.journal import Journal
from jaxdistill.traces.output import write_traces
from jaxdistill.traces.problems import rows_of
from jaxdistill.traces.work import Requests, WorkList

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

JOURNAL = "journal.jsonl"
VLLM_LOG = "vllm.log"
NO_SOLUTION = (
    "traces.engine: import takes the problems' own solutions, but none of {count} problems has one; use a source that "
    "has responses (demo, gsm8k, messages, sharegpt, r1, prompt_completion), or let a teacher write them "
    "(traces.engine: vllm)."
)


def generate(config: RunConfig, run: RunDir) -> dict[str, Any]:
    """Stage: writes `traces.parquet`, one row a sample, in the order of problems, styles and sample numbers.

    Raises:
      ValueError: no problems, a prompt that does not fit, an engine that cannot run, or a journal of another config.
    """
    if config.traces.engine == "import":
        return _import(config, run)
    problems = list(read_records(run.problems, Problem))
    check_gold(config, problems)
    teacher = find_teacher(config.traces, run.first_day())
    work = WorkList(config.traces, problems, teacher.tokenizer, resample.read_counts(run.traces))
    with Journal(
        run.traces / JOURNAL,
        _header(config.traces, work, teacher.revision),
        size=len(work),
        number_of=work.number_of,
        retry_failed=config.traces.retry_failed,
    ) as journal:
        resumed = len(journal)
        timings = _collect(config, teacher, work, journal, run.traces / VLLM_LOG)
        if not journal.answered:
            engines.check_answered(journal.failures(), 0, config.traces.asked_server)
        counts = _write_all(config.traces, teacher, work, journal, run.traces)
    day = {} if teacher.tokenizer is None else {"day": tokenization.day_of(teacher.tokenizer)}
    return counts | {"resumed": resumed} | day | timings


@dataclasses.dataclass(frozen=True)
class Teacher:
    """Who is asked."""

    checkpoint: Path
    tokenizer: PreTrainedTokenizerBase | None
    """None where a chat server renders the prompts."""
    revision: str


def find_teacher(config: TracesConfig, day: str | None = None) -> Teacher:
    """The teacher's checkpoint; of one that runs on other machines only the tokenizer, or nothing but the name.

    Args:
      day: for a chat template that writes the date; today if absent.
    """
    assert config.teacher is not None
    if config.engine == "server" and config.server.api == "chat" and not config.server.start:
        return Teacher(Path(config.teacher), None, config.revision or "")
    remote = config.executor == "ray" or (config.asked == "server" and not config.server.start)
    checkpoint = hub.fetch(config.teacher, config.revision, weights=not remote)
    chat = config.engine == "server" and config.server.api == "chat"
    tokenizer = None if chat else tokenization.load_tokenizer(str(checkpoint), day=day)
    known = (checkpoint / "config.json").is_file()
    return Teacher(checkpoint, tokenizer, hub.revision_of(checkpoint) if known else config.revision or "")


def check_gold(config: RunConfig, problems: list[Problem]) -> None:
    """Says before anything is paid for that `verify` could keep nothing of problems without a gold answer.

    Raises:
      ValueError: that is so of all of them.
    """
    without = [problem for problem in problems if not (problem.answer or "").strip() and not problem.tests]
    if not config.verify.answer or config.verify.majority is not None or not without:
        return
    advice = "name the answers with problems.answer_field, or set verify.answer: false"
    if len(without) == len(problems):
        raise ValueError(f"none of {len(problems)} problems has a gold answer, which verify.answer needs; {advice}.")
    say(
        f"  {len(without):,} of {len(problems):,} problems have no gold answer (the first is {without[0].id}), so that "
        f"verify will keep none of their traces; {advice}"
    )


def _header(config: TracesConfig, work: WorkList, revision: str) -> dict[str, Any]:
    """What must not change between a journal's lines. How fast and on what the teacher ran may."""
    section = to_dict(config)
    # think_tags: how what was drawn is written down; to correct it nobody need be asked again
    for key in ("batch", "retry_failed", "until_kept", "max_samples", "executor", "ray", "think_tags"):
        del section[key]
    vllm, server = section.pop("vllm"), section.pop("server")
    if config.until_kept:  # then it is how many to draw at a time
        del section["samples"]
    problems, prompts = work.hashes()
    header = {
        **{f"traces.{key}": value for key, value in section.items()},
        **{f"traces.vllm.{key}": vllm[key] for key in ("dtype", "quantization")},
        "the teacher's weights": revision,
        "the problems": problems,
        "the rendered prompts": prompts,
    }
    if config.engine == "server":
        header |= {f"traces.server.{key}": server[key] for key in ("api", "model")}
        header |= {f"traces.server.{key}": server[key] for key in ("extra", "omit") if server[key]}
    return header


# ------------------------------------------------------------------------------------------------------- the samples


def _collect(run: RunConfig, teacher: Teacher, work: WorkList, journal: Journal, log: Path) -> dict[str, Any]:
    """Draws what the journal does not have yet. Gives the timings, which are about these samples alone."""
    config = run.traces
    if len(journal):
        say(f"  {len(journal):,} of {len(work):,} samples are in the journal already")
    stop = tokenization.stop_ids(teacher.checkpoint, teacher.tokenizer) if teacher.tokenizer else []
    sampling = Sampling(
        temperature=config.temperature,
        top_p=config.top_p,
        max_tokens=config.max_tokens,
        stop_ids=stop,
        logprobs=config.logprobs,
        random=config.logprobs_kind == "random",
        logprobs_temperature=config.logprobs_temperature,
    )
    start = ready = last = time.monotonic()

    def is_ready() -> None:
        nonlocal ready
        ready = time.monotonic()

    completions = engines.generate(
        config.engine,
        teacher.checkpoint,
        Requests(work, journal.missing()),
        sampling,
        vllm=config.vllm,
        server=config.server,
        batch=config.batch,
        log=log,
        ready=is_ready,
        executor=engines.executor_of(config, teacher.revision),
        check=run.student.check,
    )
    done, tokens, ended = len(journal), 0, Counter()
    with contextlib.closing(completions), bar("traces", len(work), done=done) as update:
        for completion in completions:
            done += journal.add(completion)
            tokens += completion.output_tokens
            ended[completion.finish_reason] += 1
            last = time.monotonic()
            update(done, _note(tokens, ended, len(work) - done, last - ready))
    return {
        "seconds": round(time.monotonic() - start, 2),
        "engine_start_seconds": round(ready - start, 2),
        "tokens_per_second": round(tokens / (last - ready), 1) if last > ready else 0.0,
    }


def _note(tokens: int, ended: Counter[str], left: int, seconds: float) -> str:
    """What the progress says beside the count: speed, tokens spent, how samples end, and the time that is left."""
    drawn = sum(ended.values())
    minutes = left / drawn * seconds / 60
    rest = (
        f"{minutes * 60:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
    )
    failed = f", {ended['error']:,} failed" if ended["error"] else ""
    return (
        f"{tokens / max(seconds, 1e-9):,.0f} tokens/s, {tokens:,} tokens, "
        f"{ended['stop'] / drawn:.1%} ended by themselves{failed}, {rest} left"
    )


# -------------------------------------------------------------------------------------------------------- the files


def _write_all(
    config: TracesConfig, teacher: Teacher, work: WorkList, journal: Journal, folder: Path
) -> dict[str, Any]:
    """From the journal to the stage's files, few traces in memory at a time."""
    if config.logprobs:
        origin = origin_of(config, teacher)
        logprobs.write_logprobs(folder / logprobs.FOLDER, _all_logprobs(work, journal), origin)
    return write_traces(folder, (_trace(config, teacher, work, number, journal) for number in range(len(work))))


def origin_of(config: TracesConfig, teacher: Teacher) -> logprobs.Origin:
    """Whose logprobs are collected."""
    assert config.teacher is not None
    tokens = tokenization.TokenMap.of(teacher.checkpoint)
    return logprobs.Origin(
        config.teacher,
        teacher.revision,
        tokens.fingerprint,
        tokens.size,
        random=config.logprobs_kind == "random",
        temperature=config.logprobs_temperature,
    )


def _all_logprobs(work: WorkList, journal: Journal) -> Iterator[tuple[str, logprobs.TopLogprobs]]:
    for number in range(len(work)):
        completion = journal.read(number)
        if completion.logprobs is not None:
            yield completion.id, completion.logprobs


def _trace(config: TracesConfig, teacher: Teacher, work: WorkList, number: int, journal: Journal) -> Trace:
    assert config.teacher is not None
    item, request, completion = work[number], work.request(number), journal.read(number)
    response = _response(config, teacher, completion, opened=work.opened(number))
    thoughts, content = split_response(response)
    return Trace(
        id=request.id,
        problem_id=item.problem.id,
        style=item.style.name,
        sample=item.sample,
        engine=config.engine,
        teacher=config.teacher,
        revision=teacher.revision,
        temperature=config.temperature,
        top_p=config.top_p,
        max_tokens=config.max_tokens,
        seed=request.seed,
        prompt_ids=completion.prompt_ids or request.prompt_ids,
        output_ids=completion.output_ids,
        response=response,
        thinking=thoughts,
        content=content,
        finish_reason=completion.finish_reason,
        error=completion.error,
    )


def _response(config: TracesConfig, teacher: Teacher, completion: Completion, *, opened: bool) -> str:
    if completion.finish_reason == "error":
        return completion.text or ""
    if completion.text is not None:
        text = completion.text
    else:
        assert teacher.tokenizer is not None
        tags = ("<think>", "</think>", *config.think_tags)
        text = tokenization.decode_response(teacher.tokenizer, completion.output_ids, tags)
    return thinking.normalize(text, config.think_tags, opened=opened)


# ---------------------------------------------------------------------------------------------------------- import


def _import(config: RunConfig, run: RunDir) -> dict[str, Any]:
    """Takes the responses that came with the problems for traces; no model is asked, and few are in memory at once."""
    with_one = 0

    def read() -> Iterator[Trace]:
        nonlocal with_one
        with_one = 0
        for problem, responses in _responses(config, run):
            with_one += bool(responses)
            for sample, response in responses:
                yield imports.to_trace(problem.id, sample, response, problem.source, config.traces)
        if not with_one:
            raise ValueError(NO_SOLUTION.format(count=count_records(run.problems)))

    traces = read()
    if config.traces.logprobs:
        asked = [problem for problem, responses in _responses(config, run) if responses]
        if not asked:
            raise ValueError(NO_SOLUTION.format(count=count_records(run.problems)))
        teacher = find_teacher(config.traces, run.first_day())
        more = {"journal": JOURNAL, "log": VLLM_LOG, "check": config.student.check}
        origin = origin_of(config.traces, teacher)
        traces = scoring.score(config.traces, teacher.checkpoint, origin, asked, read, run.traces, **more)
    counts = write_traces(run.traces, traces)
    return counts | {"without_solution": count_records(run.problems) - with_one}


def _responses(config: RunConfig, run: RunDir) -> Iterator[tuple[Problem, list[tuple[int, str]]]]:
    """Every problem with its (sample number, response)s; sets of other shapes have at most one solution a problem."""
    found = read_records(run.problems, Problem)
    if config.problems.source not in imports.FORMATS:
        return ((problem, [(0, problem.solution)] if problem.solution else []) for problem in found)
    rows = rows_of(config.problems, run.problems / hub_sets.PINNED)
    return imports.paired(rows, found, config.problems, config.traces.think_tags)
