"""Selection over the set: majority, difficulty, k of a problem, near-duplicates, contamination, balance of domains."""

from __future__ import annotations

import json
from dataclasses import replace

import hypothesis
import pytest
from hypothesis import strategies as st

from jaxdistill.config import DecontaminateConfig, JudgeConfig, MajorityConfig, VerifyConfig
from jaxdistill.verify import Check, compare_math, similarity
from jaxdistill.verify.consistency import NO_GOLD, vote
from jaxdistill.verify.decontaminate import find_contaminated
from jaxdistill.verify.filters import Candidate
from jaxdistill.verify.selection import Known, Marks, domain_cap, pass_rates, select

RIGHT, WRONG, UNSURE = (Check(outcome, None, outcome, "") for outcome in ("correct", "incorrect", "undecided"))
MEASURED = {"loop": 0, "compression": 1.0, "refusals": 0}


def candidate(problem="p", sample=0, check=RIGHT, text="", **facts):
    text = text or f"response {problem} {sample}"
    made = Candidate(
        trace_id=f"{problem}/plain/{sample}",
        problem_id=problem,
        sample=sample,
        check=check,
        structure="closed",
        digest=text.encode(),
        length=len(text),
        measures=MEASURED,
        signature=similarity.signature(text, 5),
    )
    return replace(made, **facts)


def names(candidates, known=None, **settings):
    return [fallen and fallen.name for fallen in select(candidates, VerifyConfig(**settings), known)]


# ------------------------------------------------------------------------------------------------- majority


def voter(problem, sample, answer):
    return candidate(problem, sample, Check("undecided", answer, NO_GOLD if answer else "no answer found", ""))


def outcomes(found):
    return [(c.check.outcome, c.check.reason) for c in found]


def ask(pairs):
    return [compare_math(*pair) for pair in pairs]


def test_equal_answers_vote_together_however_they_are_written():
    answers = ["1/2", r"\frac{1}{2}", "0.5", "0.4", None]
    found = vote([voter("p", n, a) for n, a in enumerate(answers)], {"p"}, MajorityConfig(), ask)
    with_three = ("correct", "with 3 of 5 traces")
    assert outcomes(found) == [with_three] * 3 + [
        ("incorrect", "against 3 of 5 traces"),
        ("undecided", "no answer found"),
    ]
    assert {c.check.method for c in found[:4]} == {"majority"}


@pytest.mark.parametrize(
    ("answers", "settings"),
    [
        (["1", "1", "2", "2"], {"min_votes": 2}),  # two of a size
        (["1", "1", "2"], {}),  # too few votes
        (["1", "1", "1", "2", "3", "4", "5"], {}),  # too small a share
    ],
)
def test_without_a_clear_majority_nothing_is_decided(answers, settings):
    found = vote([voter("p", n, a) for n, a in enumerate(answers)], {"p"}, MajorityConfig(**settings), ask)
    assert {(outcome, reason) for outcome, reason in outcomes(found)} == {("undecided", "no majority")}


def test_problems_with_a_gold_answer_are_left_alone():
    before = [voter("p", n, "1") for n in range(3)] + [candidate("q")]
    assert vote(before, set(), MajorityConfig(), ask) == before


# ----------------------------------------------------------------------------------------------- difficulty


def test_pass_rates_leave_out_what_the_engine_failed_on():
    traces = [candidate(sample=0), candidate(sample=1, check=WRONG), candidate(sample=2, check=UNSURE)]
    traces += [candidate(sample=3, check=UNSURE, finish_reason="error")]
    assert pass_rates(traces) == {"p": pytest.approx(1 / 3)}


def test_windows_of_difficulty():
    traces = [candidate("easy", n) for n in range(4)]
    traces += [candidate("hard", n, RIGHT if n == 0 else WRONG) for n in range(8)]
    traces += [candidate("fair", n, RIGHT if n else WRONG) for n in range(2)]
    found = names(traces, pass_rate=(0.2, 0.9))
    assert found == ["too_easy"] * 4 + ["too_hard"] + ["incorrect"] * 7 + ["incorrect", None]


# --------------------------------------------------------------------------------------------- k of a problem


def kept(candidates, **settings):
    fallen = names(candidates, **settings)
    return [c.sample for c, name in zip(candidates, fallen, strict=True) if name is None]


TEXTS = [f"{'the sum of two even numbers is even ' * 3} {n}" for n in range(3)] + [
    "a quite different way to see it " * 2
]


def test_which_k_are_chosen():
    traces = [candidate(sample=n, text="x" * size) for n, size in enumerate((50, 20, 40, 10))]
    assert kept(traces, keep_per_problem=2) == [0, 1]
    assert kept(traces, keep_per_problem=2, choose="shortest") == [1, 3]
    by_hash = kept(traces, keep_per_problem=2, choose="random")
    assert by_hash == [t.sample for t in traces if t.sample in by_hash]
    alike = [candidate(sample=n, text=text) for n, text in enumerate(TEXTS)]
    assert kept(alike, keep_per_problem=2, choose="diverse") == [0, 3]


@pytest.mark.parametrize("choose", ["first", "shortest", "diverse", "random"])
def test_what_is_chosen_does_not_depend_on_the_order_of_the_files(choose):
    traces = [candidate(sample=n, text=text * (1 + n % 3)) for n, text in enumerate(TEXTS * 2)]
    settings = {"keep_per_problem": 3, "choose": choose, "near_duplicates": 0.9}
    assert kept(traces, **settings) == sorted(kept(traces[::-1], **settings))


def test_near_duplicates_of_a_preferred_trace_fall():
    traces = [candidate(sample=n, text=text) for n, text in enumerate(TEXTS)]
    assert names(traces, near_duplicates=0.7) == [None, "near_duplicate", "near_duplicate", None]
    assert names([candidate("q"), *traces[:1]], near_duplicates=0.7) == [None, None]
    detail = select(traces, VerifyConfig(near_duplicates=0.7))[1]
    assert detail is not None
    assert detail.detail.endswith("like p/plain/0")


def test_signatures_estimate_the_jaccard_index():
    a = " ".join(map(str, range(1000)))
    b = " ".join(map(str, range(200, 1200)))
    exact = similarity.jaccard(similarity.shingles(a, 5), similarity.shingles(b, 5))
    first, second = similarity.signature(a, 5), similarity.signature(b, 5)
    assert similarity.similarity(first, second) == pytest.approx(exact, abs=0.12)
    assert (similarity.decode(similarity.encode(first)) == first).all()


# ------------------------------------------------------------------------------------------------- problems

QUESTION = "A train leaves the station at nine and goes eighty miles an hour until it is noon. How far does it go?"


def test_of_problems_that_are_alike_the_first_with_a_good_trace_keeps_its_traces():
    texts = [QUESTION, QUESTION.replace("nine", "nine o'clock"), "What is the sum of all primes below one hundred?"]
    assert similarity.first_alike(texts, 3, 0.6) == [0, 0, 2]
    known = Known(place={"b": 0, "a": 1, "c": 2}, alike={"b": "b", "a": "b", "c": "c"})
    assert names([candidate("a"), candidate("b"), candidate("c")], known) == ["duplicate_problem", None, None]
    assert names([candidate("a"), candidate("b", check=WRONG)], known) == [None, "incorrect"]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_problem_of_a_benchmark_is_found_by_n_gram_and_by_likeness(tmp_path):
    files = {
        "trains": write(tmp_path / "a.jsonl", [{"question": "What is 1+1?"}, {"question": QUESTION}]),
        "other": write(
            tmp_path / "b.jsonl", [{"problem": "Name a prime number that is even and prove that it is one"}]
        ),
    }
    asked = [
        ("same", QUESTION.upper()),
        ("inside", f"Read well! {QUESTION} Give it in miles, and box your answer."),
        ("alike", "Name a prime number that is even, and prove it is"),
        ("short", "what is 1 + 1"),
        ("clean", "How many legs do nine spiders have that have lost three legs each?"),
    ]
    found = find_contaminated(DecontaminateConfig(files=files, ngram=10, fuzzy=0.5), asked)
    where = {name: (m.benchmark, m.row, m.method) for name, m in found.items()}
    assert where == {
        "same": ("trains", 2, "n-gram"),
        "inside": ("trains", 2, "n-gram"),
        "alike": ("other", 1, "fuzzy"),
        "short": ("trains", 1, "n-gram"),
    }
    assert found["same"].overlap == 1 and found["inside"].overlap < 1
    assert str(found["same"]).startswith("trains row 2, 100% of the n-grams: a train leaves")
    without = find_contaminated(DecontaminateConfig(files=files, ngram=10, fuzzy=None), asked)
    assert "alike" not in without
    fallen = select([candidate("same")], VerifyConfig(), Known(contaminated=found))[0]
    assert fallen is not None and fallen.name == "contaminated" and "trains row 2" in fallen.detail


def test_a_benchmark_without_questions_is_refused(tmp_path):
    files = {"x": write(tmp_path / "a.jsonl", [{"text": "a"}])}
    with pytest.raises(ValueError, match=r"a.jsonl:1: no question in question or problem or prompt; this row has text"):
        find_contaminated(DecontaminateConfig(files=files), [])


# -------------------------------------------------------------------------------------------------- domains


@hypothesis.given(
    sizes=st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 50), min_size=1),
    most=st.none() | st.integers(1, 60),
    share=st.none() | st.floats(0.05, 1.0),
)
def test_the_cap_is_the_largest_that_keeps_to_both_limits(sizes, most, share):
    cap = domain_cap(sizes, most, share)
    if most is None and share is None:
        assert cap is None
        return

    def fits(n):
        left = [min(size, n) for size in sizes.values()]
        return (most is None or n <= most) and (share is None or max(left) <= share * sum(left))

    assert cap is not None and cap >= 1
    if share is None or share * len(sizes) > 1:
        assert fits(cap)
        assert cap >= max(sizes.values()) or not fits(cap + 1)
    else:
        assert cap <= min(sizes.values())


def test_domains_are_balanced():
    traces = [candidate(f"m{n}", domain="math") for n in range(9)] + [candidate("c", domain="code")]
    found = names(traces, max_per_domain=3)
    assert found.count("domain_surplus") == 6 and found[-1] is None
    assert names(traces, max_domain_share=0.75).count(None) == 4
    assert names(traces, max_domain_share=0.5).count(None) == 2


# ----------------------------------------------------------------------------------------------- the others


def test_formats_that_are_rare_in_the_set():
    traces = [candidate(f"p{n}", form="boxed") for n in range(9)] + [candidate("q", form="hashes")]
    assert names(traces, filters={"min_format_share": 0.2}) == [None] * 9 + ["rare_format"]


def test_marks_drop_traces():
    judge = JudgeConfig(model="m", server={"urls": ["http://a/v1"]}, min_faithfulness=3, min_coherence=2)
    marks = {"a": Marks(3, 2), "b": Marks(2, 5), "c": Marks(5, 1), "d": Marks(None, None)}
    known = Known(marks={f"{name}/plain/0": each for name, each in marks.items()})
    traces = [candidate(name) for name in marks]
    assert names(traces, known, judge=judge) == [None, "low_marks", "low_marks", None]
    strict = replace(judge, unparsed="drop")
    assert names(traces, known, judge=strict)[-1] == "low_marks"
