"""Config of what is made of the traces: templates, mixtures, curricula, rows."""

from __future__ import annotations

import itertools
from typing import Literal

from jaxdistill.config.base import require, section
from jaxdistill.config.methods import PairsConfig, TaskConfig


@section
class SourceConfig:
    """YAML section `data.mixture[i]`: one source of examples, and its share of the training."""

    name: str
    run: str | None = None
    """Folder of another run, with its problems, traces and verdicts; this run's own if absent."""
    domains: tuple[str, ...] = ()
    """Only traces of problems of these domains; of all domains if empty."""
    weight: float | None = None
    """Share of the rows, relative to the other sources' weights; each gets what it has if none is weighted."""
    max_examples: int | None = None
    """At most this many kept traces, picked by a hash of their ids."""
    system: str | None = None
    """Instead of `data.system`."""
    suffix: str | None = None
    """Instead of `data.suffix`, such as a domain's own instruction for its answers."""

    def __post_init__(self):
        require(
            self.weight is None or 0 < self.weight < float("inf"),
            f"data.mixture: the weight of {self.name} is {self.weight}; set it above 0, or leave the source out.",
        )
        require(
            self.max_examples is None or self.max_examples > 0,
            f"data.mixture: max_examples of {self.name} is {self.max_examples}; set at least 1.",
        )


@section
class PhaseConfig:
    """YAML section `data.curriculum.phases[i]`."""

    until: float | None = None
    """The hardest that this phase takes: at most so many tokens or steps, or at least this pass rate."""
    passes: int = 1
    """How often the phase goes through its rows."""

    def __post_init__(self):
        require(self.passes >= 1, f"data.curriculum.phases: passes is {self.passes}; set at least 1.")


@section
class CurriculumConfig:
    """YAML section `data.curriculum`: phases from easy to hard; after the last one, everything, shuffled."""

    by: Literal["tokens", "steps", "pass_rate"]
    """`tokens` of the response, `steps` (lines) of its thinking, or the share of the teacher's samples of the problem
    that were correct (a high rate is easy)."""
    parts: int | None = None
    """This many phases of about equal tokens, one pass each."""
    phases: tuple[PhaseConfig, ...] = ()
    """Instead of `parts`: each phase's bound; the last one has none."""
    cumulative: bool = False
    """Whether a phase also has the rows of the easier ones ("baby steps"), or its own alone ("one pass")."""

    def __post_init__(self):
        require(
            (self.parts is None) == bool(self.phases),
            "data.curriculum needs exactly one of `parts` (a number) and `phases` (a list of `until` and `passes`).",
        )
        require(self.parts is None or self.parts >= 2, f"data.curriculum.parts is {self.parts}; set at least 2.")
        if self.phases:
            bounds = [p.until for p in self.phases[:-1] if p.until is not None]
            require(
                len(bounds) == len(self.phases) - 1 >= 1 and self.phases[-1].until is None,
                "data.curriculum.phases: give at least two, each with an `until` but the last, which takes the rest.",
            )
            steps = [b - a for a, b in itertools.pairwise(bounds)]
            require(
                all(s < 0 if self.by == "pass_rate" else s > 0 for s in steps),
                f"data.curriculum.phases: `until` is {', '.join(f'{b:g}' for b in bounds)}; "
                f"for {self.by} it has to {'fall' if self.by == 'pass_rate' else 'rise'}, from easy to hard.",
            )


@section
class EditConfig:
    """YAML section `data.edit`: the traces' thinking is changed before it is learned from (`jaxdistill.edits`)."""

    kind: Literal[
        "random_digits", "without_keywords", "shuffled_steps", "deleted_steps", "inserted_steps", "wrong_answer"
    ]
    rate: float = 1.0
    """Share of the digits, keywords or steps that it concerns."""
    keep_length: bool = True
    """Of `deleted_steps` and `inserted_steps`: leave the trace as long as it was."""
    seed: int = 0

    def __post_init__(self):
        require(0 < self.rate <= 1, f"data.edit.rate is {self.rate}; set a share above 0, and at most 1.")


@section
class TakeConfig:
    """YAML section `data.take`: which traces are learned from, where it is not simply the kept ones."""

    verdicts: Literal["kept", "unverified", "incorrect"] = "kept"
    """`unverified`: whether the answer is right does not matter; every other filter does. `incorrect`: wrong ones."""
    per_problem: int | None = None
    """At most so many traces a problem: those with the lowest sample numbers."""
    length: Literal["any", "shortest", "longest"] = "any"
    """One trace a problem that has several: the one with the fewest or the most characters."""

    def __post_init__(self):
        require(
            self.per_problem is None or self.per_problem >= 1,
            f"data.take.per_problem is {self.per_problem}; take at least one trace a problem.",
        )


@section
class DataConfig:
    """YAML section `data`: from kept traces to packed rows."""

    row_tokens: int
    """Length of a packed row, T."""
    response: Literal["reasoning", "answer"] = "reasoning"
    """What is imitated: thinking and answer, or the answer behind an empty thinking (the answer-only baseline)."""
    overlong: Literal["error", "drop", "keep"] = "error"
    """An example longer than a row is never cut: refuse it, drop it and count it, or make all rows as long as it is."""
    system: str | None = None
    """The system turn before every question, in training and in evaluation; none if absent. One text for all: the
    system turns of imported chats are left out, and counted."""
    suffix: str = ""
    """What is written behind every question, in training and evaluation, such as an instruction to box the answer."""
    chat_template: str | None = None
    """Instead of the tokenizer's own: `plain`, `chatml`, or a file; for base models, which often have none.

    `chatml` needs `<|im_start|>` and `<|im_end|>` in the tokenizer. A response ends with the token that the template
    writes behind it. A template that writes the date has that of the run's first day.
    """
    mixture: tuple[SourceConfig, ...] = ()
    """Sources and their weights; all kept traces of this run if empty."""
    curriculum: CurriculumConfig | None = None
    tasks: tuple[TaskConfig, ...] = ()
    """What is made of every trace; the trace as it is, if empty."""
    pairs: PairsConfig | None = None
    topk: int | None = None
    """Keep the teacher's so many likeliest tokens beside each token, for `train.distill.source: stored`; at most
    `traces.logprobs`. The token that stands there is always among them, and so is the mass of all others."""
    topk_align: Literal["tokens", "spans"] = "tokens"
    """`spans`: for a teacher of another tokenizer, whose probabilities are kept where tokens of both begin at one place
    in the text; an approximation, for `train.distill.divergence: uld`."""
    take: TakeConfig = TakeConfig()
    edit: EditConfig | None = None
    workers: int | None = None
    """Processes that tokenize; as many as there are processors, or one for little data, if absent."""

    def __post_init__(self):
        require(self.row_tokens >= 2, f"data.row_tokens is {self.row_tokens}; a row needs at least 2 tokens.")
        require(
            self.workers is None or self.workers >= 1,
            f"data.workers is {self.workers}; at least 1 process has to work.",
        )
        kinds = [task.kind for task in self.tasks]
        require(len(set(kinds)) == len(kinds), f"data.tasks names a task twice ({', '.join(kinds)}); use its weight.")
        require(
            not self.tasks or self.response == "reasoning",
            "data.tasks says what is learned of a trace; leave data.response at reasoning, and use kind: label.",
        )
        require(self.topk is None or self.topk >= 1, f"data.topk is {self.topk}; keep at least 1 token.")
        require(
            self.topk is None or self.response == "reasoning",
            "data.topk with data.response: answer: the teacher's distributions follow from a reasoning that the "
            "student would not see; set data.topk: null.",
        )
        require(
            self.topk is None or self.edit is None,
            "data.topk with data.edit: the teacher's distributions belong to the unedited traces; set data.topk: null.",
        )
        require(
            self.topk is None or not self.tasks,
            "data.topk with data.tasks: the teacher's distributions belong to whole traces; set data.topk: null.",
        )
        require(
            self.pairs is None or self.edit is None,
            "data.pairs with data.edit: pairs hold the traces as they are; drop one of the two.",
        )
        names = [source.name for source in self.mixture]
        require(len(set(names)) == len(names), f"data.mixture: two sources have the same name ({', '.join(names)}).")
        weighted = sum(source.weight is not None for source in self.mixture)
        require(
            weighted in (0, len(names)),
            "data.mixture: some sources have a weight and some have none; give it to all, or to none.",
        )
