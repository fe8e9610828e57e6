"""Which kept traces are learned from, and to which source of the mixture each belongs."""

from __future__ import annotations

import difflib
import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from jaxdistill.config import DataConfig, EditConfig, SourceConfig, TakeConfig
from jaxdistill.data import selection
from jaxdistill.data.examples import Text
from jaxdistill.data.selection import VerdictText
from jaxdistill.data.teacher import Drawn, Reader
from jaxdistill.records import RunDir, read_manifest, read_records


@dataclass(frozen=True, slots=True)
class TraceText:
    """The columns of a `records.Trace` that are tokenized; its token ids would fill the memory."""

    id: str
    problem_id: str
    response: str
    content: str


@dataclass(frozen=True, slots=True)
class TraceTokens(TraceText):
    """What is looked at beside it where the teacher's distributions are kept."""

    engine: str
    teacher: str
    revision: str
    output_ids: list[int]


class Problems:
    """Prompts and domains by problem id; the prompts stay in Arrow's memory, which is compact."""

    def __init__(self, folder: Path):
        files = sorted(folder.glob("*.parquet"))
        if not files:
            raise ValueError(f"{folder}: no Parquet files; run the stage that makes them first.")
        table = pa.concat_tables(pq.read_table(f, columns=["id", "prompt", "domain"]) for f in files)
        self.index = {name: i for i, name in enumerate(table["id"].to_pylist())}
        self._prompts = table["prompt"].cast(pa.large_string()).combine_chunks()
        domains = table["domain"].combine_chunks().dictionary_encode()
        if isinstance(domains, pa.ChunkedArray):  # it is one, exactly if there are no rows
            domains = pa.array([], pa.string()).dictionary_encode()
        self.domains: list[str] = domains.dictionary.to_pylist()
        self._domain = domains.indices.to_numpy(zero_copy_only=False)

    def prompt(self, problem_id: str) -> str:
        return self._prompts[self.index[problem_id]].as_py()

    def domain(self, problem_id: str) -> str:
        return self.domains[self._domain[self.index[problem_id]]]


@dataclass(slots=True)
class Taken:
    """What is taken from one run."""

    run: RunDir
    problems: Problems
    source_of: dict[str, int] = field(default_factory=dict)
    """Kept trace -> number of its source."""
    samples: Counter[str] = field(default_factory=Counter)
    """Problem -> traces, kept or not."""
    correct: Counter[str] = field(default_factory=Counter)
    """Problem -> traces whose answer is right, kept or not."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Domain -> kept traces that no source wants."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A kept trace on its way to become an example."""

    text: Text
    source: int
    domain: str
    pass_rate: float
    drawn: Drawn | None = None


def sources_of(data: DataConfig) -> tuple[SourceConfig, ...]:
    """The mixture's sources; without a mixture one, with everything."""
    return data.mixture or (SourceConfig(name="all"),)


def run_of(source: SourceConfig, shared: RunDir) -> RunDir:
    """The run that a source's traces are of."""
    return shared if source.run is None else RunDir(Path(source.run).expanduser())


def select(data: DataConfig, shared: RunDir) -> list[Taken]:
    """Assigns kept traces to sources, run by run, by their verdicts alone.

    Raises:
      ValueError: nothing kept, a run that is not verified, an unknown domain, a source without traces, or a trace that
        two sources want.
    """
    sources = sources_of(data)
    taken = []
    for folder in dict.fromkeys(run_of(s, shared).root.resolve() for s in sources):
        mine = {k: s for k, s in enumerate(sources) if run_of(s, shared).root.resolve() == folder}
        run = run_of(next(iter(mine.values())), shared)
        if folder != shared.root.resolve() and read_manifest(run.verdicts) is None:
            raise ValueError(f"data.mixture: {run.root} has no finished verdicts; run `jaxdistill verify` on it first.")
        taken.append(_select_of_run(run, mine, data.take))
    return taken


def _select_of_run(run: RunDir, sources: dict[int, SourceConfig], take: TakeConfig) -> Taken:
    taken = Taken(run, Problems(run.problems))
    wants = {domain: [k for k in sources if domain in sources[k].domains] for domain in taken.problems.domains}
    everything = [k for k in sources if not sources[k].domains]
    for source in sources.values():
        for domain in source.domains:
            if domain not in wants:
                raise ValueError(_unknown_domain(source.name, domain, run.problems, taken.problems.domains))
    kept = 0
    chosen = selection.limited(run, take, read_records(run.verdicts, VerdictText))
    for verdict in read_records(run.verdicts, VerdictText):
        taken.samples[verdict.problem_id] += 1
        taken.correct[verdict.problem_id] += verdict.outcome == "correct"
        if not selection.wants(verdict, take) or (chosen is not None and verdict.trace_id not in chosen):
            continue
        kept += 1
        if verdict.problem_id not in taken.problems.index:
            raise ValueError(
                f"{run.problems}: no problem {verdict.problem_id}, of which {verdict.trace_id} is a trace."
            )
        if verdict.trace_id in taken.source_of:
            raise ValueError(f"{run.verdicts}: two kept traces have the id {verdict.trace_id}; collect them again.")
        domain = taken.problems.domain(verdict.problem_id)
        by = wants[domain] + everything
        if len(by) > 1:
            both = " and ".join(sources[k].name for k in by[:2])
            raise ValueError(
                f"data.mixture: both {both} want {verdict.trace_id} (domain {domain}); part them by domain."
            )
        if by:
            taken.source_of[verdict.trace_id] = by[0]
        else:
            taken.left_out[domain] += 1
    if not kept:
        if take != TakeConfig():
            raise ValueError(f"{run.verdicts}: no trace is what data.take asks for ({take.verdicts}); take others.")
        raise ValueError(
            f"{run.verdicts}: not one trace was kept, so there is nothing to train on; the verdicts say why."
        )
    counts = Counter(taken.source_of.values())
    for k, source in sources.items():
        if not counts[k]:
            raise ValueError(f"data.mixture: {source.name} has no kept trace in {run.root}; leave it out.")
        if source.max_examples is not None and counts[k] > source.max_examples:
            _cap(taken.source_of, k, source.max_examples)
    return taken


def _cap(source_of: dict[str, int], source: int, most: int) -> None:
    """Leaves a source `most` traces: those with the lowest hashes, whatever order they came in."""
    mine = [name for name, k in source_of.items() if k == source]
    mine.sort(key=lambda name: (hashlib.blake2b(name.encode(), digest_size=16).digest(), name))
    for name in mine[most:]:
        del source_of[name]


def _unknown_domain(source: str, domain: str, folder: Path, known: list[str]) -> str:
    near = difflib.get_close_matches(domain, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known)) or 'none'}."
    return f"data.mixture: {source} wants the domain {domain}, which no problem of {folder} has; {hint}"


def candidates(
    taken: list[Taken], readers: list[Reader] | None = None, edit: EditConfig | None = None
) -> Iterator[Candidate]:
    """Every kept trace that a source wants, edited if so asked, in the order of the runs and of their files.

    Args:
      readers: of the teacher's distributions, one a run, where they are kept.
    Raises:
      ValueError: a trace that is there twice, or not at all, or whose distributions are not its own.
    """
    donors = selection.donors(((part.run.traces, part.source_of) for part in taken), edit)
    for number, part in enumerate(taken):
        seen: set[str] = set()
        for trace in read_records(part.run.traces, TraceText if readers is None else TraceTokens):
            source = part.source_of.get(trace.id)
            if source is None:
                continue
            if trace.id in seen:
                raise ValueError(f"{part.run.traces}: two traces have the id {trace.id}; collect them again.")
            seen.add(trace.id)
            response, content = selection.edited(trace.id, trace.response, trace.content, edit, donors)
            yield Candidate(
                Text(trace.id, part.problems.prompt(trace.problem_id), response, content),
                source,
                part.problems.domain(trace.problem_id),
                part.correct[trace.problem_id] / part.samples[trace.problem_id],
                None if readers is None else readers[number].of(trace),
            )
        missing = part.source_of.keys() - seen
        if missing:
            raise ValueError(
                f"{part.run.traces}: {len(missing):,} traces with verdicts are not there ({min(missing)} is one); "
                "verify again."
            )
