"""What became of the traces, step by step and domain by domain: counts for the manifest, lines for people."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from jaxdistill import progress
from jaxdistill.config import VerifyConfig
from jaxdistill.verify.filters import Candidate, Rejection
from jaxdistill.verify.selection import STEPS

TITLES = {"traces": "generated", "well_formed": "well formed", "kept": "selected"}
MOST_REASONS = 8


def count_yield(
    candidates: Sequence[Candidate], rejected: Sequence[Rejection | None], problems: Mapping[str, Any]
) -> dict[str, Any]:
    """Counts of a verified set.

    Returns:
      `traces`, then `finished`, `well_formed`, `correct`, `unique` and `kept`: the traces that are left after each step
      (with `verify.answer: false` no trace falls at `correct`; `outcomes` then still says what was found). `rejected`:
      filter -> traces. `reasons`: filter -> its most frequent reasons -> traces. `outcomes`: outcome -> traces.
      `undecided`: reason -> traces. `domains`: domain -> the same steps. `unknown_problems`: traces without a problem.
      `problems`, and `problems_with_a_kept_trace`.
    """
    fell = Counter(rejection.name for rejection in rejected if rejection)
    reasons: defaultdict[str, Counter[str]] = defaultdict(Counter)
    by_domain: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for candidate, rejection in zip(candidates, rejected, strict=True):
        by_domain[candidate.domain]["" if rejection is None else rejection.name] += 1
        if rejection is not None:
            reasons[rejection.name][rejection.detail] += 1
    checks = [candidate.check for candidate in candidates]
    kept = {c.problem_id for c, rejection in zip(candidates, rejected, strict=True) if rejection is None}
    order = [name for names in STEPS.values() for name in names if fell[name]]
    return {
        **_steps(fell, len(candidates)),
        "rejected": {name: fell[name] for name in order},
        "reasons": {name: dict(reasons[name].most_common(MOST_REASONS)) for name in order},
        "outcomes": {o: sum(c.outcome == o for c in checks) for o in ("correct", "incorrect", "undecided")},
        "undecided": dict(Counter(c.reason for c in checks if c.outcome == "undecided").most_common()),
        "domains": {domain: _steps(by_domain[domain], by_domain[domain].total()) for domain in sorted(by_domain)},
        "unknown_problems": sum(c.problem_id not in problems for c in candidates),
        "problems": len(problems),
        "problems_with_a_kept_trace": len(kept),
    }


def _steps(fell: Mapping[str, int], total: int) -> dict[str, int]:
    """The traces that are left after each step."""
    counts = {"traces": total}
    left = total
    for step, names in STEPS.items():
        left -= sum(fell[name] for name in names)
        counts[step] = left
    return counts


def print_yield(counts: dict[str, Any], config: VerifyConfig) -> None:
    """Prints the waterfall: one line a step, with what fell at it; then one a domain, if there are several."""
    progress.say(f"  {counts['traces']:,} traces of {counts['problems']:,} problems")
    steps = [step for step in STEPS if step != "correct" or config.answer]
    for step in ("traces", *steps):
        fell = ", ".join(f"{counts['rejected'][n]:,} {n}" for n in STEPS.get(step, ()) if n in counts["rejected"])
        share = counts[step] / max(1, counts["traces"])
        progress.say(f"  {TITLES.get(step, step):<12}{counts[step]:>10,}{share:>8.1%}  {fell and '- ' + fell}".rstrip())
    if len(counts["domains"]) > 1:
        width = max(8, *(len(domain) for domain in counts["domains"]))
        titles = [TITLES.get(step, step) for step in ("traces", *steps)]
        progress.say(f"  {'domain':<{width}}" + "".join(f"{title:>13}" for title in titles))
        for domain, each in counts["domains"].items():
            progress.say(f"  {domain:<{width}}" + "".join(f"{each[step]:>13,}" for step in ("traces", *steps)))
    progress.say(f"  problems with a kept trace: {counts['problems_with_a_kept_trace']:,}")
