"""Who is evaluated: teacher, student and baselines, each with its checkpoint and the prompt that it is used to."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from jaxdistill import config as configuration
from jaxdistill import hub, tokenization
from jaxdistill.config import RunConfig
from jaxdistill.records import RunDir

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TAGS = ("<think>", "</think>")


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model to be evaluated, and the prompt that it is used to."""

    name: str
    checkpoint: Path
    system: str | None
    suffix: str


def find_subjects(config: RunConfig, run: RunDir) -> tuple[list[Subject], dict[str, str]]:
    """The models that `evaluate.models` names, in its order, and the names that are left out with their reasons."""
    assert config.evaluate is not None
    subjects, skipped = [], {}
    for name in dict.fromkeys(config.evaluate.models):
        if name == "teacher":
            traces = config.traces
            if traces.teacher is None:
                skipped[name] = "the traces were imported and `traces.teacher` names no model"
                continue
            subjects.append(Subject(name, hub.fetch(traces.teacher, traces.revision), traces.system, traces.suffix))
        elif name == "student":
            subjects.append(_student(name, config, run))
        else:
            subjects += [_student(b, configuration.with_baseline(config, b), run.baseline(b)) for b in config.baselines]
    return subjects, skipped


def _student(name: str, config: RunConfig, run: RunDir) -> Subject:
    if not run.export.is_dir():
        raise ValueError(f"{run.export}: no export of {name} to evaluate; run the stage `export` first.")
    return Subject(name, hub.fetch(str(run.export.resolve())), config.data.system, config.data.suffix)


def tokenizer_of(subject: Subject, day: str | None = None) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer.

    Args:
      day: for a chat template that writes the date; today if absent.
    Raises:
      ValueError: it has none, or loses the tags around the thinking, so that no response could be taken apart.
    """
    tokenizer = tokenization.load_tokenizer(str(subject.checkpoint), day=day)
    ids = tokenizer.encode("".join(TAGS), add_special_tokens=False)
    if "".join(tokenization.decode_response(tokenizer, ids).split()) != "".join(TAGS):
        raise ValueError(
            f"{subject.checkpoint}: the tokenizer of {subject.name} does not keep {' and '.join(TAGS)}, so thinking "
            "and answer cannot be told apart; evaluate a checkpoint whose tokenizer does."
        )
    return tokenizer
