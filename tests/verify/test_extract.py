"""Extraction: which part of a response is its final answer, and when there is none."""

from __future__ import annotations

import pytest

from jaxdistill.verify import check_math
from jaxdistill.verify.extract import MAX_CONTENT, extract_answer

# (response, answer)
FOUND = [
    # boxes
    (r"The answer is \boxed{57}.", "57"),
    (r"<think>a</think>The answer is \boxed{57}.", "57"),
    (r"Ann=54</think>\boxed{54}", "54"),  # the prompt had opened the thinking
    (r"<think>\boxed{1}</think> so \boxed{2}", "2"),
    (r"<think>a</think> \boxed{1} </think> \boxed{2}", "2"),
    (r"\boxed{5}. Wait, actually \boxed{7}", "7"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"\boxed{\boxed{5}}", r"\boxed{5}"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"a } stray \boxed{5} { brace", "5"),
    (r"\boxed {5}", "5"),
    (r"\fbox{5}", "5"),
    (r"\boxed{5} then \fbox{6}", "6"),
    (r"\boxed{3} and \boxed{4}", "3, 4"),
    (r"$\boxed{3}$, $\boxed{4}$", "3, 4"),
    (r"$\boxed{3}$, and $\boxed{4}$.", "3, 4"),
    (r"\boxed{3}\text{ and }\boxed{4}", "3, 4"),
    (r"First \boxed{3}. Then, and only then, \boxed{4}.", "4"),
    (r"$x = \boxed{5}$", "5"),
    (r"\(\boxed{5}\)", "5"),
    ("\\[\n\\boxed{5}\n\\]", "5"),
    (r"**\boxed{5}**", "5"),
    ("so\n- \\boxed{5}\n- as seen", "5"),
    (r"<answer>\boxed{5}</answer>", "5"),
    (r"It is not 7, but \boxed{5}.", "5"),
    (r"It is \boxed{5}, not 7.", "5"),
    (r"\boxed{10}\%", r"10 \%"),
    (r"$\boxed{90}^\circ$", r"90 ^\circ"),
    (r"\boxed{5}\text{ cm}", r"5 \text{ cm}"),
    (r"\boxed{5} million", "5 million"),
    (r"#### 3" + "\n" + r"\boxed{4}", "4"),  # a box comes before all else
    # hashes
    ("Natalia sold 48/2 = <<48/2=24>>24 clips.\n#### 72", "72"),
    ("#### 3\nmore\n#### 4", "4"),
    ("#### 1,234", "1,234"),
    ("#### $18", "$18"),
    ("#### 18\n\nI hope it helps.", "18"),
    ("#### no solution", "no solution"),
    ("#### 18\nThe answer is eighteen.", "18"),
    ("#### Step 3: add\nThe answer is 7.", "7"),
    ("#### Conclusion\nThe answer is 7.", "7"),
    # statements
    ("The final answer is 7.", "7"),
    ("the answer is 7", "7"),
    ("So the answer is 3.5. Then we check.", "3.5"),
    ("The answer is: **18**.", "18"),
    ("The answer is:\n\n$$\n18\n$$", "18"),
    ("The answer is $18 per day.", "$18 per day"),
    ("The answer is 5. No, the answer is 7.", "7"),
    ("**Answer:** 42", "42"),
    ("**Final Answer**: 42\n", "42"),
    ("A: 18", "18"),
    ("18 eggs.\nA: 18\nAll done.", "18"),
    ("A: 3\nB: 5\nThe answer is B.", "B"),
]

# (response, reason)
NOT_FOUND = [
    ("", "no answer found"),
    ("I do not know.", "no answer found"),
    ("Ann has 54 and Bob has 57", "no answer found"),  # the last number is never taken
    (r"<think>\boxed{5}</think>", "no answer found"),
    (r"<think>\boxed{5}</think> I am done.", "no answer found"),
    (r"\boxed{}", "no answer found"),
    ("A: 3\nB: 5", "no answer found"),
    (r"<think>\boxed{5}", "truncated"),
    (r"text <think> the answer is 5", "truncated"),
    (r"<think>a</think>\boxed{5}<think>hm", "truncated"),
    (r"\boxed{5", "unbalanced box"),
    (r"\boxed{5} Wait, actually \boxed{7", "unbalanced box"),
    (r"\boxed 5", "unbalanced box"),
    (r"\boxed{5} or \boxed{7}", "hedged"),
    (r"$\boxed{5}$, or maybe $\boxed{7}$", "hedged"),
    (r"\boxed{5} or 7", "hedged"),
    (r"It is 7 or \boxed{5}", "hedged"),
    (r"maybe \boxed{5}", "hedged"),
    (r"\boxed{5}?", "hedged"),
    (r"It is not \boxed{5}", "negated"),
    (r"The answer isn't $\boxed{5}$", "negated"),
    ("The answer isn\u2019t \\boxed{5}", "negated"),
    (r"$x \neq \boxed{5}$", "negated"),
    (r"\boxed{5} is wrong.", "negated"),
    (r"$\boxed{5}$ is not the answer", "negated"),
    ("The answer isn't 5.", "negated"),
    ("The answer cannot be 5.", "negated"),
    (r"$-\boxed{5}$", "box inside an expression"),
    (r"$- \boxed{5}$", "box inside an expression"),
    (r"$2\boxed{5}$", "box inside an expression"),
    (r"$7 + \boxed{5}$", "box inside an expression"),
    (r"$x > \boxed{5}$", "box inside an expression"),
    (r"$\frac{1}{\boxed{5}}$", "box inside an expression"),
    (r"$\boxed{5}^2$", "box inside an expression"),
    (r"$\boxed{5}\pi$", "box inside an expression"),
    (r"$\boxed{5} + 3$", "box inside an expression"),
    (r"$\boxed{5} x$", "box inside an expression"),
    (r"\boxed{5}. Wait, that is wrong.", "taken back"),
    ("#### 5\nThis is incorrect.", "taken back"),
    ("The answer is 5. Hmm, I made a mistake.", "taken back"),
    ("The answer is 5.\n\nQ: Bob has 3 pens.\nA: The answer is 3.", "goes on with another question"),
]


@pytest.mark.parametrize(("response", "answer"), FOUND)
def test_the_final_answer_is_found(response, answer):
    assert extract_answer(response).answer == answer


@pytest.mark.parametrize(("response", "reason"), NOT_FOUND)
def test_no_answer_is_guessed(response, reason):
    assert (extract_answer(response).answer, extract_answer(response).reason) == (None, reason)
    check = check_math(response, "5")
    assert (check.outcome, check.reason, check.extracted) == ("undecided", reason, None)


@pytest.mark.parametrize(
    ("response", "gold", "outcome"),
    [
        (r"\boxed{5}. Wait, actually \boxed{7}", "7", "correct"),
        (r"\boxed{5}. Wait, actually \boxed{7}", "5", "incorrect"),
        ("The answer is 5 or 7.", "5", "undecided"),
        ("The answer is not 5.", "5", "undecided"),
        ("The answer is 5!", "5", "undecided"),
        (r"\boxed{10}\%", "10", "undecided"),
        (r"\boxed{10}\%", r"10\%", "correct"),
        (r"\boxed{5} cents", "$5", "incorrect"),
        (r"\boxed{1},\boxed{234}", "1234", "undecided"),
        (r"\boxed{3} and \boxed{4}", "3, 4", "correct"),
        (r"\boxed{x<1 \text{ or } x>2}", "x<1 or x>2", "correct"),
        # a response that states two answers, or takes one back, has not made up its mind
        (r"\boxed{5}. The answer is 7.", "5", "undecided"),
        (r"\boxed{5}. The answer is 7.", "7", "undecided"),
        (r"\boxed{5}. The answer is not 5.", "5", "undecided"),
        (r"\boxed{5}. The answer is 5 apples.", "5", "correct"),
        (r"\boxed{5}" + "\n#### 6", "5", "undecided"),
    ],
)
def test_whole_responses(response, gold, outcome):
    assert check_math(response, gold).outcome == outcome


def test_only_the_end_of_a_long_content_is_read():
    assert extract_answer("x " * MAX_CONTENT + r"\boxed{5}").answer == "5"
    assert extract_answer(r"\boxed{5}" + " x" * MAX_CONTENT).answer is None


HOSTILE = [
    *(r"\boxed{", r"\boxed", r"\boxed{}", r"\boxed{5},", r"\boxed{5} or ", r"\[", r"\(", "{", "}", "{,}", "\\", "\\\\"),
    *("1+", "9", "9^", "1,234,", r"1\,", "0.", ".", "1/", "1 ", r"\frac{", r"\frac1", r"\text{", r"\text{a}", "^{2}"),
    *("x=", "e", "(", "-", "~", "%", "$", "\u20ac", " ", "\n", "\t", "\u2009", "#", "#### ", "####\n", "*", "`", "'"),
    *("answer", "answer ", "the answer is ", "A", "A:\n", "\nA", "Q:", "wait ", "n't ", "apples ", "a/b/"),
    *("<think>", "</think>", "<think></think>"),
]


@pytest.mark.parametrize("unit", HOSTILE)
def test_a_hostile_megabyte_takes_milliseconds(unit, cpu_seconds):
    text = unit * (1_000_000 // len(unit))
    places = [text, rf"\boxed{{{text}}}", text + r"\boxed{5}", r"\boxed{5}" + text, "The answer is " + text]
    places += [
        f"<think>{text}</think>5",
        "#### " + text[:900],
        rf"\boxed{{5{text[:900]}}}",
        rf"\boxed{{{text[:900]}5}}",
    ]
    taken = cpu_seconds(lambda: [check_math(place, text[:900]) for place in places])
    # these 9 checks take about 0.03 s; a quadratic regex takes minutes
    assert taken < 1.0


@pytest.mark.parametrize(
    "answer",
    [
        *("9^{9^9}", "10**10**10", "(10^8)!", "300000000!", "10^{10^{10}}", "1e999999999", r"\sum_{n=1}^{10^9} n"),
        *("__import__('os').system('true')", "().__class__.__base__.__subclasses__()"),
        *("9" * 1_000_000, r"0.\overline{" + "3" * 900 + "}"),
    ],
)
def test_what_hangs_or_runs_elsewhere_is_undecided_at_once(answer, cpu_seconds):
    checks = []
    taken = cpu_seconds(lambda: checks.append(check_math(rf"\boxed{{{answer}}}", "5")))
    assert checks[0].outcome == "undecided"
    assert taken < 0.2
