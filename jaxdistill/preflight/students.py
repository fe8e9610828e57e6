"""The student, before there is a trace: its files, family, tokenizer, template and context."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from jaxdistill import hub
from jaxdistill.config import RunConfig
from jaxdistill.preflight.finding import Finding
from jaxdistill.preflight.repositories import config_of


def check(config: RunConfig, what: str) -> Iterator[Finding]:
    """Everything of one student; `what` is `student`, or names a baseline."""
    student = config.student
    if student.init is not None and not hub.is_checkpoints(student.init):
        found = config_of(student.init, student.revision)
        if isinstance(found, Finding):
            yield Finding(f"{what}.init", found.level, found.text)
            return
        yield from check_family(found, student.init, f"{what}.init")
        yield from check_files(student.init, f"{what}.init")
    name = student.tokenizer
    if name not in (None, "train") and not Path(name).is_dir() and name != hub.DEMO:
        found = config_of(name, None, "tokenizer_config.json")
        if isinstance(found, Finding):
            yield Finding(f"{what}.tokenizer", found.level, found.text)
            return
    yield from check_texts(config, what)


def check_family(config: dict, name: str, what: str) -> Iterator[Finding]:
    """Whether our models can be what a `config.json` describes."""
    if not config:  # adapters: their base's config is another repository's
        return
    from jaxdistill.models import ModelConfig  # imports JAX

    try:
        model = ModelConfig.from_hf(config, name)
    except ValueError as error:
        yield Finding(what, "error", str(error))
    else:
        yield Finding(what, "ok", f"{name}: {model.model_type}, {model.num_layers} layers of {model.hidden_size}")


def check_files(name: str, what: str) -> Iterator[Finding]:
    """Whether the files of a checkpoint that is here are whole: their headers, and no weights."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return
    from jaxdistill.models.tensor_files import open_tensors, read_header

    try:
        if hub.is_adapter(folder):
            read_header(folder / hub.ADAPTER_WEIGHTS)
        else:
            open_tensors(folder)
    except ValueError as error:
        yield Finding(what, "error", str(error))


def check_texts(config: RunConfig, what: str) -> Iterator[Finding]:
    """Tokenizer, template and context, by what `prepare` itself does with them."""
    from jaxdistill.data.prepare import check_student  # imports transformers

    with tempfile.TemporaryDirectory() as folder:
        try:
            check_student(config, Path(folder))
        except ValueError as error:
            yield Finding(what, "error", str(error).replace(f"{folder}/", ""))
            return
    kind = "a new tokenizer" if config.student.tokenizer == "train" else "tokenizer and chat template"
    yield Finding(what, "ok", f"{kind}, rows of {config.data.row_tokens} tokens")
    if config.data.overlong == "error" and config.traces.engine != "import":
        longest = config.traces.max_tokens
        if longest >= config.data.row_tokens:
            yield Finding(
                "data.overlong",
                "warning",
                f"error, and a trace may have traces.max_tokens={longest} tokens beside its prompt, which rows of "
                f"data.row_tokens={config.data.row_tokens} do not hold: the first such would stop prepare; set drop "
                "or keep, or raise data.row_tokens.",
            )
