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
        "hub",
    ]
    """`jsonl`: questions and gold answers. `messages`, `sharegpt`, `r1` (`problem`, `generations`) and
    `prompt_completion` hold responses too, which `traces.engine: import` takes for traces. `humaneval`, `mbpp`, `apps`
    (TACO too) and `livecodebench` are code problems with tests. (`hub` is refused: a set of the hub has one of these
    shapes too, and its name goes into `path`.)"""
    path: str | None = None
    """A file of JSON lines, a JSON list, CSV, TSV, Parquet, Arrow or Feather, packed (gz, zst, bz2, xz, zip) or not; a
    folder of such or of `datasets`; or a data set of the Hugging Face hub: `hf://datasets/OWNER/NAME`, with the path of
    files in it behind that if only they are wanted."""
    config: str | None = None
    """Which configuration (subset) of a hub set, or of a folder that is laid out like one, where it has several."""
    split: str | None = None
    """Which split of a hub set, or of a folder, where it has several."""
    revision: str | None = None
    """A commit, branch or tag of a hub set. The commit that was read is kept beside the problems, and read again."""
    bad_rows: Literal["skip", "stop"] = "skip"
    """What becomes of a row that cannot be read. `skip`: it is left out, counted by reason, listed in
    `problems/bad_rows.jsonl` and shown in the report. `stop`: the first one is an error."""
    bad_rows_share: float = 0.1
    """Under `skip`, more unreadable rows than this share (of at least 100) are an error, too."""
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
        share = self.bad_rows_share
        require(0 <= share <= 1, f"bad_rows_share is {share}; set a share in 0..1.")
        if self.source == "demo":
            require(self.count is not None, "source: demo makes problems on the fly; say how many with `count`.")
            return
        require(
            self.source != "hub",
            "source says what a row looks like (messages, sharegpt, r1, prompt_completion, jsonl, ...); name a set of "
            "the hub in path: hf://datasets/OWNER/NAME.",
        )
        require(self.path is not None, f"source: {self.source} reads a file; name it with `path`.")
        require(
            self.revision is None or "://" in str(self.path),
            "revision is for a set of the hub (path: hf://datasets/OWNER/NAME); what lies here has none.",
        )
