"""The stage `prepare`: kept traces -> packed rows of tokens.

Tokenizing goes chunk by chunk into a scratch file, in several processes where it pays; packing looks at lengths alone;
rows are written one after the other. So memory does not grow with the length of the traces, and what comes out does not
depend on the number of processes. A stage that was killed starts anew, and writes the same.
"""

from __future__ import annotations

import json
import shutil
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jaxdistill import hub, progress, served
from jaxdistill.config import DataConfig, RunConfig
from jaxdistill.data import (
    curriculum,
    packing,
    pairs,
    rows,
    sources,
    stored,
    summary,
    tasks,
    templates,
    topk,
    workers,
)
from jaxdistill.data.order import Group, Layout, Order
from jaxdistill.data.store import Examples, scratch
from jaxdistill.records import RunDir, Verdict, atomic_file, atomic_folder, read_records, write_json
from jaxdistill.tokenization import PROMPTS, config_stops, load_tokenizer, stop_ids

ORIGINS = "origins.parquet"
ROUND = 128
"""`overlong: keep` makes rows as long as the longest example, rounded up to a multiple of this, as devices like it."""


def prepare(config: RunConfig, run: RunDir, shared: RunDir) -> dict[str, Any]:
    """Tokenizes and packs every kept trace.

    Args:
      run: where tokens are written: the run's own folder, or a baseline's.
      shared: the run's folder, with problems, traces and verdicts.
    Returns:
      counts: what `summary.count` says, and what was dropped or left out.
    Raises:
      ValueError: nothing kept, an overlong example under `overlong: error`, rows or tokens that the student cannot
        take, a mixture or a curriculum that does not fit the traces.
    """
    data = config.data
    _check_context(config, data.row_tokens, "data.row_tokens")
    shutil.rmtree(run.tokens, ignore_errors=True)  # of a process that was killed
    taken = sources.select(data, shared)
    prepare_tokenizer(config, run, shared)
    codec, readers = stored.plan(data, run, taken)
    job = _job(data, run, codec, stored.teacher_tokenizer(data, readers))
    with scratch(run.tokens, len(sources.sources_of(data))) as store:
        total = sum(len(part.source_of) for part in taken)
        chunks = workers.chunks_of(tasks.expand(sources.candidates(taken, readers, data.edit), data.tasks))
        number = data.workers or workers.default_workers(part.run.traces for part in taken)
        done, lengths = 0, array("q")
        with progress.bar("tokenize", total) as update:
            for chunk in workers.tokenized(chunks, job, number):
                lengths.extend(chunk.lengths.sum(1, dtype=np.int64).tolist())
                _refuse_overlong(chunk, data)
                store.add(chunk, data.row_tokens if data.overlong == "drop" else None)
                # of a trace cut into tasks the last part may come with the next chunk
                done = min(total, done + len({name.partition("#")[0] for name in chunk.ids}))
                update(done, f"{number} processes" if number > 1 else "")
        if not lengths:
            raise ValueError(
                f"data.tasks: none of {total:,} kept traces gives an example; add a task of kind trace, or keep traces "
                "that think."
            )
        if not len(store):
            dropped = store.overlong.total(), store.ends_early.total()
            raise ValueError(all_dropped(total, np.array(lengths), *dropped, data.row_tokens, _context(config)))
        examples = store.finish()
        counts = _pack(config, run.tokens, examples) | {
            "overlong_dropped": store.overlong.total(),
            "early_eos_dropped": store.ends_early.total(),
            "day": shared.first_day(),
        }
        if codec is not None and readers is not None:
            counts["topk"] = stored.finish(run, codec, readers, store.covered / int(examples.lengths[:, 1:].sum()))
    if data.tasks:
        counts["steps"] = tasks.write_steps(run.tokens, sources.candidates(taken, edit=data.edit))
    if data.pairs is not None:
        counts["pairs"] = pairs.write_pairs(data, run, taken, job, counts["row_tokens"])
    left_out = sum((part.left_out for part in taken), start=type(taken[0].left_out)())
    if left_out:
        counts["left_out"] = dict(sorted(left_out.items()))
        text = ", ".join(f"{n:,} of {domain}" for domain, n in counts["left_out"].items())
        progress.say(f"  kept traces that no source of data.mixture wants: {text}")
    summary.tell(counts, data.curriculum, config.train)
    return counts


def prepare_tokenizer(config: RunConfig, run: RunDir, shared: RunDir) -> None:
    """Puts the student's tokenizer into the run folder, so that every later stage uses the very same one."""
    start = config.student.init
    if start is not None and hub.is_checkpoints(start):  # of another run, whose tokenizer lies beside them
        start = str(hub.local(start).parent / "tokenizer")
    name = config.student.tokenizer or start or config.traces.teacher
    if name is None:
        raise ValueError(
            "student.tokenizer is missing; name a folder or repository id, or `train` to make one from the traces."
        )
    template = templates.template_text(config.data.chat_template) if config.data.chat_template else None
    with atomic_folder(run.tokenizer) as folder:
        if name == "train":
            from jaxdistill.data.tokenizer import train_tokenizer

            train_tokenizer(folder, _texts(config.data, shared), config.student.tokenizer_vocab)
        else:
            source = hub.fetch(name, config.student.revision if name == config.student.init else None, weights=False)
            if template is None and not _has_template(source):
                raise ValueError(
                    f"{name}: the student's tokenizer has no chat template, as base models' often have none; set "
                    f"data.chat_template: {' or '.join(templates.BUILT_IN)}, or a file with one."
                )
            for file in sorted(source.iterdir()):
                if file.suffix in (".jinja", ".txt", ".model") or file.name in (
                    "tokenizer.json",
                    "tokenizer_config.json",
                    "special_tokens_map.json",
                ):
                    shutil.copyfile(file, folder / file.name)
            write_json(folder / "generation_config.json", {"eos_token_id": config_stops(source)})
        if template is not None:
            _drop_templates(folder)
            (folder / "chat_template.jinja").write_text(template)
        write_json(folder / PROMPTS, {"day": shared.first_day()})
        changed = served.settle(folder, _model_type(config))
        if changed is not None:
            progress.say(f"  the student's tokenizer: {changed}")
        if start is not None and name != start:
            _add_stops(folder, hub.fetch(start, config.student.revision, weights=False))


def _add_stops(folder: Path, init: Path) -> None:
    """Stops of the student's start, whose generation config is exported: they count if they are of this tokenizer."""
    tokenizer = load_tokenizer(str(folder))
    known, more = stop_ids(folder, tokenizer), config_stops(init)
    if set(known) & set(more):
        write_json(folder / "generation_config.json", {"eos_token_id": sorted({*known, *more})})


def _drop_templates(folder: Path) -> None:
    """Of the places where a template may stand, programs look into different ones first."""
    for file in [*folder.glob("*.jinja"), folder / "chat_template.json"]:
        file.unlink(missing_ok=True)
    path = folder / "tokenizer_config.json"
    if path.is_file():
        settings = json.loads(path.read_text())
        if settings.pop("chat_template", None) is not None:
            write_json(path, settings)


def _model_type(config: RunConfig) -> str:
    """By which transformers chooses a tokenizer's class."""
    if config.student.architecture is not None:
        return config.student.architecture.model_type
    return str(_init_config(config).get("model_type", ""))


@dataclass(frozen=True, slots=True)
class _Prompt:
    """The column of a `records.Problem` that a tokenizer learns from."""

    prompt: str


def check_student(config: RunConfig, folder: Path) -> None:
    """What `prepare` would refuse of the student's context, tokenizer and template, before there is a trace.

    Args:
      folder: an empty one, for the tokenizer's files.
    Raises:
      ValueError: as `prepare`.
    """
    _check_context(config, config.data.row_tokens, "data.row_tokens")
    if config.student.tokenizer == "train":
        return  # made of the traces, with a template of its own
    run = RunDir(folder)
    prepare_tokenizer(config, run, run)
    _job(config.data, run, None, None)
    known = _init_config(config).get("vocab_size") if config.student.init is not None else None
    if known is not None and (tokens := len(load_tokenizer(str(run.tokenizer)))) > known:  # as `train` has it
        raise ValueError(f"{config.student.init}: {known} embeddings for a tokenizer of {tokens} tokens.")


def _texts(data: DataConfig, shared: RunDir) -> Iterator[str]:
    """The text that a new tokenizer learns from: problems and kept traces of all the runs."""
    runs = {run.root.resolve(): run for run in (sources.run_of(s, shared) for s in sources.sources_of(data))}
    for run in runs.values():
        kept = {v.trace_id for v in read_records(run.verdicts, Verdict) if v.kept}
        for problem in read_records(run.problems, _Prompt):
            yield problem.prompt
        for trace in read_records(run.traces, sources.TraceText):
            if trace.id in kept:
                yield trace.response


def _job(data: DataConfig, run: RunDir, codec: topk.TopK | None, of_teacher: Path | None) -> workers.Job:
    """How every trace is tokenized; looks at one prompt of each source."""
    tokenizer = load_tokenizer(str(run.tokenizer))
    promptings = []
    for source in sources.sources_of(data):
        system = data.system if source.system is None else source.system
        suffix = data.suffix if source.suffix is None else source.suffix
        ending = templates.check_template(tokenizer, data.response, system, suffix)
        promptings.append(workers.Prompting(system, suffix, ending))
    return workers.Job(run.tokenizer, data.response, tuple(promptings), codec, of_teacher)


def _has_template(folder: Path) -> bool:
    settings = folder / "tokenizer_config.json"
    named = json.loads(settings.read_text()) if settings.is_file() else {}
    return (folder / "chat_template.jinja").is_file() or bool(named.get("chat_template"))


def _refuse_overlong(chunk: workers.Chunk, data: DataConfig) -> None:
    lengths = chunk.lengths.sum(1)
    if data.overlong == "error" and (lengths > data.row_tokens).any():
        first = int(np.argmax(lengths > data.row_tokens))
        raise ValueError(
            f"{chunk.ids[first]}: {lengths[first]} tokens > data.row_tokens={data.row_tokens}; raise it, or set "
            "data.overlong: drop (counted), or keep (all rows as long as the longest example)."
        )


def all_dropped(
    traces: int, lengths: np.ndarray, overlong: int, ends_early: int, row_tokens: int, context: int | None
) -> str:
    """What to say, and to do, where not one example is left.

    Args:
      lengths: tokens of every example that was made of the traces.
      context: the student's.
    """
    shortest, median, longest = int(lengths.min()), int(np.median(lengths)), int(lengths.max())
    says = f"all {traces:,} kept traces were dropped: {overlong:,} longer than data.row_tokens={row_tokens}"
    says += f", {ends_early:,} with a token inside that ends a turn" if ends_early else ""
    says += f"; they have {shortest:,} / {median:,} / {longest:,} tokens (shortest, median, longest)"
    if not overlong:
        return f"{says}; take that token out of the traces, or use another tokenizer."
    if context is not None and shortest > context:
        return f"{says}, and the student's context is {context:,}; use a student with a longer one, or shorter traces."
    rows = min(-(-longest // ROUND) * ROUND, context or longest)
    return f"{says}; raise data.row_tokens, to {rows} for all that fit."


def _check_context(config: RunConfig, row_tokens: int, what: str) -> None:
    """Rows within the student's context, before anything is tokenized."""
    context = _context(config)
    if context is not None and row_tokens > context:
        raise ValueError(f"{what}={row_tokens} is beyond the student's context of {context}; lower it.")


def _context(config: RunConfig) -> int | None:
    """Positions that the student knows; None where its config does not say."""
    if config.student.architecture is not None:
        return config.student.architecture.max_position_embeddings
    return _init_config(config).get("max_position_embeddings")


def _init_config(config: RunConfig) -> dict[str, Any]:
    """The shape of `student.init` in Hugging Face's names, its text part where it has several."""
    assert config.student.init is not None
    if hub.is_checkpoints(config.student.init):
        return json.loads((hub.local(config.student.init) / hub.SHAPE).read_text())
    from jaxdistill.models.adapters import base_of  # imports JAX

    found = hub.read_config(base_of(hub.fetch(config.student.init, config.student.revision, weights=False)))
    return found.get("text_config", found)


def _check_vocabulary(config: RunConfig, examples: Examples) -> None:
    if config.student.init is None:
        return  # a student from scratch gets as many embeddings as the tokenizer has tokens
    vocabulary = _init_config(config).get("vocab_size")
    if vocabulary is not None and examples.largest_token >= vocabulary:
        raise ValueError(
            f"{config.student.init}: {vocabulary} embeddings, and the traces have the token id "
            f"{examples.largest_token}; use the checkpoint's own tokenizer."
        )


# -------------------------------------------------------------------------------------------------- packing


def _pack(config: RunConfig, folder: Path, examples: Examples) -> dict[str, Any]:
    """Writes rows, their order and their origins; returns the counts."""
    data = config.data
    _check_vocabulary(config, examples)
    row_tokens = data.row_tokens
    if examples.totals.max() > row_tokens:  # under `overlong: keep` alone
        row_tokens = -(-int(examples.totals.max()) // ROUND) * ROUND
        progress.say(f"  data.overlong: keep makes rows of {row_tokens} tokens instead of {data.row_tokens}")
        _check_context(config, row_tokens, "data.overlong: keep: the row length")
    mixture = sources.sources_of(data)
    phase_of, values = _phases(data, examples)
    groups, members, packed = [], [], []
    for source in range(len(mixture)):
        for phase in range(int(phase_of.max()) + 1):
            where = np.flatnonzero((examples.sources == source) & (phase_of == phase))
            found = packing.best_fit(examples.totals[where], row_tokens)
            groups.append(Group(source, phase, len(packed), len(found)))
            members.append(where)
            packed += [where[row].tolist() for row in found]
    empty = [s.name for k, s in enumerate(mixture) if not sum(g.rows for g in groups if g.source == k)]
    if empty:
        raise ValueError(f"data.mixture: every trace of {empty[0]} was dropped as overlong; raise data.row_tokens.")
    layout = Layout(
        groups=tuple(groups),
        sources=tuple(s.name for s in mixture),
        weights=tuple(s.weight for s in mixture if s.weight is not None) or None,
        passes=_passes(data, phase_of),
        cumulative=data.curriculum is not None and data.curriculum.cumulative,
    )
    with atomic_file(folder / rows.FILE) as temporary:
        rows.write_rows(temporary, _filled(examples, packed, row_tokens))
    write_json(folder / rows.ORDER, layout.to_dict())
    _write_origins(folder / ORIGINS, examples, packed, layout)
    counts = summary.count(examples, layout, row_tokens, members) | {"most_segments": max(map(len, packed))}
    if layout.passes:
        starts = Order(layout, seed=0).starts
        for phase, part in enumerate(counts["phases"]):
            mine = values[phase_of == phase]
            ends = (mine.max(), mine.min()) if data.curriculum and data.curriculum.by == "pass_rate" else None
            part["easiest"], part["hardest"] = (float(x) for x in ends or (mine.min(), mine.max()))
            part["begins"], part["ends"] = starts[phase], starts[phase + 1]
    return counts


def _filled(examples: Examples, packed: list[list[int]], row_tokens: int) -> Iterator[packing.Row]:
    with progress.bar("pack", len(packed)) as update:
        for done, row in enumerate(packed, start=1):
            yield packing.fill_row([examples.example(i) for i in row], row_tokens)
            if done % 64 == 0:
                update(done, "")


def _phases(data: DataConfig, examples: Examples) -> tuple[np.ndarray, np.ndarray]:
    """(phase of every example, the value it goes by)."""
    if data.curriculum is None:
        return np.zeros(len(examples), np.int64), np.zeros(len(examples))
    values = {
        "tokens": examples.lengths[:, 1:].sum(1),
        "steps": examples.steps,
        "pass_rate": examples.pass_rates,
    }[data.curriculum.by]
    return curriculum.phases_of(data.curriculum, values, examples.totals), values


def _passes(data: DataConfig, phase_of: np.ndarray) -> tuple[int, ...]:
    if data.curriculum is None:
        return ()
    return tuple(p.passes for p in data.curriculum.phases) or (1,) * (int(phase_of.max()) + 1)


def _write_origins(path: Path, examples: Examples, packed: list[list[int]], layout: Layout) -> None:
    """A table of which trace stands where: one line a segment."""
    order = np.array([i for row in packed for i in row])
    sizes = [len(row) for row in packed]
    table = {
        "row": np.repeat(np.arange(len(packed)), sizes),
        "segment": np.concatenate([np.arange(1, n + 1) for n in sizes]),
        "trace_id": pa.array([examples.ids[i] for i in order]),
        "tokens": examples.totals[order],
        "source": pa.array([layout.sources[k] for k in examples.sources[order]]),
    }
    with atomic_file(path) as temporary:
        pq.write_table(pa.table(table), temporary, compression="zstd")
