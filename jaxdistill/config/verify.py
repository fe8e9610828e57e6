"""Config of verification."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jaxdistill.config.base import require, section


@section
class CodeLimitsConfig:
    """YAML section `verify.code.limits`: what every run of a program may take."""

    cpu_s: int = 5
    """Processor seconds; a program that needs more is incorrect."""
    wall_s: float = 30.0
    """Seconds by the clock; a program that needs more, and not of the processor, is undecided."""
    total_s: float = 120.0
    """Seconds by the clock for all cases of a problem together."""
    memory_mib: int = 512
    """Address space, which is somewhat more than the memory in use."""
    output_mib: int = 4
    tmp_mib: int = 16
    """Of files, which are kept in memory."""
    threads: int = 32

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            require(value > 0, f"verify.code.limits.{field.name} is {value}; set it above 0.")
        require(
            self.memory_mib >= 128,
            f"verify.code.limits.memory_mib is {self.memory_mib}; Python itself needs 128.",
        )


@section
class CodeConfig:
    """YAML section `verify.code`: how the programs of responses are run; used only for problems that have tests."""

    isolation: Literal["full", "namespaces", "filters", "limits"] = "namespaces"
    """The weakest isolation that is accepted, see `verify.code.sandbox`; a machine that offers less is refused."""
    limits: CodeLimitsConfig = CodeLimitsConfig()


@section
class VerifyConfig:
    """YAML section `verify`: which traces may be learned from."""

    answer: bool = True
    """Keep only traces whose final answer equals the gold answer; `undecided` is not kept."""
    think: Literal["required", "optional"] = "required"
    """Whether a trace must hold one non-empty `<think>...</think>` before its answer."""
    keep_per_problem: int | None = None
    """At most this many traces a problem (the lowest sample numbers); all of them if absent."""
    drop_duplicates: bool = True
    """Drop a trace whose response is the same, character for character, as an earlier one of its problem."""
    code: CodeConfig = CodeConfig()
    workers: int | None = None
    """Processes that judge; as many as there are processors if absent."""

    def __post_init__(self):
        require(
            self.workers is None or self.workers >= 1,
            f"verify.workers is {self.workers}; at least 1 process has to work.",
        )
