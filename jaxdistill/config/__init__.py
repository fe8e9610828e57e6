"""Configuration: one frozen dataclass per YAML section, read strictly.

`load(path, overrides)` turns a YAML file and `--set key=value` strings into a `RunConfig`. An unknown key fails and
names the nearest known one; every section checks its own values, so a stage never sees a config that cannot work.
"""

from jaxdistill.config.cluster import RayConfig
from jaxdistill.config.data import CurriculumConfig, DataConfig, EditConfig, PhaseConfig, SourceConfig, TakeConfig
from jaxdistill.config.loading import build, differences, effective, fingerprint, load, to_dict, with_baseline
from jaxdistill.config.methods import ContrastiveConfig, OnPolicyConfig, PairsConfig, StarConfig, TaskConfig
from jaxdistill.config.problems import ProblemsConfig
from jaxdistill.config.results import BenchmarkConfig, EvaluateConfig, ExportConfig, QualityConfig
from jaxdistill.config.run import AblateConfig, RunConfig
from jaxdistill.config.student import ArchitectureConfig, StudentConfig
from jaxdistill.config.traces import ServerConfig, TracesConfig, VLLMConfig
from jaxdistill.config.train import (
    DistillConfig,
    MeshConfig,
    OptimizerConfig,
    ProfileConfig,
    TrainConfig,
    TrainEvaluateConfig,
)
from jaxdistill.config.verify import (
    CodeConfig,
    CodeLimitsConfig,
    DecontaminateConfig,
    FiltersConfig,
    JudgeConfig,
    MajorityConfig,
    VerifyConfig,
)

__all__ = [
    "AblateConfig",
    "ArchitectureConfig",
    "BenchmarkConfig",
    "CodeConfig",
    "CodeLimitsConfig",
    "ContrastiveConfig",
    "CurriculumConfig",
    "DataConfig",
    "DecontaminateConfig",
    "DistillConfig",
    "EditConfig",
    "EvaluateConfig",
    "ExportConfig",
    "FiltersConfig",
    "JudgeConfig",
    "MajorityConfig",
    "MeshConfig",
    "OnPolicyConfig",
    "OptimizerConfig",
    "PairsConfig",
    "PhaseConfig",
    "ProblemsConfig",
    "ProfileConfig",
    "QualityConfig",
    "RayConfig",
    "RunConfig",
    "ServerConfig",
    "SourceConfig",
    "StarConfig",
    "StudentConfig",
    "TakeConfig",
    "TaskConfig",
    "TracesConfig",
    "TrainConfig",
    "TrainEvaluateConfig",
    "VLLMConfig",
    "VerifyConfig",
    "build",
    "differences",
    "effective",
    "fingerprint",
    "load",
    "to_dict",
    "with_baseline",
]
