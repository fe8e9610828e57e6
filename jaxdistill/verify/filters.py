"""What the filters look at, and the filters that need nothing but the trace itself: form, quality, answer, marks.

A filter is a pure function that gives the reason why a trace falls, or None. A trace is rejected for the first filter
that it falls to; `selection` has those that look at the whole set.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from jaxdistill.config import VerifyConfig
from jaxdistill.traces.values import UNKNOWN_DOMAIN
from jaxdistill.verify import quality, similarity
from jaxdistill.verify.compare import Check
from jaxdistill.verify.texts import Structure, think_structure

FINISH_REASONS = ("stop", "length", "imported", "error")


@dataclass(frozen=True, kw_only=True)
class TraceText:
    """The columns of a `records.Trace` that are judged; its token ids would fill most of the memory.

    A malformed record lacks some of them.
    """

    id: str | None
    problem_id: str | None
    sample: int | None
    response: str | None
    finish_reason: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A trace's facts, without its text."""

    trace_id: str
    problem_id: str
    sample: int
    check: Check
    domain: str = UNKNOWN_DOMAIN
    finish_reason: str = "stop"
    unreadable: str = ""
    """Why the record cannot be judged; empty if it can."""
    structure: Structure = "broken"
    form: str = ""
    """How the answer is stated."""
    digest: bytes = b""
    """Of the response: equal exactly if the responses are."""
    length: int = 0
    """Characters of the response."""
    measures: Mapping[str, float] | None = field(default_factory=dict)
    """What `quality` found; None if that took too much time or memory."""
    signature: np.ndarray | None = None
    """MinHash of the response, where it is needed."""


@dataclass(frozen=True, slots=True)
class Rejection:
    """The filter that a trace fell to, and why."""

    name: str
    detail: str = ""


def describe(trace: TraceText, check: Check, domain: str = UNKNOWN_DOMAIN) -> Candidate:
    """The facts of one trace that its text says at once; `measured` adds the others."""
    assert trace.id is not None and trace.problem_id is not None and trace.sample is not None
    assert trace.response is not None and trace.finish_reason is not None
    return Candidate(
        trace_id=trace.id,
        problem_id=trace.problem_id,
        sample=trace.sample,
        check=check,
        domain=domain,
        finish_reason=trace.finish_reason,
        structure=think_structure(trace.response),
        form=answer_form(trace.response),
        digest=hashlib.blake2b(trace.response.encode("utf-8", "surrogatepass"), digest_size=16).digest(),
        length=len(trace.response),
    )


def measured(candidate: Candidate, found: dict[str, Any] | None) -> Candidate:
    """The candidate with what `measuring.measure` found; None if that took too much time or memory."""
    if found is None:
        return replace(candidate, measures=None)
    numbers = dict(found)
    signature = numbers.pop("signature", None)
    return replace(candidate, measures=numbers, signature=similarity.decode(signature) if signature else None)


_FORMS = {
    "boxed": re.compile(r"\\(?:boxed|fbox)\s*\{"),
    "hashes": re.compile(r"(?<!#)####(?!#)"),
    "code": re.compile("```"),
    "statement": re.compile(r"\banswer(?: is|[ *]*:)", re.I),
}


def answer_form(response: str) -> str:
    """How the answer is stated: `boxed`, `hashes`, `code`, `statement`, or `other`."""
    content = response.rpartition("</think>")[2]
    return next((name for name, pattern in _FORMS.items() if pattern.search(content)), "other")


# -------------------------------------------------------------------------------------------------- filters


def unreadable(candidate: Candidate, config: VerifyConfig) -> str | None:
    """The record is malformed."""
    return candidate.unreadable or None


def failed(candidate: Candidate, config: VerifyConfig) -> str | None:
    """The engine gave no response."""
    return "the engine gave no response" if candidate.finish_reason == "error" else None


def truncated(candidate: Candidate, config: VerifyConfig) -> str | None:
    """The response ran into the token limit."""
    return "the response ran into the token limit" if candidate.finish_reason == "length" else None


def malformed(candidate: Candidate, config: VerifyConfig) -> str | None:
    """No `<think>...</think>` before an answer; with `verify.think: optional`, tags may be absent or empty."""
    bad = candidate.structure == "broken" or (config.think == "required" and candidate.structure != "closed")
    return f"the thinking is {candidate.structure}" if bad else None


def unmeasured(candidate: Candidate, config: VerifyConfig) -> str | None:
    """Measuring the response took too much time or memory."""
    return "measuring it takes too much time or memory" if candidate.measures is None else None


def wrong(candidate: Candidate, config: VerifyConfig) -> str | None:
    """The answer is not the gold answer."""
    return candidate.check.reason if config.answer and candidate.check.outcome == "incorrect" else None


def undecided(candidate: Candidate, config: VerifyConfig) -> str | None:
    """Whether the answer is the gold answer could not be decided."""
    return candidate.check.reason if config.answer and candidate.check.outcome == "undecided" else None


Filter = Callable[[Candidate, VerifyConfig], str | None]

FORM: dict[str, Filter] = {
    "unreadable": unreadable,
    "failed": failed,
    "truncated": truncated,
    "malformed": malformed,
    "unmeasured": unmeasured,
}
"""In this order; the name is the `rejected_for` of a verdict."""
ANSWER: dict[str, Filter] = {"incorrect": wrong, "undecided": undecided}


def is_formed(candidate: Candidate, config: VerifyConfig) -> bool:
    """Whether a trace has the form to be looked at closer."""
    return first_fault(candidate, config, FORM) is None


def first_fault(candidate: Candidate, config: VerifyConfig, filters: Mapping[str, Filter]) -> Rejection | None:
    """The first filter of a table that a trace falls to."""
    for name, falls in filters.items():
        if (reason := falls(candidate, config)) is not None:
            return Rejection(name, reason)
    return None


def form_fault(candidate: Candidate, config: VerifyConfig) -> Rejection | None:
    """The first filter of form or quality that a trace falls to."""
    if found := first_fault(candidate, config, FORM):
        return found
    assert candidate.measures is not None
    bad = quality.fault(candidate.measures, config.filters)
    return Rejection(*bad) if bad else None
