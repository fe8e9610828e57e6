"""Phases from easy to hard: which example belongs to which."""

from __future__ import annotations

import numpy as np

from jaxdistill.config import CurriculumConfig


def phases_of(curriculum: CurriculumConfig, values: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """The phase of every example, from 0, the easiest.

    Args:
      values: what the curriculum goes by, one an example: tokens, steps or the teacher's pass rate.
      tokens: lengths of the examples; `parts` have about equal sums of them. Equal values stay together.
    Raises:
      ValueError: a phase without examples, or no differences to order by.
    """
    hardness = -values if curriculum.by == "pass_rate" else values
    if hardness.min() == hardness.max():
        hint = "; sample a problem more than once (traces.samples)" if curriculum.by == "pass_rate" else ""
        raise ValueError(
            f"data.curriculum: all {len(values):,} examples have the same {curriculum.by} ({values[0]:g}), "
            f"so there is nothing to order by{hint}."
        )
    if curriculum.parts is not None:
        return _equal_parts(hardness, tokens, curriculum.parts)
    sign = -1 if curriculum.by == "pass_rate" else 1
    bounds = [sign * phase.until for phase in curriculum.phases if phase.until is not None]
    phases = np.searchsorted(np.array(bounds), hardness, side="left")
    counts = np.bincount(phases, minlength=len(curriculum.phases))
    if not counts.all():
        empty = int(np.flatnonzero(counts == 0)[0])
        raise ValueError(
            f"data.curriculum.phases: no example falls into phase {empty + 1}; {curriculum.by} of the "
            f"{len(values):,} examples goes from {values.min():g} to {values.max():g}."
        )
    return phases


def _equal_parts(hardness: np.ndarray, tokens: np.ndarray, parts: int) -> np.ndarray:
    distinct, which = np.unique(hardness, return_inverse=True)
    sums = np.bincount(which, weights=tokens)
    middle = np.cumsum(sums) - sums / 2  # of each value's tokens, among all sorted
    phase_of_value = np.minimum((middle * parts / sums.sum()).astype(np.int64), parts - 1)
    used, phase_of_value = np.unique(phase_of_value, return_inverse=True)  # many equal values may leave a part empty
    if len(used) < 2:
        raise ValueError(
            f"data.curriculum.parts: {len(distinct)} different values do not make {parts} parts; "
            "name the phases' bounds with data.curriculum.phases."
        )
    return phase_of_value[which]
