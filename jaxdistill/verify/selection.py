"""Which traces are kept: the filters of the trace itself, then those that look at the set, in one order.

Form and quality; the answer; judge's marks; duplicates; then what is chosen among good traces: contamination,
difficulty, k of a problem, the balance of domains. Nothing depends on the order of the files.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from jaxdistill.config import JudgeConfig, VerifyConfig
from jaxdistill.verify import quality
from jaxdistill.verify.filters import ANSWER, FORM, Candidate, Rejection, first_fault, form_fault
from jaxdistill.verify.similarity import similarity

Rejections = list[Rejection | None]

STEPS: dict[str, tuple[str, ...]] = {
    "finished": ("unreadable", "failed", "truncated"),
    "well_formed": (*(name for name in FORM if name not in ("unreadable", "failed", "truncated")), *quality.QUALITY,
                    "rare_format"),
    "correct": (*ANSWER, "low_marks"),
    "unique": ("duplicate_problem", "duplicate", "near_duplicate"),
    "kept": ("contaminated", "too_hard", "too_easy", "surplus", "domain_surplus"),
}  # fmt: skip
"""What the waterfall counts, and the filters that a trace has to pass to be counted there."""


@dataclass(frozen=True, slots=True)
class Marks:
    """What the judge said of a trace; None where its reply could not be read."""

    faithfulness: int | None
    coherence: int | None


@dataclass(frozen=True, kw_only=True)
class Known:
    """What is known beyond the traces themselves."""

    place: Mapping[str, int] = field(default_factory=dict)
    """Problem -> its place among the problems."""
    alike: Mapping[str, str] = field(default_factory=dict)
    """Problem -> the first of those that are near-duplicates of each other."""
    contaminated: Mapping[str, object] = field(default_factory=dict)
    """Problem -> where it stands in a benchmark."""
    marks: Mapping[str, Marks] = field(default_factory=dict)
    """Trace -> marks."""


def select(candidates: Sequence[Candidate], config: VerifyConfig, known: Known | None = None) -> Rejections:
    """For every candidate the first filter that it falls to, or None if it is kept; in the given order."""
    known = known or Known()
    found: Rejections = [form_fault(candidate, config) for candidate in candidates]
    rates = pass_rates(candidates)
    for step in (
        lambda left: _rare_formats(candidates, left, config),
        lambda left: _answers(candidates, left, config),
        lambda left: _low_marks(candidates, left, config.judge, known),
        lambda left: _duplicate_problems(candidates, left, known),
        lambda left: _duplicates(candidates, left, config),
        lambda left: _contaminated(candidates, left, known),
        lambda left: _difficulty(candidates, left, config, rates),
        lambda left: _surplus(candidates, left, config),
        lambda left: _domains(candidates, left, config),
    ):
        for i, rejection in step([i for i, fallen in enumerate(found) if fallen is None]):
            found[i] = rejection
    return found


def pass_rates(candidates: Iterable[Candidate]) -> dict[str, float]:
    """Problem -> share of its traces whose answer is correct; those that the engine failed on do not count."""
    drawn: Counter[str] = Counter()
    correct: Counter[str] = Counter()
    for candidate in candidates:
        if candidate.finish_reason != "error" and not candidate.unreadable:
            drawn[candidate.problem_id] += 1
            correct[candidate.problem_id] += candidate.check.outcome == "correct"
    return {problem: correct[problem] / count for problem, count in drawn.items()}


Fallen = Iterable[tuple[int, Rejection]]


def _rare_formats(candidates: Sequence[Candidate], left: list[int], config: VerifyConfig) -> Fallen:
    """Formats that few of the set's well-formed traces have."""
    least = config.filters.min_format_share
    if least is None:
        return
    formats = Counter((candidates[i].structure, candidates[i].form) for i in left)
    for i in left:
        share = formats[candidates[i].structure, candidates[i].form] / len(left)
        if share < least:
            what = f"{candidates[i].form} answers with {candidates[i].structure} thinking"
            yield i, Rejection("rare_format", f"{what} are {share:.2%} of the set")


def _answers(candidates: Sequence[Candidate], left: list[int], config: VerifyConfig) -> Fallen:
    for i in left:
        if fault := first_fault(candidates[i], config, ANSWER):
            yield i, fault


def _low_marks(candidates: Sequence[Candidate], left: list[int], judge: JudgeConfig | None, known: Known) -> Fallen:
    """Traces whose marks are too low, or lacking."""
    if judge is None or (judge.min_faithfulness is None and judge.min_coherence is None):
        return
    for i in left:
        marks = known.marks.get(candidates[i].trace_id, Marks(None, None))
        for name in ("faithfulness", "coherence"):
            least, mark = getattr(judge, f"min_{name}"), getattr(marks, name)
            if least is None:
                continue
            if mark is None and judge.unparsed == "drop":
                yield i, Rejection("low_marks", "the judge gave no marks that can be read")
                break
            if mark is not None and mark < least:
                yield i, Rejection("low_marks", f"{name} is {mark} of 5")
                break


def _duplicate_problems(candidates: Sequence[Candidate], left: list[int], known: Known) -> Fallen:
    """Of problems that are alike, the first that has a trace left keeps its traces."""
    first: dict[str, str] = {}
    for i in left:
        problem = candidates[i].problem_id
        group = known.alike.get(problem, problem)
        first[group] = min(first.get(group, problem), problem, key=lambda name: (known.place.get(name, 0), name))
    for i in left:
        problem = candidates[i].problem_id
        keeper = first[known.alike.get(problem, problem)]
        if keeper != problem:
            yield i, Rejection("duplicate_problem", f"the problem is like {keeper}")


def _duplicates(candidates: Sequence[Candidate], left: list[int], config: VerifyConfig) -> Fallen:
    """The same response as a preferred one of the problem, or nearly the same."""
    for group in _by_problem(candidates, left).values():
        kept: list[int] = []
        digests: set[bytes] = set()
        for i in sorted(group, key=lambda i: _preference(candidates[i], config)):
            candidate = candidates[i]
            if config.drop_duplicates and candidate.digest in digests:
                yield i, Rejection("duplicate", "the response is there twice")
                continue
            if config.near_duplicates is not None:
                alike = [(similarity(_signed(candidate), _signed(candidates[j])), j) for j in kept]
                share, other = max(alike, default=(0.0, i))
                if share >= config.near_duplicates:
                    yield i, Rejection("near_duplicate", f"{share:.0%} like {candidates[other].trace_id}")
                    continue
            kept.append(i)
            digests.add(candidate.digest)


def _contaminated(candidates: Sequence[Candidate], left: list[int], known: Known) -> Fallen:
    for i in left:
        if (match := known.contaminated.get(candidates[i].problem_id)) is not None:
            yield i, Rejection("contaminated", str(match))


def _difficulty(
    candidates: Sequence[Candidate], left: list[int], config: VerifyConfig, rates: Mapping[str, float]
) -> Fallen:
    low, high = config.pass_rate
    for i in left:
        rate = rates[candidates[i].problem_id] if config.answer else low
        if rate < low:
            yield i, Rejection("too_hard", f"{rate:.0%} of the problem's traces are correct")
        elif rate > high:
            yield i, Rejection("too_easy", f"{rate:.0%} of the problem's traces are correct")


def _surplus(candidates: Sequence[Candidate], left: list[int], config: VerifyConfig) -> Fallen:
    """More than `keep_per_problem`; `choose` says which."""
    if config.keep_per_problem is None:
        return
    for group in _by_problem(candidates, left).values():
        group.sort(key=lambda i: _preference(candidates[i], config))
        chosen = group[: config.keep_per_problem]
        if config.choose == "diverse":
            chosen = _diverse(candidates, group, config.keep_per_problem)
        for i in group:
            if i not in chosen:
                yield i, Rejection("surplus", f"the problem has {config.keep_per_problem} that are preferred")


def _diverse(candidates: Sequence[Candidate], group: list[int], k: int) -> list[int]:
    """The first, then again and again the one that is least like those chosen; of equals the first."""
    chosen = [group[0]]
    nearest = {i: similarity(_signed(candidates[i]), _signed(candidates[group[0]])) for i in group[1:]}
    while nearest and len(chosen) < k:
        next_ = min(nearest, key=lambda i: nearest[i])
        chosen.append(next_)
        del nearest[next_]
        for i in nearest:
            nearest[i] = max(nearest[i], similarity(_signed(candidates[i]), _signed(candidates[next_])))
    return chosen


def _domains(candidates: Sequence[Candidate], left: list[int], config: VerifyConfig) -> Fallen:
    """More than a domain may have."""
    sizes = Counter(candidates[i].domain for i in left)
    most = domain_cap(sizes, config.max_per_domain, config.max_domain_share)
    if most is None:
        return
    by_domain: defaultdict[str, list[int]] = defaultdict(list)
    for i in left:
        by_domain[candidates[i].domain].append(i)
    for domain, group in by_domain.items():
        group.sort(key=lambda i: _hash(candidates[i].trace_id))
        for i in group[most:]:
            yield i, Rejection("domain_surplus", f"{domain} has {most:,} traces already")


def domain_cap(sizes: Mapping[str, int], most: int | None, share: float | None) -> int | None:
    """The largest number of traces a domain that keeps to both limits; None if there is none.

    Where a share cannot be kept to, as 0.2 of three domains, all are cut to the size of the smallest.
    """
    largest = max(sizes.values(), default=0)
    if share is None or share * len(sizes) <= 1:
        floor = min(sizes.values(), default=0)
        limits = [n for n in (most, floor if share is not None else None) if n is not None]
        return min(limits) if limits else None
    low, high = 1, min(largest, most or largest)
    # the share of the largest domain grows with the cap
    while low < high:
        cap = (low + high + 1) // 2
        if cap <= share * sum(min(n, cap) for n in sizes.values()):
            low = cap
        else:
            high = cap - 1
    return low


def _by_problem(candidates: Sequence[Candidate], left: list[int]) -> dict[str, list[int]]:
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for i in left:
        groups[candidates[i].problem_id].append(i)
    return groups


def _preference(candidate: Candidate, config: VerifyConfig) -> tuple:
    """The smaller, the rather it is kept; sample numbers and ids decide between equals."""
    first = {"shortest": candidate.length, "random": _hash(candidate.trace_id)}.get(config.choose, 0)
    return first, candidate.sample, candidate.trace_id


def _hash(name: str) -> str:
    return hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _signed(candidate: Candidate):
    assert candidate.signature is not None, candidate.trace_id
    return candidate.signature


def needs_signature(config: VerifyConfig) -> bool:
    """Whether traces are compared with each other."""
    return config.near_duplicates is not None or (config.choose == "diverse" and config.keep_per_problem is not None)
