"""Configuration: one frozen dataclass per YAML section, read strictly.

`load(path, overrides)` turns a YAML file and `--set key=value` strings into a `RunConfig`. An unknown key fails and
names the nearest known one; every section checks its own values, so a stage never sees a config that cannot work.
"""

from jaxdistill.config.loading import build, differences, effective, fingerprint, load, to_dict, with_baseline
from jaxdistill.config.sections import (
    ArchitectureConfig,
    CodeConfig,
    CodeLimitsConfig,
    CurriculumConfig,
    DataConfig,
    EvaluateConfig,
    ExportConfig,
    MeshConfig,
    OptimizerConfig,
    PhaseConfig,
    ProblemsConfig,
    ProfileConfig,
    RunConfig,
    ServerConfig,
    SourceConfig,
    StudentConfig,
    TracesConfig,
    TrainConfig,
    TrainEvaluateConfig,
    VerifyConfig,
    VLLMConfig,
)

__all__ = [
    "ArchitectureConfig",
    "CodeConfig",
    "CodeLimitsConfig",
    "CurriculumConfig",
    "DataConfig",
    "EvaluateConfig",
    "ExportConfig",
    "MeshConfig",
    "OptimizerConfig",
    "PhaseConfig",
    "ProblemsConfig",
    "ProfileConfig",
    "RunConfig",
    "ServerConfig",
    "SourceConfig",
    "StudentConfig",
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
