"""The room that a run takes on its disk, from counts and sizes, against what is free."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from jaxdistill import hub
from jaxdistill.config import ArchitectureConfig, ProblemsConfig, RunConfig, with_baseline
from jaxdistill.preflight.finding import Finding
from jaxdistill.preflight.repositories import config_of
from jaxdistill.records import RunDir

LINES = 1000
"""Of a file, that are read to tell how many it has."""
TRACE_BYTES = 9
"""Of a sampled token: in the journal and in the traces, as id and as text; an upper bound, as both are compressed or
short."""
LOGPROB_BYTES = 8
"""Of one token's logprob: its id and the value; twice, in the journal and in its table."""
ROW_BYTES = 10
"""Of one packed token: id, region, segment and position."""
OPTIMIZER_BYTES = {"adamw": 8, "muon": 6, "adafactor": 1}
"""Of a parameter's moments in fp32; of Muon's matrices one of two, of Adafactor rows and columns alone."""


def check(config: RunConfig) -> Iterator[Finding]:
    """Whether there is room for traces, rows, checkpoints and exports."""
    folder = Path(config.run_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    runs = [config, *(with_baseline(config, name) for name in config.baselines)]
    sizes = [student_bytes(each) for each in runs]
    known = [size for size in sizes if size is not None]
    yield from compare(
        shutil.disk_usage(folder).free + _written(RunDir(Path(config.run_dir))),
        traces_bytes(config, problems_of(config.problems)),
        sum(known) if len(known) == len(sizes) else None,
        str(folder),
    )


def _written(run: RunDir) -> int:
    """Bytes of checkpoints and exports that are there, and would be replaced."""
    folders = (run.checkpoints, run.export, run.root / "baselines")
    return sum(file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file())


def compare(free: int, traces: int | None, students: int | None, where: str) -> Iterator[Finding]:
    """What to say of so many bytes; None where they are not known. Those of traces are an upper bound.

    Nothing is said where neither is known.
    """
    parts = {"checkpoints and exports take about": students, "traces and rows at most": traces}
    known = [f"{what} {_size(size)}" for what, size in parts.items() if size is not None]
    if not known:  # nobody learns from how much is free
        return
    says = f"{_size(free)} of space are free at {where}; {', '.join(known)}"
    if students is None:
        says += "; the student's size is not known"
    if (students or 0) > free:
        yield Finding("disk", "error", f"{says}; make room, name another run_dir, or lower train.keep_checkpoints.")
    elif (students or 0) + (traces or 0) > free:
        yield Finding("disk", "warning", f"{says}; if traces get that long, it will not do.")
    else:
        yield Finding("disk", "ok" if students is not None else "unchecked", says)


def _size(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"


def problems_of(section: ProblemsConfig) -> int | None:
    """How many problems there are, by the size of their file; None where that does not say it."""
    if section.count is not None:
        return section.count
    path = Path(section.path or "").expanduser()
    if "://" in str(section.path) or not path.is_file():
        return None
    if path.suffix == ".parquet":
        try:
            return pq.read_metadata(path).num_rows
        except (OSError, pa.ArrowException):  # for the stage to say
            return None
    if path.suffix != ".jsonl":
        return None
    with open(path, "rb") as file:
        lines = list(itertools.islice(file, LINES))
    return round(path.stat().st_size * len(lines) / sum(map(len, lines))) if lines else 0


def traces_bytes(config: RunConfig, problems: int | None) -> int | None:
    """An upper bound for journal, traces, logprobs and packed rows of so many problems; None where nobody can tell."""
    traces = config.traces
    if problems is None or traces.engine == "import":
        return None
    drawn = problems * len(traces.styles) * max(traces.samples, traces.max_samples or 0)
    of_token = TRACE_BYTES + 2 * LOGPROB_BYTES * traces.logprobs + ROW_BYTES * (1 + len(config.baselines))
    return drawn * traces.max_tokens * of_token


def student_bytes(config: RunConfig) -> int | None:
    """Checkpoints, one more that is being written, and the export; None where the student's shape is not known."""
    shape = _shape(config)
    if not shape:
        return None
    whole = parameters(shape)
    lora = config.student.lora
    trained = adapter_parameters(shape, lora.rank) if lora else whole
    train = config.train
    checkpoints = train.keep_checkpoints + train.keep_best + 1
    moments = OPTIMIZER_BYTES[train.optimizer.name]
    adapter = config.export.lora == "adapter"
    exported = trained * 4 if adapter else whole * (2 if config.export.dtype == "bfloat16" else 4)
    return checkpoints * trained * (4 + moments) + exported


def parameters(shape: dict) -> int:
    """Parameters of a decoder by its `config.json`, norms and biases left out: within a percent."""
    width, layers = shape["hidden_size"], shape["num_hidden_layers"]
    matrices = sum(a * b for a, b in _matrices(shape))
    tables = 1 if shape.get("tie_word_embeddings") else 2
    return layers * matrices + tables * shape["vocab_size"] * width


def adapter_parameters(shape: dict, rank: int) -> int:
    """Parameters of adapters on every linear layer."""
    return shape["num_hidden_layers"] * rank * sum(a + b for a, b in _matrices(shape))


def _matrices(shape: dict) -> list[tuple[int, int]]:
    width, inner, heads = shape["hidden_size"], shape["intermediate_size"], shape["num_attention_heads"]
    size = shape.get("head_dim") or width // heads
    groups = shape.get("num_key_value_heads") or heads
    query, key = (width, heads * size), (width, groups * size)
    return [query, key, key, query, (width, inner), (width, inner), (width, inner)]


def _shape(config: RunConfig) -> dict:
    student = config.student
    if isinstance(student.architecture, ArchitectureConfig):
        a = student.architecture
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        return {name: getattr(a, name) for name in (*names, "head_dim", "tie_word_embeddings")} | {
            "vocab_size": student.tokenizer_vocab
        }
    assert student.init is not None
    if hub.is_checkpoints(student.init):
        return {}
    found = config_of(student.init, student.revision)
    if isinstance(found, Finding):
        return {}
    from jaxdistill.models import ModelConfig  # imports JAX

    try:
        return ModelConfig.from_hf(found, student.init).to_hf()  # with the family's own defaults
    except ValueError:
        return {}
