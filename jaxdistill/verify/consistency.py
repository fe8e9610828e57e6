"""Self-consistency: where a problem has no gold answer, the answer that most of its traces give takes its place.

Source: Wang et al. 2022, arXiv:2203.11171, section 2. A majority may be wrong, so such verdicts say that they are one.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace

from jaxdistill.config import MajorityConfig
from jaxdistill.verify.compare import Check
from jaxdistill.verify.filters import Candidate
from jaxdistill.verify.notation import normalize, squeeze

METHOD = "majority"
NO_GOLD = "no gold answer"
MOST_ANSWERS = 24
"""Different answers of a problem that are compared with each other, the most frequent ones."""

Compare = Callable[[list[tuple[str, str]]], list[Check]]


def vote(
    candidates: Sequence[Candidate], without_gold: set[str], config: MajorityConfig, compare: Compare
) -> list[Candidate]:
    """The candidates, with checks by majority for the problems `without_gold`.

    Args:
      compare: checks (answer, other answer) pairs, as `compare_math` does.
    """
    traces: Counter[str] = Counter()
    answers: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for candidate in candidates:
        if candidate.problem_id in without_gold and not candidate.unreadable:
            traces[candidate.problem_id] += 1
            if _is_voter(candidate):
                answers[candidate.problem_id][_spelling(candidate.check.extracted)] += 1
    groups = _equal_answers(answers, compare)
    leaders = {problem: _leader(answers[problem], groups[problem]) for problem in answers}
    return [
        replace(c, check=_check(c, answers[c.problem_id], groups[c.problem_id], leaders[c.problem_id], traces, config))
        if c.problem_id in answers and _is_voter(c)
        else c
        for c in candidates
    ]


def _is_voter(candidate: Candidate) -> bool:
    return candidate.check.reason == NO_GOLD and candidate.check.extracted is not None


def _spelling(answer: str | None) -> str:
    assert answer is not None
    return squeeze(normalize(answer))


def _equal_answers(answers: dict[str, Counter[str]], compare: Compare) -> dict[str, dict[str, str]]:
    """Problem -> spelling -> the most frequent spelling that equals it."""
    often = {p: [text for text, _ in sorted(c.items(), key=lambda kv: (-kv[1], kv[0]))] for p, c in answers.items()}
    pairs = {
        (problem, later, earlier): (later, earlier)
        for problem, texts in often.items()
        for earlier, later in itertools.combinations(texts[:MOST_ANSWERS], 2)
    }
    checks = dict(zip(pairs, compare(list(pairs.values())), strict=True))
    groups: dict[str, dict[str, str]] = {}
    for problem, texts in often.items():
        heads: dict[str, str] = {}
        for text in texts:
            equal = (
                head
                for head in dict.fromkeys(heads.values())
                if (found := checks.get((problem, text, head))) and found.outcome == "correct"
            )
            heads[text] = next(equal, text)
        groups[problem] = heads
    return groups


def _leader(votes: Counter[str], heads: dict[str, str]) -> tuple[str, int]:
    """The answer with most votes, and how many; no answer if two have as many."""
    total: Counter[str] = Counter()
    for text, count in votes.items():
        total[heads[text]] += count
    first, *others = total.most_common(2)
    return ("", first[1]) if others and others[0][1] == first[1] else first


def _check(
    candidate: Candidate,
    votes: Counter[str],
    heads: dict[str, str],
    leader: tuple[str, int],
    traces: Counter[str],
    config: MajorityConfig,
) -> Check:
    head, count = leader
    total = traces[candidate.problem_id]
    if not head or count < config.min_votes or count < config.min_share * total:
        return replace(candidate.check, reason="no majority")
    mine = heads[_spelling(candidate.check.extracted)] == head
    return Check(
        "correct" if mine else "incorrect",
        candidate.check.extracted,
        f"{'with' if mine else 'against'} {count} of {total} traces",
        METHOD,
    )
