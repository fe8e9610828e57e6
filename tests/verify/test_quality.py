"""Quality filters: each falls on what it is for, passes what it is not for, and takes linear time."""

from __future__ import annotations

import time

import hypothesis
import pytest
from hypothesis import strategies as st

from jaxdistill.config import FiltersConfig, VerifyConfig
from jaxdistill.demo.task import make_problems
from jaxdistill.verify import quality
from jaxdistill.verify.measuring import measure
from jaxdistill.verify.quality import QUALITY
from jaxdistill.verify.texts import Text, prose_of

ENGLISH = (
    "We first look for the number of apples that Ann had in the morning, and then subtract the ones which she gave to "
    "her brother. After that the rest is shared evenly among the four children, so that each of them gets the same. "
)
FRENCH = (
    "Nous cherchons d'abord le nombre de pommes que la jeune fille avait le matin, puis nous retirons celles qu'elle a "
    "données à son frère. Ensuite le reste est partagé entre les quatre enfants, et chacun reçoit la même quantité. "
)
LONG = " ".join(f"Step {n}: we add {n * n} to {n + 7} and obtain {n * n + n + 7}, as was wanted." for n in range(60))


def response(thinking: str, answer: str = "The answer is \\boxed{5}.") -> str:
    return f"<think>\n{thinking}\n</think>\n{answer}"


CHINESE = "所以答案是五个苹果因为其余的都给了别人"
PROMPT = "How many apples does Ann have, if she had nine and ate four of them?"
LEAKED = "The answer is 5. "
SHARE = {"max_other_language": 0.3, "max_loop": None}
FALLS = [
    ("cut_off", {"max_open_ends": 0}, response("a", "```python\nprint(5)"), response("a", "```python\nprint(5)\n```")),
    ("short_thinking", {"min_thinking": 20}, response("short"), response(ENGLISH)),
    ("long_thinking", {"max_thinking": 300}, response(LONG), response(ENGLISH)),
    ("short_answer", {"min_answer": 3}, response(ENGLISH, "5"), response(ENGLISH)),
    ("long_answer", {"max_answer": 300}, response("a", LONG), response("a")),
    ("few_steps", {"min_steps": 3}, response("one\n\n---\ntwo"), response("one\ntwo\n3")),
    ("many_steps", {"max_steps": 2}, response("one\ntwo\n3"), response("one\n\n---\ntwo")),
    ("loop", {}, response(LONG + " Wait, no." * 100), response(LONG)),
    ("compressible", {"max_loop": None}, response(ENGLISH * 40), response(LONG)),
    ("repetitive", {"max_repeated_ngrams": 0.5}, response(ENGLISH * 4), response(LONG)),
    ("foreign_script", {"max_foreign_script": 0.05}, response(ENGLISH + CHINESE), response(ENGLISH)),
    ("foreign_script", {"max_foreign_script": 0.05}, response("Итак, " * 9 + ENGLISH), response("α; x→5 " + ENGLISH)),
    ("other_language", SHARE, response(ENGLISH * 5 + FRENCH * 4), response(ENGLISH * 9)),
    ("other_language", SHARE | {"language": "en"}, response(FRENCH * 5), response(ENGLISH * 5)),
    ("refusal", {}, response("a", "I’m sorry, but I can't help with that."), response("I cannot help", "It is 5.")),
    ("hedging", {"max_hedges": 0}, response("a", "It is probably 5."), response("probably 5", "It is 5.")),
    ("doubting", {"max_doubt": 30}, response("Wait, maybe not. Hmm, wait. Actually 5."), response(LONG)),
    ("echo", {"max_echo": 0.3}, response(PROMPT), response(LONG)),
    ("leaked_answer", {"min_answer_place": 0.1}, response(LEAKED + LONG), response(LONG + LEAKED)),
    ("long_paragraph", {"max_paragraph": 400, "max_loop": None}, response(LONG), response("\n\n".join([ENGLISH] * 9))),
    ("code", {"max_code": 0.5}, response("a", f"```\n{LONG}\n```"), response(LONG)),
    ("symbols", {"max_symbols": 0.2}, response("→★☆◆→" * 30), response(LONG)),
]  # fmt: skip


def fault(text: str, **settings) -> tuple[str, str] | None:
    config = FiltersConfig(**settings)
    return quality.fault(measure(text, PROMPT, config, with_signature=False), config)


@pytest.mark.parametrize(
    ("name", "settings", "bad", "good"),
    FALLS,
    ids=[name for name, *_ in FALLS],
)
def test_a_filter_falls_on_what_it_is_for_and_on_nothing_else(name, settings, bad, good):
    found = fault(bad, **settings)
    assert found is not None
    assert found[0] == name
    assert QUALITY[name].threshold in found[1]
    assert fault(good, **settings) is None


def test_every_filter_has_a_case_and_every_threshold_a_filter():
    assert {name for name, *_ in FALLS} == set(QUALITY)
    thresholds = {quality.threshold for quality in QUALITY.values()} | {"language", "min_format_share"}
    assert thresholds == set(FiltersConfig.__dataclass_fields__)


def test_by_default_nothing_of_the_demo_task_falls():
    for _, _, solution in make_problems(100, seed=3):
        assert fault(solution) is None


def test_code_and_latex_are_no_prose():
    text = "We see $x^2$ and \\(y\\), `inline` too.\n```python\nfor x in y: pass\n```\n\\[ \\frac{1}{2} \\]\n"
    text += "It costs $5.\n\n$6?"
    prose, code = prose_of(text)
    assert " ".join(prose.split()) == "We see and , too. It costs 5. 6?"
    assert code == len("`inline`") + len("```python\nfor x in y: pass\n```")


def test_what_is_never_closed_is_prose():
    assert prose_of("a ``` b \\[ c \\begin{d e") == ("a  b  c d e", 0)


@pytest.mark.parametrize("rounds", [3, 4, 5])
def test_a_loop_has_four_rounds(rounds):
    text = Text(response(LONG + " So it is five." * rounds))
    assert (quality.loop(text, FiltersConfig()) > 0) == (rounds >= 4)


@hypothesis.given(st.text("ab", max_size=40))
def test_a_loop_is_the_longest_periodic_end(letters):
    text = " ".join(letters)
    longest = 0
    for size in range(1, len(letters) // quality.ROUNDS + 1):
        for whole in range(quality.ROUNDS * size, len(letters) + 1):
            end = letters[-whole:]
            if all(a == b for a, b in zip(end, end[size:], strict=False)):
                longest = max(longest, whole)
    assert quality.loop(Text(text), FiltersConfig()) == longest


HOSTILE = ["a", "the answer is ", "`", "$ ", "\\[ ", "\\begin{", "\n\n", " ", "<think>", "汉字", "wait let me re", "α "]
HOSTILE += ["\ud800", "$a`b", "####", "not entirely "]


@pytest.mark.parametrize("piece", HOSTILE)
def test_megabytes_are_measured_in_linear_time(piece):
    every = FiltersConfig(**{q.threshold: 1 for q in QUALITY.values()})
    taken = []
    for size in (80_000, 160_000):
        text = response(piece * (size // len(piece)), piece * (size // len(piece)))
        start = time.process_time()
        measure(text, PROMPT, every, with_signature=True)
        taken.append(time.process_time() - start)
    assert taken[1] < max(1.0, 4 * taken[0])  # quadratic time would be minutes here


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_loop": -1}, "verify.filters.max_loop is -1; set 0 or more"),
        ({"language": "English"}, "give two small letters"),
    ],
)
def test_thresholds_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        FiltersConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pass_rate": (0.9, 0.1)}, "the lower first"),
        ({"pass_rate": (0.1, 0.9), "answer": False}, "verify.answer: false does not look at"),
        ({"keep_per_problem": 0}, "keep at least 1"),
        ({"near_duplicates": 1.5}, "set a share"),
        ({"decontaminate": {"files": {}}}, "name at least one benchmark"),
        ({"judge": {"model": "m"}}, "needs `verify.judge.server.urls`"),
        ({"majority": {"min_votes": 1}}, "set 2 or more"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        VerifyConfig(**settings)
