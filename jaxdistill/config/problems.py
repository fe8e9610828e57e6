"""Config of the problems."""

from __future__ import annotations

from typing import Literal

from jaxdistill.config.base import require, section


@section
class ProblemsConfig:
    """YAML sections `problems` and `evaluate.problems`: where the questions and gold answers come from."""

    source: Literal[
        "demo",
        "gsm8k",
        "jsonl",
        "messages",
        "sharegpt",
        "r1",
        "prompt_completion",
        "humaneval",
        "mbpp",
        "apps",
        "livecodebench",
    ]
    """`jsonl`: questions and gold answers. `messages`, `sharegpt`, `r1` (`problem`, `generations`) and
    `prompt_completion` hold responses too, which `traces.engine: import` takes for traces. `humaneval`, `mbpp`, `apps`
    (TACO too) and `livecodebench` are code problems with tests."""
    path: str | None = None
    """JSON lines (`gsm8k`, `jsonl`); the others also read JSON, Parquet, and a folder of such or of `datasets`."""
    count: int | None = None
    """How many to take; all of them if absent. `demo` makes problems on the fly, so it needs a number."""
    seed: int = 0
    """Which problems `demo` makes. Training and held-out sets use different seeds and never share a question."""
    problem_field: str = "problem"
    answer_field: str = "answer"
    forget_answers: bool = False
    """Leaves out the gold answers of `problems`, to measure what training comes to without them (`verify.majority`)."""
    id_field: str | None = None
    domain: str = "math"
    """Of all problems, unless `domain_field` says it row by row."""
    domain_field: str | None = None
    """Where a row of `jsonl` or of a trace set names its domain; one without it belongs to the domain `unknown`."""

    def __post_init__(self):
        require(self.count is None or self.count > 0, f"count is {self.count}; ask for at least one problem.")
        if self.source == "demo":
            require(self.count is not None, "source: demo makes problems on the fly; say how many with `count`.")
        else:
            require(self.path is not None, f"source: {self.source} reads a file; name it with `path`.")
