"""Why a verification keeps nothing, or next to nothing: the likeliest cause, and the key that mends it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxdistill.config import TracesConfig, VerifyConfig
from jaxdistill.traces import tags

LITTLE = 0.02
"""A share of the traces that is next to nothing."""
SHOWN = 60
"""Characters of a quoted answer."""
LONG_GOLD = 120
"""Characters; a final answer has fewer."""
BOXED = '"\\nPut your final answer within \\\\boxed{}."'

FROM_JOURNAL = (
    "remove traces/manifest.json from the run's folder and give `jaxdistill run` with --redo verify: the journal has "
    "all answers, and nothing is asked twice"
)


@dataclass(frozen=True)
class Looked:
    """Some of the traces that fell to the filter to which most fell, and what they were held against."""

    responses: Sequence[str]
    extracted: Sequence[str | None]
    gold: Sequence[str]


def is_next_to_nothing(counts: Mapping[str, Any]) -> bool:
    return counts["traces"] > 0 and counts["kept"] <= LITTLE * counts["traces"]


def worst_filter(counts: Mapping[str, Any]) -> str | None:
    """The filter to which most traces fell."""
    rejected = counts["rejected"]
    return max(rejected, key=rejected.get) if rejected else None


def likeliest(counts: Mapping[str, Any], looked: Looked, verify: VerifyConfig, traces: TracesConfig) -> str:
    """One sentence or two: what most traces fell to, why that is likely, and which key to set.

    Args:
      counts: of `waterfall.count_yield`.
      looked: at some of the traces that fell to `worst_filter(counts)`.
    """
    name = worst_filter(counts)
    if name is None:
        return "no trace fell to a filter, and none was kept; look at verdicts.parquet."
    share = f"{counts['rejected'][name]:,} of {counts['traces']:,} traces are {TITLES.get(name, name)}"
    reasons = Counter(counts["reasons"].get(name, {}))
    why = CAUSES.get(name, _by_key)(looked, reasons, verify, traces) or _by_key(looked, reasons, verify, traces)
    return f"{share}: {why}"


def _malformed(looked: Looked, reasons: Counter[str], verify: VerifyConfig, traces: TracesConfig) -> str:
    found = tags.count_pairs(looked.responses)
    total = found.total()
    others = Counter({pair: n for pair, n in found.items() if pair not in (None, ("<think>", "</think>"))})
    if others and others.total() * 2 > total:
        (opening, closing), times = others.most_common(1)[0]  # type: ignore[misc]
        again = "give the command with --redo generate" if traces.engine == "import" else FROM_JOURNAL
        return (
            f"{times:,} of {total:,} that were looked at think between {opening} and {closing}; set "
            f"traces.think_tags: ['{opening}', '{closing}'], and {again}."
        )
    top = reasons.most_common(1)[0][0] if reasons else ""
    if "absent" in top or "empty" in top:
        return (
            f"{top}; the teacher shows none, or its server keeps it back. To learn from such answers set verify.think: "
            "optional; to have it, ask a teacher that shows its thinking, or with traces.styles: [cot]."
        )
    example = looked.responses[0][:SHOWN] if looked.responses else ""
    return (
        f"{top}: there is no single pair of tags with thinking in it and an answer behind it; one begins {example!r}."
    )


def _truncated(looked: Looked, reasons: Counter[str], verify: VerifyConfig, traces: TracesConfig) -> str:
    return f"they ran into traces.max_tokens={traces.max_tokens}; raise it, and draw them again (--redo generate)."


def _failed(looked: Looked, reasons: Counter[str], verify: VerifyConfig, traces: TracesConfig) -> str:
    return f"the engine gave no response, as generate has said; set traces.retry_failed: true, and {FROM_JOURNAL}."


def _incorrect(looked: Looked, reasons: Counter[str], verify: VerifyConfig, traces: TracesConfig) -> str:
    top = reasons.most_common(1)[0][0] if reasons else ""
    gold = [text for text in looked.gold if text]
    if not gold:
        return f"{top}; name the field that holds it with problems.answer_field, or set verify.answer: false."
    if sum(len(text) > LONG_GOLD for text in gold) * 2 > len(gold):
        return (
            f"the gold answers are whole texts, as {gold[0][:SHOWN]!r}...; name the field that holds the final answer "
            "with problems.answer_field."
        )
    # before the gold answers are blamed: those of questions of yes and no have but two values
    if "no answer" in top or ("gold" not in top and not any(looked.extracted)):
        found = f"{top or 'no answer found'}: the responses state none that can be found"
        if traces.engine == "import":
            return f"{found}, as in \\boxed{{}}; set verify.answer: false to take them unchecked."
        return f"{found}; ask for it with traces.suffix: {BOXED}."
    if len(gold) >= 10 and len(set(gold)) <= 2:
        only = " and ".join(repr(text[:SHOWN]) for text in sorted(set(gold)))
        return f"the gold answers are nothing but {only}; name another field with problems.answer_field."
    if "gold" in top:
        otherwise = "name another field with problems.answer_field, or set verify.answer: false"
        return f"{top}, as {gold[0][:SHOWN]!r}; {otherwise}."
    pairs = [(e, g) for e, g in zip(looked.extracted, looked.gold, strict=True) if e]
    said, wanted = pairs[0]
    return (
        f"{top}; the first one says {str(said)[:SHOWN]!r}, and its gold answer is {wanted[:SHOWN]!r}. If these are not "
        "answers to one question, name the right field with problems.answer_field."
    )


def _duplicate(looked: Looked, reasons: Counter[str], verify: VerifyConfig, traces: TracesConfig) -> str:
    return (
        f"samples of a problem are all alike at traces.temperature={traces.temperature:g}; raise it, or set "
        "traces.samples: 1."
    )


def _by_key(looked: Looked, reasons: Counter[str], verify: VerifyConfig, traces: TracesConfig) -> str:
    top = reasons.most_common(1)[0][0] if reasons else ""
    return f"{top or 'see verdicts.parquet'}; the threshold is a key of verify or verify.filters."


TITLES = {"low_marks": "marked low by the judge", "surplus": "more than are kept of a problem"}
CAUSES = {
    "malformed": _malformed,
    "truncated": _truncated,
    "failed": _failed,
    "incorrect": _incorrect,
    "undecided": _incorrect,
    "duplicate": _duplicate,
}
