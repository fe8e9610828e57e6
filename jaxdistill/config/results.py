"""Config of what comes after training: export and evaluation."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jaxdistill.config.base import require, section
from jaxdistill.config.problems import ProblemsConfig
from jaxdistill.config.traces import ServerConfig, VLLMConfig


@section
class ExportConfig:
    """YAML section `export`: the student in Hugging Face format."""

    checkpoint: Literal["last", "best"] | int = "last"
    """`best`: of those kept (`train.keep_best`), the one with the lowest evaluation loss; a number: that step's."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    max_shard_gib: float = 4.0
    lora: Literal["merged", "adapter"] = "merged"
    """Of a student with adapters: the whole model, or the adapters alone as PEFT loads them."""
    check: Literal["transformers", "none"] = "transformers"
    """Reload with transformers and compare logits, before the folder gets its final name."""
    serve: bool = False
    """Start vLLM's server on the student's export and let it answer one held-out problem."""
    port: int = 0
    """Of that server; 0 takes a free one."""


@section
class BenchmarkConfig:
    """YAML section `evaluate.benchmarks[i]`: one more set of problems that all models answer."""

    name: str
    """A benchmark by its name (a file of `jaxdistill/evals/sets`), or any name, with `kind`."""
    kind: str | None = None
    """Which benchmark it is, where `name` does not say it; `jsonl` for a file of your own."""
    path: str | None = None
    """A local file or folder (JSON lines, JSON, Parquet, Arrow); from the hub if absent."""
    revision: str | None = None
    """Commit of the hub's repository."""
    count: int | None = None
    """So many of its problems, picked by a hash of their ids; all of them if absent."""
    prompt: str | None = None
    """Instead of the benchmark's own: text with `{problem}` (and `{choices}`) in it."""
    fields: dict[str, str] = dataclasses.field(default_factory=dict)
    """Instead of the benchmark's own: your file's names for `problem`, `answer`, `choices`, `domain`."""
    samples: int | None = None
    """Instead of `evaluate.samples`; likewise the next two."""
    temperature: float | None = None
    max_tokens: int | None = None

    def __post_init__(self):
        plain = self.name.replace("_", "").replace("-", "").replace(".", "")
        require(plain.isalnum(), f"evaluate.benchmarks: {self.name!r} names a folder; use letters, digits, -, _ and .")
        require(self.count is None or self.count > 0, f"{self.name}: count is {self.count}; ask for at least one.")
        require(
            self.prompt is None or "{problem}" in self.prompt,
            f"evaluate.benchmarks: the prompt of {self.name} has no {{problem}}; say where the question goes.",
        )


@section
class QualityConfig:
    """YAML section `evaluate.quality`: what the reasoning itself is worth, measured on the held-out problems."""

    problems: int = 64
    """How many responses a model the JAX model reads again, with its reasoning whole, cut and corrupted; 0 for none."""
    batch: int = 16
    """Sequences that are read at once."""
    seed: int = 0
    """Of the corruptions."""

    def __post_init__(self):
        require(self.problems >= 0, f"evaluate.quality.problems is {self.problems}; set 0 or more.")
        require(self.batch >= 1, f"evaluate.quality.batch is {self.batch}; read at least one at a time.")


@section
class EvaluateConfig:
    """YAML section `evaluate`: accuracy of student, baselines and teacher on held-out problems and benchmarks."""

    problems: ProblemsConfig | None = None
    """Held out from training: a question of these is taken out of the training problems."""
    benchmarks: tuple[BenchmarkConfig, ...] = ()
    engine: Literal["jax", "vllm", "server"] = "jax"
    """`server` is vLLM's, started for each model (`evaluate.server.start`)."""
    models: tuple[str, ...] = ("teacher", "student", "baselines")
    samples: int = 1
    """Responses a problem and seed; with several there are pass@k and maj@k too."""
    seeds: int = 1
    """So many seeds, from `seed` on: the same evaluation, drawn anew."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    max_tokens: int = 512
    seed: int = 0
    best_of: Literal["none", "likelihood"] = "none"
    """Best-of-n: of a problem's samples, the one whose tokens the model finds likeliest on average (read in JAX)."""
    quality: QualityConfig | None = None
    batch: int = 256
    vllm: VLLMConfig = VLLMConfig()
    server: ServerConfig = ServerConfig(start=1)

    def __post_init__(self):
        known = {"teacher", "student", "baselines"}
        for name in self.models:
            require(name in known, f"evaluate.models has {name!r}; known are {', '.join(sorted(known))}.")
        require(
            self.problems is not None or bool(self.benchmarks),
            "evaluate has neither `problems` nor `benchmarks`; name what is to be answered.",
        )
        names = [benchmark.name for benchmark in self.benchmarks]
        require(len(set(names)) == len(names), f"evaluate.benchmarks: a name comes twice ({', '.join(names)}).")
        for name, value in (("samples", self.samples), ("seeds", self.seeds)):
            require(value >= 1, f"evaluate.{name} is {value}; set at least 1.")
        require(self.temperature >= 0, f"evaluate.temperature is {self.temperature}; set 0 (greedy) or more.")
        for benchmark in self.benchmarks:
            drawn = (benchmark.samples or self.samples) * self.seeds
            heat = self.temperature if benchmark.temperature is None else benchmark.temperature
            require(
                drawn == 1 or heat > 0,
                f"evaluate.benchmarks: {benchmark.name}: {drawn} samples at temperature 0 are all alike; raise it.",
            )
        require(
            self.samples * self.seeds == 1 or self.temperature > 0,
            f"evaluate: {self.samples * self.seeds} samples at temperature 0 are all alike; raise temperature.",
        )
        require(
            not self.server.urls and self.server.start >= 1,
            "evaluate.server.urls serve one model, and several are evaluated; set evaluate.server.start instead.",
        )
