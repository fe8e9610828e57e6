"""Which traces may be learned from: an ordered table of filters, each a pure function with a name.

A trace is rejected for the first filter that it falls to. The traces of a problem are taken in the order of their
sample numbers, and a filter also sees the traces of the problem that were kept before: so a duplicate is one of a kept
trace, and `keep_per_problem` keeps the lowest sample numbers.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

from jaxdistill.config import VerifyConfig
from jaxdistill.verify.compare import Check

Structure = Literal["closed", "empty", "absent", "broken"]


@dataclass(frozen=True, kw_only=True)
class TraceText:
    """The columns of a `records.Trace` that are judged; its token ids would fill most of the memory."""

    id: str
    problem_id: str
    sample: int
    response: str
    finish_reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """What the filters look at: a trace's facts, without its text."""

    trace_id: str
    problem_id: str
    sample: int
    finish_reason: str
    structure: Structure
    digest: bytes
    """Of the response: equal exactly if the responses are."""
    check: Check


@dataclass(slots=True)
class Kept:
    """The traces of one problem that were kept so far."""

    count: int = 0
    digests: set[bytes] = field(default_factory=set)


def describe(trace: TraceText, check: Check) -> Candidate:
    """The facts of one trace, whose answer has been checked."""
    return Candidate(
        trace_id=trace.id,
        problem_id=trace.problem_id,
        sample=trace.sample,
        finish_reason=trace.finish_reason,
        structure=think_structure(trace.response),
        digest=hashlib.blake2b(trace.response.encode("utf-8", "surrogatepass"), digest_size=16).digest(),
        check=check,
    )


def think_structure(response: str) -> Structure:
    """How a response is built.

    Returns:
      `closed`: one pair of tags with thinking in it, nothing before it and an answer behind it. The opening tag may be
        missing where the prompt has set it.
      `empty`: the same, without any thinking between the tags.
      `absent`: an answer without tags.
      `broken`: anything else, such as two pairs, a pair that is not closed, or nothing but thinking.
    """
    opened, closed = response.count("<think>"), response.count("</think>")
    head, _, content = response.rpartition("</think>")
    if not content.strip() or closed > 1 or opened > closed:
        return "broken"
    if not closed:
        return "absent"
    before, _, thinking = head.rpartition("<think>")
    if before.strip():
        return "broken"
    return "closed" if thinking.strip() else "empty"


# -------------------------------------------------------------------------------------------------- filters


def failed(candidate: Candidate, config: VerifyConfig, kept: Kept) -> bool:
    """The engine gave no response."""
    return candidate.finish_reason == "error"


def truncated(candidate: Candidate, config: VerifyConfig, kept: Kept) -> bool:
    """The response ran into the token limit."""
    return candidate.finish_reason == "length"


def malformed(candidate: Candidate, config: VerifyConfig, kept: Kept) -> bool:
    """No `<think>...</think>` before an answer; with `verify.think: optional`, tags may be absent or empty."""
    return candidate.structure == "broken" or (config.think == "required" and candidate.structure != "closed")


def wrong(candidate: Candidate, config: VerifyConfig, kept: Kept) -> bool:
    """The answer is not the gold answer."""
    return config.answer and candidate.check.outcome == "incorrect"


def undecided(candidate: Candidate, config: VerifyConfig, kept: Kept) -> bool:
    """Whether the answer is the gold answer could not be decided."""
    return config.answer and candidate.check.outcome == "undecided"


def duplicate(candidate: Candidate, config: VerifyConfig, kept: Kept) -> bool:
    """The same response, character for character, as a kept one of its problem."""
    return config.drop_duplicates and candidate.digest in kept.digests


def surplus(candidate: Candidate, config: VerifyConfig, kept: Kept) -> bool:
    """The problem has `verify.keep_per_problem` traces already."""
    return config.keep_per_problem is not None and kept.count >= config.keep_per_problem


Filter = Callable[[Candidate, VerifyConfig, Kept], bool]

FILTERS: dict[str, Filter] = {
    "failed": failed,
    "truncated": truncated,
    "malformed": malformed,
    "incorrect": wrong,
    "undecided": undecided,
    "duplicate": duplicate,
    "surplus": surplus,
}
"""In this order; the name is the `rejected_for` of a verdict."""


def select(candidates: Iterable[Candidate], config: VerifyConfig) -> list[str | None]:
    """For every candidate the name of the first filter that it falls to, or None if it is kept; in the given order."""
    candidates = list(candidates)
    kept: defaultdict[str, Kept] = defaultdict(Kept)
    rejected: list[str | None] = [None] * len(candidates)
    for i in sorted(range(len(candidates)), key=lambda i: candidates[i].sample):  # stable: ties stay in order
        candidate, of_problem = candidates[i], kept[candidates[i].problem_id]
        rejected[i] = next((name for name, falls in FILTERS.items() if falls(candidate, config, of_problem)), None)
        if rejected[i] is None:
            of_problem.count += 1
            of_problem.digests.add(candidate.digest)
    return rejected
