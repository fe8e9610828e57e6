"""Numbers of one model on one set, from its scores: accuracy, pass@k, maj@k, best-of-n, seeds, domains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxdistill.evals import quality, statistics
from jaxdistill.records import Score
from jaxdistill.verify.notation import normalize, squeeze


def correct_by_problem(scores: Sequence[Score]) -> dict[str, list[bool]]:
    """Problem id -> whether each of its samples is correct, in their order; undecided is not correct."""
    found: dict[str, list[bool]] = {}
    for score in sorted(scores, key=lambda score: score.sample):
        found.setdefault(score.problem_id, []).append(score.outcome == "correct")
    return {name: found[name] for name in dict.fromkeys(score.problem_id for score in scores)}


def means(scores: Sequence[Score]) -> dict[str, float]:
    """Problem id -> the share of its samples that are correct."""
    return {name: sum(each) / len(each) for name, each in correct_by_problem(scores).items()}


def summarise(
    scores: Sequence[Score], seconds: float, *, seeds: int = 1, domains: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """What the manifest, the table and the report say of one model.

    Args:
      seeds: sample s belongs to seed number s * seeds // samples.
      domains: problem id -> domain.
    Returns:
      `problems`; `correct`, `incorrect`, `undecided`, `truncated` (responses); `accuracy` (of several samples: avg@k)
      with its 95% interval `low`, `high`; `mean_output_tokens`; `tokens` of all responses; `seconds` and
      `tokens_per_second` of sampling, loading the model left out; `quality` (see `quality.summarise`). With several
      samples `pass_at` and `maj_at`: k -> value, low, high; with likelihoods `best_of_n`; with several seeds
      `by_seed`: accuracies; with several domains `domains`: problems, accuracy, low and high of each.
    """
    by_problem = correct_by_problem(scores)
    found = statistics.accuracy(by_problem)
    tokens = sum(score.output_tokens for score in scores)
    counts: dict[str, Any] = {
        "problems": len(by_problem),
        **{outcome: sum(s.outcome == outcome for s in scores) for outcome in ("correct", "incorrect", "undecided")},
        "accuracy": found.value,
        "low": found.low,
        "high": found.high,
        "mean_output_tokens": tokens / max(len(scores), 1),
        "tokens": tokens,
        "truncated": sum(s.finish_reason == "length" for s in scores),
        "seconds": seconds,
        "tokens_per_second": tokens / seconds if seconds > 0 else 0.0,
        "quality": quality.summarise(scores),
    }
    samples = min((len(each) for each in by_problem.values()), default=0)
    if samples > 1:
        counts |= _several(scores, by_problem, samples)
    if seeds > 1 and samples % seeds == 0:
        each = samples // seeds
        counts["by_seed"] = [
            sum(sum(good[s * each : (s + 1) * each]) / each for good in by_problem.values()) / len(by_problem)
            for s in range(seeds)
        ]
    if domains and len(set(domains.values())) > 1:
        counts["domains"] = _by_domain(by_problem, domains)
    return counts


def _several(scores: Sequence[Score], by_problem: Mapping[str, Sequence[bool]], samples: int) -> dict[str, Any]:
    """pass@k and maj@k at the powers of two and at all samples, and best-of-n."""
    sizes = sorted({1 << i for i in range(samples.bit_length()) if 1 << i <= samples} | {samples})
    votes = votes_by_problem(scores)
    found: dict[str, Any] = {"pass_at": {}, "maj_at": {}}
    for k in sizes:
        passed = [statistics.pass_at_k(len(good), sum(good), k) for good in by_problem.values()]
        found["pass_at"][str(k)] = _interval(statistics.bootstrap(passed))
        voted = [statistics.majority_at_k(votes[name], good, k) for name, good in by_problem.items()]
        found["maj_at"][str(k)] = _interval(statistics.bootstrap(voted))
    likelihoods: dict[str, list[float]] = {}
    for score in sorted(scores, key=lambda score: score.sample):
        if score.likelihood is not None:
            likelihoods.setdefault(score.problem_id, []).append(score.likelihood)
    if all(len(likelihoods.get(name, ())) == len(good) for name, good in by_problem.items()):
        best = [statistics.best_of(likelihoods[name], good) for name, good in by_problem.items()]
        found["best_of_n"] = _interval(statistics.bootstrap(best))
    return found


def votes_by_problem(scores: Sequence[Score]) -> dict[str, list[str | None]]:
    """Problem id -> each sample's answer, spelled in one way; right answers are one vote, however they are spelled."""
    found: dict[str, list[str | None]] = {}
    for score in sorted(scores, key=lambda score: score.sample):
        vote = None
        if score.outcome == "correct":
            vote = "correct"
        elif score.extracted:
            vote = "= " + squeeze(normalize(score.extracted))
        found.setdefault(score.problem_id, []).append(vote)
    return found


def _by_domain(by_problem: Mapping[str, Sequence[bool]], domains: Mapping[str, str]) -> dict[str, Any]:
    found = {}
    for domain in sorted(set(domains.values())):
        part = {name: good for name, good in by_problem.items() if domains.get(name) == domain}
        if part:
            found[domain] = {"problems": len(part)} | _interval(statistics.accuracy(part), "accuracy")
    return found


def _interval(found: statistics.Accuracy, name: str = "value") -> dict[str, float]:
    return {name: found.value, "low": found.low, "high": found.high}


def compare(ours: Sequence[Score], theirs: Sequence[Score]) -> dict[str, Any]:
    """Two models on the problems of both: wins, losses, ties, exact p; `difference` of accuracies, `low`, `high`."""
    tested = statistics.compare(correct_by_problem(ours), correct_by_problem(theirs))
    gap = statistics.paired_difference(means(ours), means(theirs))
    return {
        "wins": tested.wins,
        "losses": tested.losses,
        "ties": tested.ties,
        "p": tested.p,
        "difference": gap.value,
        "low": gap.low,
        "high": gap.high,
    }


def table(models: dict[str, dict[str, Any]], width: int = 24) -> list[str]:
    """Aligned lines for people, one a model: accuracy, interval, tokens a response, truncated responses, a bar."""
    if not models:
        return []
    names = max(len("model"), *(len(name) for name in models))
    lines = [f"  {'model':<{names}}  accuracy   95% interval  tokens  truncated"]
    for name, m in models.items():
        interval = f"{100 * m['low']:.1f} to {100 * m['high']:.1f}"
        filled = round(width * m["accuracy"])
        lines.append(
            f"  {name:<{names}}  {100 * m['accuracy']:7.1f}%  {interval:>13}"
            f"  {m['mean_output_tokens']:6.0f}  {m['truncated']:9,}  {'█' * filled}{'░' * (width - filled)}"
        )
    return lines


def more_lines(models: dict[str, dict[str, Any]]) -> list[str]:
    """pass@k, maj@k and best-of-n, a line a model, where there are several samples."""
    lines = []
    for name, m in models.items():
        if "pass_at" not in m:
            continue
        parts = [f"pass@{k} {100 * v['value']:.1f}%" for k, v in m["pass_at"].items() if k != "1"]
        parts += [f"maj@{k} {100 * v['value']:.1f}%" for k, v in list(m["maj_at"].items())[-1:]]
        if "best_of_n" in m:
            parts.append(f"best of n by likelihood {100 * m['best_of_n']['value']:.1f}%")
        if "by_seed" in m:
            parts.append("by seed " + ", ".join(f"{100 * a:.1f}%" for a in m["by_seed"]))
        lines.append(f"  {name}: {', '.join(parts)}")
    return lines
