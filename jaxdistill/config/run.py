"""A whole run: one YAML file."""

from __future__ import annotations

import dataclasses
from typing import Any

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

    def __post_init__(self):
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
        for name in self.baselines:
            require(
                name.replace("_", "").replace("-", "").isalnum() and name not in {"student", "teacher"},
                f"baselines.{name}: use letters, digits, - and _, and not the names `student` or `teacher`.",
            )
