"""A whole run: one YAML file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from jaxdistill.config.base import require, section
from jaxdistill.config.data import DataConfig
from jaxdistill.config.methods import StarConfig
from jaxdistill.config.problems import ProblemsConfig
from jaxdistill.config.results import EvaluateConfig, ExportConfig
from jaxdistill.config.student import StudentConfig
from jaxdistill.config.traces import TracesConfig
from jaxdistill.config.train import TrainConfig
from jaxdistill.config.verify import VerifyConfig


@section
class AblateConfig:
    """YAML section `ablate`: what `jaxdistill ablate` trains beside the run's own student, on the same traces."""

    variants: tuple[str, ...] = (
        "answer_only",
        "wrong_answers",
        "random_digits_50",
        "random_digits_100",
        "shuffled_steps",
        "deleted_steps",
        "inserted_steps",
    )
    """Names of `jaxdistill.methods.ablations.VARIANTS`."""
    extra: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """Variants of your own: a name and what differs, as in `baselines`."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Every variant is trained once a seed, the run's own student too."""
    match: Literal["epochs", "steps"] = "epochs"
    """What is equal for all: how often each example is seen, or the number of optimizer steps."""

    def __post_init__(self):
        require(bool(self.seeds), "ablate.seeds is empty; name at least one.")
        require(len(set(self.seeds)) == len(self.seeds), "ablate.seeds names a seed twice; name each once.")


@section
class RunConfig:
    """One YAML file: a whole run, from problems to report."""

    name: str
    run_dir: str
    seed: int = 0
    problems: ProblemsConfig
    traces: TracesConfig
    verify: VerifyConfig = VerifyConfig()
    data: DataConfig
    student: StudentConfig
    train: TrainConfig
    export: ExportConfig = ExportConfig()
    evaluate: EvaluateConfig | None = None
    star: StarConfig | None = None
    baselines: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """More students on the same traces: a name, and what differs, as `data.response: answer`."""
    ablate: AblateConfig = AblateConfig()

    def __post_init__(self):
        object.__setattr__(self, "run_dir", str(Path(self.run_dir).expanduser()))
        require(
            self.export.lora == "merged" or (self.student.lora is not None and self.student.init is not None),
            "export.lora: adapter needs `student.lora`, and `student.init`, the checkpoint that the adapter is for.",
        )
        require(
            self.export.lora == "merged" or self.evaluate is None or self.evaluate.engine == "jax",
            "export.lora: adapter is evaluated by `evaluate.engine: jax` alone; vLLM needs export.lora: merged.",
        )
        require(
            self.train.contrastive is None or self.data.pairs is not None,
            "train.contrastive learns from pairs; make them with `data.pairs: {}`.",
        )
        require(
            self.evaluate is None or self.evaluate.problems is None or not self.evaluate.problems.forget_answers,
            "evaluate.problems.forget_answers: held-out answers are compared with the gold ones; leave it out.",
        )
        self._check_distill()
        for name in self.baselines:
            require(
                name.replace("_", "").replace("-", "").isalnum() and name not in {"student", "teacher"},
                f"baselines.{name}: use letters, digits, - and _, and not the names `student` or `teacher`.",
            )

    def _check_distill(self):
        distill, topk = self.train.distill, self.data.topk
        if distill is not None and distill.source == "stored":
            require(topk is not None, "train.distill.source: stored needs `data.topk`, how many tokens are kept.")
        if distill is not None and distill.source == "online":
            require(
                (distill.teacher or self.traces.teacher) is not None,
                "train.distill.source: online needs a teacher; name it with `train.distill.teacher`.",
            )
        if distill is not None and distill.source == "stored":
            require(
                (self.data.topk_align == "spans") == (distill.divergence == "uld"),
                f"train.distill.divergence: {distill.divergence} does not fit data.topk_align: {self.data.topk_align}; "
                "spans of another tokenizer go with uld, the student's own tokens with forward_kl.",
            )
            require(
                bool(self.data.mixture) or distill.temperature == self.traces.logprobs_temperature,
                f"train.distill.temperature is {distill.temperature}, and stored logprobs do not say what the whole "
                "distribution becomes at another temperature than that at which they were taken "
                f"(traces.logprobs_temperature={self.traces.logprobs_temperature}); make them equal.",
            )
        own = self.train.on_policy
        if own is not None and own.grader == "server":
            require(self.traces.teacher is not None, "train.on_policy.grader: server needs `traces.teacher`.")
            require(
                (bool(self.traces.server.urls) or self.traces.server.start > 0)
                and self.traces.server.api == "completions",
                "train.on_policy.grader: server needs `traces.server.urls`, or `traces.server.start: 1` to start one "
                "here, with api: completions.",
            )
        # traces of other runs have their own number of logprobs, which prepare looks at
        require(
            topk is None or bool(self.data.mixture) or topk <= self.traces.logprobs,
            f"data.topk={topk} > traces.logprobs={self.traces.logprobs}, which is how many are there; raise "
            "traces.logprobs, or lower data.topk.",
        )
