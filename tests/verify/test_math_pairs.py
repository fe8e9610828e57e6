"""The table of pairs with their truth, and formulas held against sympy.

`math_pairs.jsonl` has one pair a line: `kind`, `answer`, `gold` and `equal`, whether the answer deserves to be called
correct. Undecided is allowed for both, wrong is not.
"""

from __future__ import annotations

import json
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import sympy
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from jaxdistill.verify import Check, check_math, compare_math
from jaxdistill.verify.latex import parse_latex

TABLE = Path(__file__).parent / "math_pairs.jsonl"
ROWS = [json.loads(line) for line in TABLE.read_text(encoding="utf-8").splitlines()]
KINDS = sorted({row["kind"] for row in ROWS})


@cache
def checks() -> list[Check]:
    return [compare_math(row["answer"], row["gold"]) for row in ROWS]


@pytest.mark.parametrize("kind", KINDS)
def test_no_pair_of_the_table_is_judged_wrong(kind):
    wrong = {True: "incorrect", False: "correct"}
    for row, check in zip(ROWS, checks(), strict=True):
        assert row["kind"] != kind or check.outcome != wrong[row["equal"]], (row, check)


def test_the_table_is_large_and_most_of_it_is_decided():
    assert len(ROWS) >= 600 and len(KINDS) >= 20
    found = Counter((row["equal"], check.outcome) for row, check in zip(ROWS, checks(), strict=True))
    assert found[True, "correct"] > 0.99 * sum(row["equal"] for row in ROWS)
    assert found[False, "incorrect"] > 0.75 * sum(not row["equal"] for row in ROWS)


def test_the_order_of_comparisons_changes_nothing():
    parse_latex.cache_clear()
    backwards = [compare_math(row["answer"], row["gold"]) for row in reversed(ROWS)]
    assert checks() == backwards[::-1]


@pytest.mark.parametrize(
    ("response", "gold", "problem", "outcome"),
    [
        (r"\boxed{\sqrt{50}}", r"5\sqrt{2}", r"Simplify $\sqrt{50}$.", "undecided"),
        (r"\boxed{x^2+x-2}", "(x-1)(x+2)", "Factor $x^2 + x - 2$.", "undecided"),
        (r"\boxed{\binom{10}{3}}", "120", r"Compute $\dbinom{10}{3}$.", "undecided"),
        (r"\boxed{(x-1)(x+2)}", "(x+2)(x-1)", "Factor $x^2 + x - 2$.", "correct"),
        (r"\boxed{5}", "5", "Is it 5 or 7?", "correct"),
        (r"\boxed{\sqrt{50}}", r"5\sqrt{2}", None, "correct"),
    ],
)
def test_an_echo_of_the_problem_is_no_answer(response, gold, problem, outcome):
    assert check_math(response, gold, problem=problem).outcome == outcome


# ------------------------------------------------------------------------------------------ held against sympy

X, Y = sympy.symbols("x y")
NUMBERS = st.integers(-9, 9).map(sympy.Integer)
LEAVES = st.one_of(NUMBERS, st.sampled_from([X, Y, sympy.pi, sympy.E, sympy.sqrt(2), sympy.Rational(2, 3)]))


def combine(parts: st.SearchStrategy[sympy.Expr]) -> st.SearchStrategy[sympy.Expr]:
    positive = st.integers(1, 9).map(sympy.Integer)
    return st.one_of(
        st.tuples(parts, parts).map(lambda p: p[0] + p[1]),
        st.tuples(parts, parts).map(lambda p: p[0] * p[1]),
        st.tuples(parts, positive).map(lambda p: p[0] / p[1]),
        st.tuples(parts, st.integers(2, 3)).map(lambda p: p[0] ** p[1]),
        st.tuples(positive, positive).map(lambda p: sympy.sqrt(p[0] + sympy.sqrt(p[1]))),
        parts.map(lambda p: sympy.sin(p)),
        positive.map(sympy.log),
    )


FORMULAS = st.recursive(LEAVES, combine, max_leaves=6)
PROPERTY = settings(max_examples=60, deadline=None, database=None, derandomize=True)


def latex(expression: sympy.Expr) -> str:
    return sympy.latex(expression, ln_notation=True, inv_trig_style="full")


def is_zero(expression: sympy.Expr) -> bool:
    """By value at one point, with sympy's own arithmetic."""
    return abs(sympy.N(expression.subs({X: sympy.Rational(37, 29), Y: sympy.Rational(-53, 31)}), 60)) < 1e-40


@PROPERTY
@given(FORMULAS)
def test_a_formula_equals_its_other_forms_and_no_neighbour(formula):
    gold = latex(formula)
    assume(len(gold) < 200)
    for other in (sympy.expand(formula), sympy.factor(formula), sympy.together(formula)):
        check = compare_math(latex(other), gold)
        assert check.outcome != "incorrect", (latex(other), gold, check)
    for other in (formula + 1, 2 * formula, -formula, formula + X, formula**2):
        if not is_zero(other - formula):
            check = compare_math(latex(other), gold)
            assert check.outcome != "correct", (latex(other), gold, check)


@PROPERTY
@given(FORMULAS, FORMULAS)
def test_a_verdict_on_two_formulas_is_sympys(a, b):
    equal = is_zero(a - b)
    check = compare_math(latex(a), latex(b))
    assert check.outcome != ("incorrect" if equal else "correct"), (latex(a), latex(b), check)


@PROPERTY
@given(st.lists(st.integers(-9, 9), min_size=1, max_size=3), st.sampled_from("xn"))
def test_a_polynomial_equals_its_product_and_no_neighbour(roots, name):
    product = "".join(f"({name} {'-' if root >= 0 else '+'} {abs(root)})" for root in roots)
    symbol = sympy.Symbol(name)
    expanded = sympy.expand(sympy.prod([symbol - root for root in roots]))
    assert compare_math(latex(expanded), product).outcome == "correct"
    assert compare_math(product, latex(expanded)).outcome == "correct"
    assert compare_math(latex(expanded + 1), product).outcome == "incorrect"


@PROPERTY
@given(st.lists(st.integers(-20, 20), min_size=2, max_size=5, unique=True), st.randoms(use_true_random=False))
def test_the_order_of_a_set_is_free_and_that_of_a_point_is_not(values, rng):
    shuffled = rng.sample(values, len(values))
    write = ", ".join
    a, b = write(map(str, values)), write(map(str, shuffled))
    assert compare_math(rf"\{{{b}\}}", rf"\{{{a}\}}").outcome == "correct"
    assert (compare_math(f"({b})", f"({a})").outcome == "correct") == (values == shuffled)
    assert compare_math(rf"\{{{b}, 99\}}", rf"\{{{a}\}}").outcome == "incorrect"


@PROPERTY
@given(st.integers(-9, 9), st.integers(1, 9), st.sampled_from("[("), st.sampled_from("])"))
def test_an_interval_is_its_inequality_and_no_other(low, width, left, right):
    high = low + width
    inequality = rf"{low} {'<' if left == '(' else chr(92) + 'le'} x {'<' if right == ')' else chr(92) + 'le'} {high}"
    assert compare_math(f"{left}{low}, {high}{right}", inequality).outcome == "correct"
    for other in (f"{left}{low}, {high + 1}{right}", f"{left}{low - 1}, {high}{right}"):
        assert compare_math(other, inequality).outcome == "incorrect"
    flipped = ("[" if left == "(" else "(") + f"{low}, {high}{right}"
    assert compare_math(flipped, inequality).outcome == "incorrect"


PIECES = r"( ) [ ] { } + - / * ^ _ , | ! % : = < 0 1 2 9 99 0.5 x y e i or \pi \infty \pm \cup \frac{1}{0}".split()
PIECES += (
    r"\frac{x}{2} \sqrt{ \sqrt[3]{ \ln \log_ \sin( \tan \binom{9}{ \lfloor \rfloor ^\circ \{ \} \text{cm} \in".split()
)
TEXTS = st.lists(st.sampled_from(PIECES), min_size=1, max_size=12).map(" ".join)


@settings(max_examples=300, deadline=None, database=None, derandomize=True)
@given(TEXTS, TEXTS)
def test_no_formula_raises_and_one_answer_has_one_truth(answer, gold):
    check = compare_math(answer, gold)
    assert check.reason
    if check.outcome == "correct":
        assert compare_math(gold, answer).outcome != "incorrect"


def test_towers_are_bounded(cpu_seconds):
    towers = ["9" + "^{9" * n + "}" * n for n in range(1, 15)]
    towers += [r"\sin(" * n + "10^{300}" + ")" * n for n in range(1, 15)]
    towers += ["e^{" * n + "9" + "}" * n for n in range(1, 15)]
    towers += [rf"(x+y)^{{{10**n}}}" for n in range(8)] + [rf"\sqrt[{10**n}]{{2}}" for n in range(8)]
    taken = cpu_seconds(lambda: [compare_math(tower, gold) for tower in towers for gold in (r"\sqrt{2}", "x+y", "5")])
    assert taken < 5.0  # about half a second
