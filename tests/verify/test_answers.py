"""Comparison: pairs in both directions of error, then properties of numbers in many spellings."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from jaxdistill.verify import check_math, compare_math
from jaxdistill.verify.compare import KINDS

# (answer, gold, method)
CORRECT = [
    # integers
    ("5", "5", "integer"),
    ("+5", "5", "integer"),
    ("-5", "-5", "integer"),
    ("\u22125", "-5", "integer"),
    ("- 5", "-5", "integer"),
    ("0", "-0", "integer"),
    ("1,234", "1234", "integer"),
    ("1{,}234", "1,234", "integer"),
    (r"1\,234", "1234", "integer"),
    (r"1\,234\,567", "1234567", "integer"),
    (r"1,\!234", "1234", "integer"),
    ("1234567", "1,234,567", "integer"),
    ("18.00", "18", "integer"),
    ("(5)", "5", "integer"),
    ("{5}", "5", "integer"),
    ("$5$", "5", "integer"),
    (r"\(5\)", "5", "integer"),
    (r"\[ 5 \]", "5", "integer"),
    (r"\boxed{5}", "5", "integer"),
    (r"\fbox{5}", "5", "integer"),
    ("**5**", "5", "integer"),
    ("`5`", "5", "integer"),
    ("5.", "5", "integer"),
    (r"\displaystyle 5", "5", "integer"),
    (r"\text{The answer is }7", "7", "integer"),
    ("The final answer is: 7.", "7", "integer"),
    ("x=5", "5", "integer"),
    ("x = 5", "x=5", "integer"),
    ("5", "x=5", "integer"),
    # decimals and scientific
    ("0.50", "0.5", "decimal"),
    (".5", "0.5", "decimal"),
    ("1/2", "0.5", "decimal"),
    (r"-\frac{1}{2}", "-0.5", "decimal"),
    (r"\approx 3.14", "3.14", "decimal"),
    ("1e3", "1000", "integer"),
    ("1.2E-5", "0.000012", "decimal"),
    (r"1.5 \times 10^{3}", "1500", "integer"),
    (r"1.5\cdot10^3", "1500", "integer"),
    ("1.5 x 10^3", "1500", "integer"),
    ("1\u00d710^3", "1000", "integer"),
    ("1000000", "10^6", "scientific"),
    ("10^{-2}", "0.01", "decimal"),
    ("1e400", "10^{400}", "scientific"),
    (r"0.\overline{3}", "1/3", "rational"),
    (r"0.1\overline{6}", r"\frac16", "rational"),
    (r"1.\overline{142857}", r"\frac{8}{7}", "rational"),
    # fractions and mixed numbers
    (r"\frac{1}{2}", "1/2", "rational"),
    (r"\dfrac{2}{4}", "1/2", "rational"),
    (r"\frac12", r"\tfrac{1}{2}", "rational"),
    (r"\frac{-1}{2}", r"-\frac{1}{2}", "rational"),
    (r"\frac{1,000}{3}", "1000/3", "rational"),
    ("1 / 2", "1/2", "rational"),
    ("1 1/2", "3/2", "rational"),
    (r"1\frac{1}{2}", r"\frac{3}{2}", "rational"),
    (r"-1 \frac12", "-1.5", "decimal"),
    # percent, currency, units
    (r"10\%", "10%", "percent"),
    ("10 percent", r"10 \%", "percent"),
    (r"10\%", "0.1", "percent"),
    ("0.1", "10%", "percent"),
    ("$18", "18", "integer"),
    (r"\$18", "$18$", "integer"),
    (r"$\$18.00$", "18", "integer"),
    ("18", r"\$18", "integer"),
    ("18 dollars", "$18", "integer"),
    ("$18 per day", "18", "integer"),
    ("$-5", "-5", "integer"),
    ("57 shells", "57", "integer"),
    (r"57 \text{ shells}", "57", "integer"),
    (r"57~\text{shells}", "57", "integer"),
    ("5 apple", "5 apples", "integer"),
    ("5 cm", r"5\,\mathrm{cm}", "integer"),
    ("5cm", "5 centimeters", "integer"),
    ("5 hrs", "5 hours", "integer"),
    (r"5 \text{ m}", "5", "integer"),
    (r"5 \text{ cm}^2", "5 cm\u00b2", "integer"),
    ("5 more apples", "5", "integer"),
    ("1/2 cup", "0.5", "decimal"),
    (r"90^\circ", "90", "integer"),
    ("90", r"90^{\circ}", "integer"),
    ("90\u00b0", "90 degrees", "integer"),
    # gold answers that say that they were rounded
    ("3.14159", r"\approx 3.14", "decimal"),
    ("1/3", "about 0.333", "decimal"),
    # choices and words
    ("B", "B", "choice"),
    ("(B)", "B", "choice"),
    (r"\text{B}", "(B)", "choice"),
    (r"\textbf{(B)} 42", "B", "choice"),
    ("B) 42", "B", "choice"),
    ("B: 42", "B", "choice"),
    ("option B", "B", "choice"),
    ("no solution", "No solution", "text"),
    (r"\text{no solution}", "no solution", "text"),
    ("yes", "Yes.", "text"),
    ("TUESDAY", "Tuesday", "text"),
    # what needs algebra, spelled the same
    (r"\sqrt2", r"\sqrt{2}", "text"),
    ("x^2+1", "x^{2} + 1", "text"),
    ("(1,2)", r"\left( 1, 2 \right)", "text"),
    (r"\left(\frac12,3\right)", r"(\dfrac{1}{2}, 3)", "text"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", "text"),
    ("x<1 or x>2", "x < 1 or x > 2", "text"),
    ("1010_2", "1010_{2}", "text"),
    ("3:30", "3 : 30", "text"),
    ("2\u03c0", r"2\pi", "text"),
    ("3x+2=5", "3x + 2 = 5", "text"),
    # the false negatives that others were seen to make
    (r"e^{i\pi}", "-1", "algebra"),
    (r"\sqrt{-4}", "2i", "algebra"),
    (r"(-\infty,1)\cup(2,\infty)", "x<1 or x>2", "algebra"),
]

INCORRECT = [
    ("5", "7"),
    ("-5", "5"),
    ("500", "5"),
    ("20241", "20240"),
    ("1,234", "1,243"),
    ("5.000", "5000"),
    ("0.46", "0.5"),
    ("1/3", "0.33"),
    ("0.1", "0.01"),
    ("1e3", "1e4"),
    (r"0.\overline{3}", "0.3"),
    (r"\frac{1}{2}", r"\frac{1}{3}"),
    ("11/2", "1 1/2"),
    ("1" + "0" * 300, "1" + "0" * 299 + "1"),
    ("1e-300", "1e-299"),
    ("1e-300", "0"),
    (f"1/{2**99}", f"1/{2**98}"),
    ("10%", "20%"),
    ("10%", "7"),
    ("5 cm", "5 m"),
    ("5 cm", "5 cm^2"),
    ("5 m^2", r"5 \text{ m}"),
    ("$5", "5 cents"),
    ("5 degrees", "5 radians"),
    ("2 hours", "121"),
    ("57 shells", "58"),
    ("A", "B"),
    ("(C) 42", "B"),
    ("True", "False"),
    ("Tuesday", "Wednesday"),
    ("3.14", r"\approx 3.15"),
    ("yes", "no"),
    # the false positives that others were seen to make
    ("1/2^99", "1/2^98"),
    ("1/2^{99}", "1/2^{98}"),
    ("e^{-40}", "e^{-41}"),
    ("5-7", "5"),
    ("5^2", "5"),
    ("5\u00b2", "52"),
    (r"5\cdot 2", "5"),
    (r"5\pi", "5"),
]

# (answer, gold, reason)
UNDECIDED = [
    # the false positives that others were seen to make
    ("10%", "10", "percent against a plain number"),
    (r"10\%", "10", "percent against a plain number"),
    ("10", "10%", "percent against a plain number"),
    ("(1,2)", r"\{1,2\}", "a set or not"),
    ("1010", "1010_2", "different forms: a formula and a number in a base"),
    ("1010", "1010 in base 2", "different forms: a formula and a number in a base"),
    ("1010 in base 2", "1010", "different forms: a number in a base and a formula"),
    ("3x+2=5", "5", "an equation or a formula"),
    ("The answer is not 5", "5", "negated"),
    (r"\int_0^1 x^2 dx", "1/3", "not understood"),
    ("5 apples", "5 oranges", "different units"),
    # more than one number, or not quite one
    ("5 or 7", "5", "hedged"),
    (r"5 \text{ or } 7", "7", "hedged"),
    ("maybe 5", "5", "hedged"),
    ("5?", "5", "hedged"),
    ("not 5", "5", "negated"),
    ("5, 7", "5", "more than one answer"),
    ("5 and 7", "5", "more than one answer"),
    ("5 to 7", "5", "two numbers side by side"),
    (r"\pm 5", "5", "more than one answer"),
    (r"5 \pm 1", "5", "more than one answer"),
    (r"\{5\}", "5", "a set or not"),
    ("[5]", "5", "more than one answer"),
    ("x>5", "5", "not a region"),
    ("5!", "5", "a factorial or an exclamation"),
    ("10^{2}3", "10^{23}", "two numbers side by side"),
    ("5 % 3", "5", "two numbers side by side"),
    ("5x", "5", "different variables"),
    ("5 xyz", "5", "words in a formula"),
    ("5m", "5", "different variables"),
    ("5 m", "5", "a unit or a variable"),
    ("5 million", "5", "words in a formula"),
    ("5 million", "5000000", "words in a formula"),
    ("5 dozen", "5", "words in a formula"),
    ("5 halves", "5", "words in a formula"),
    ("5 tenths", "5", "words in a formula"),
    ("5 less than seven", "5", "words in a formula"),
    ("five", "5", "not a number"),
    ("x=5, y=7", "5", "different variables"),
    ("y=5", "x=5", "different variables"),
    (r"\frac{1}{0}", "5", "no value"),
    # separators and blanks that may mean something else
    ("1, 234", "1234", "more than one answer"),
    ("1,234", "1, 234", "a comma with two readings"),
    ("(1,234)", "(1, 234)", "a comma with two readings"),
    ("(1,234, 5)", "(1, 234, 5)", "a comma with two readings"),
    (r"1\,234", "1 234", "a comma with two readings"),
    ("3 5/2", "11/2", "two numbers side by side"),
    ("5,00", "500", "a leading zero"),
    ("0,500", "500", "more than one answer"),
    ("1,2345", "12345", "more than one answer"),
    ("1 234", "1234", "two numbers side by side"),
    (r"5\,5", "55", "two numbers side by side"),
    ("5\n5", "55", "two numbers side by side"),
    ("007", "7", "a leading zero"),
    ("0x5", "5", "two numbers side by side"),
    ("1_000", "1000", "not understood"),
    ("\u0663", "3", "not understood"),
    ("x+1 1/2", "x+11/2", "two numbers side by side"),
    # rounding
    ("3.14159", "3.14", "equal only after rounding"),
    ("22/7", "3.14", "equal only after rounding"),
    ("0.333", "1/3", "equal only after rounding"),
    ("0.333...", "1/3", "not understood"),
    (r"\approx 5", "5", "approximate"),
    ("5.2", r"\approx 5", "approximate"),
    # units
    ("5", "5 cm", "no unit"),
    ("500 cm", "5 m", "different units"),
    ("2 hours", "120", "a unit may differ"),
    ("50 cents", "0.5", "a unit may differ"),
    ("10%", "$10", "percent against a plain number"),
    # words and choices
    ("A or B", "A", "hedged"),
    ("A and B", "A", "not a choice"),
    ("(A), (B)", "A", "not a choice"),
    ("a", "A", "not a choice"),
    ("AB", "A", "not a choice"),
    ("none", "no solution", "worded differently"),
    ("no real solutions", "no solution", "worded differently"),
    ("x", "X", "different variables"),
    ("ABC", "abc", "worded differently"),
    # too large for arithmetic
    ("9^{9^9}", "5", "too large"),
    ("10^{999999999}", "5", "too large"),
    ("1e99999", "1e99998", "two numbers side by side"),
    ("1e401", "1e402", "two numbers side by side"),
    ("9" * 401, "9" * 400, "not understood"),
    ("9" * 1001, "9" * 1001, "too long"),
    # nothing to compare
    ("", "5", "no answer found"),
    ("  ", "5", "no answer found"),
    ("5", "", "no gold answer"),
]


@pytest.mark.parametrize(("answer", "gold", "method"), CORRECT)
def test_equal_answers_are_correct(answer, gold, method):
    check = compare_math(answer, gold)
    assert (check.outcome, check.method) == ("correct", method), check


@pytest.mark.parametrize(("answer", "gold"), INCORRECT)
def test_different_answers_are_incorrect(answer, gold):
    assert compare_math(answer, gold).outcome == "incorrect"


@pytest.mark.parametrize(("answer", "gold", "reason"), UNDECIDED)
def test_doubtful_answers_are_undecided_with_a_reason(answer, gold, reason):
    check = compare_math(answer, gold)
    assert (check.outcome, check.reason) == ("undecided", reason), check


@pytest.mark.parametrize("pair", [(a, g) for a, g, _ in CORRECT + UNDECIDED] + INCORRECT)
def test_a_boxed_answer_is_judged_as_the_answer_itself(pair):
    answer, gold = pair
    if answer.strip() and r"\boxed" not in answer and r"\fbox" not in answer:
        assert check_math(rf"So \boxed{{{answer}}}.", gold).outcome == compare_math(answer, gold).outcome


def test_the_extracted_answer_stands_as_it_was_written():
    assert compare_math(r" 1{,}234 ", "1234").extracted == "1{,}234"


@pytest.mark.parametrize(
    ("answer", "gold", "kind", "outcome"),
    [
        ("5", "5", "number", "correct"),
        ("5", "5", "expression", "correct"),
        ("B", "B", "choice", "correct"),
        ("Two", "two", "words", "correct"),
        ("five", "5", "words", "undecided"),
        ("5", "five", "number", "undecided"),
        ("B", "7", "choice", "undecided"),
    ],
)
def test_a_known_kind_picks_the_comparison(answer, gold, kind, outcome):
    assert compare_math(answer, gold, kind=kind).outcome == outcome


def test_an_unknown_kind_is_refused_and_the_known_ones_are_named():
    with pytest.raises(ValueError, match=f"'matrix'; known .* {', '.join(KINDS)}"):
        check_math("The answer is 5.", "5", kind="matrix")


# ----------------------------------------------------------------------------------------------- properties

# the same examples in every run; no deadline, because the machine may be busy
PROPERTY = settings(max_examples=150, deadline=None, database=None, derandomize=True)


def integer_spellings(n: int) -> list[str]:
    grouped = f"{n:,}"
    return [
        str(n),
        grouped,
        grouped.replace(",", "{,}"),
        grouped.replace(",", r"\,"),
        grouped.replace(",", r",\!"),
        f"{n}.0",
        f"{n}.00",
        f"${n}$",
        rf"\({grouped}\)",
        rf"\boxed{{{n}}}",
        rf"\${grouped}",
        f"{grouped} shells",
        rf"{n}\text{{ shells}}",
        f"{n}e0",
        rf"{n} \times 10^{{0}}",
        rf"\frac{{{n}}}{{1}}",
        rf"\frac{{{2 * n}}}{{2}}",
        f"{3 * n}/3",
        f"x = {n}",
    ]


@PROPERTY
@given(st.integers(-(10**12), 10**12), st.data())
def test_an_integer_equals_itself_in_every_spelling_and_no_neighbour(n, data):
    spelling = data.draw(st.sampled_from(integer_spellings(n)))
    assert compare_math(spelling, str(n)).outcome == "correct"
    for other in (n - 1, n + 1):
        assert compare_math(spelling, str(other)).outcome != "correct"


@PROPERTY
@given(st.integers(1, 10**9), st.sampled_from([10, 100, 1000]))
def test_a_separator_never_hides_a_power_of_ten(n, scale):
    for spelling in integer_spellings(n):
        assert compare_math(spelling, str(n * scale)).outcome != "correct"


@PROPERTY
@given(st.integers(-(10**9), 10**9), st.integers(1, 6))
def test_a_decimal_equals_itself_and_no_neighbour(digits, places):
    value, unit = Fraction(digits, 10**places), Fraction(1, 10**places)

    def write(x: Fraction) -> str:
        scaled = abs(int(x * 10**places))
        return f"{'-' if x < 0 else ''}{scaled // 10**places}.{scaled % 10**places:0{places}}"

    gold = write(value)
    for spelling in (gold, gold + "0", f"{digits}e-{places}", rf"\frac{{{digits}}}{{{10**places}}}"):
        assert compare_math(spelling, gold).outcome == "correct"
    assert compare_math(write(value + unit), gold).outcome == "incorrect"
    assert compare_math(write(value - unit), gold).outcome == "incorrect"


@PROPERTY
@given(st.integers(-999, 999), st.integers(1, 999), st.integers(1, 50))
def test_a_fraction_equals_its_expansions_and_no_neighbour(a, b, factor):
    gold = f"{a}/{b}"
    for spelling in (
        rf"\frac{{{a}}}{{{b}}}",
        rf"\dfrac{{{a * factor}}}{{{b * factor}}}",
        f"{a * factor} / {b * factor}",
    ):
        assert compare_math(spelling, gold).outcome == "correct"
        assert compare_math(spelling, f"{a + 1}/{b}").outcome == "incorrect"
        assert compare_math(spelling, f"{a * factor * 1000 + 1}/{b * factor * 1000}").outcome == "incorrect"


@PROPERTY
@given(st.integers(1, 99), st.integers(1, 99), st.integers(2, 99))
def test_a_mixed_number_is_a_sum_and_never_a_longer_numerator(whole, above, below):
    assume(above < below)
    gold = f"{whole * below + above}/{below}"
    assert compare_math(f"{whole} {above}/{below}", gold).outcome == "correct"
    assert compare_math(rf"{whole}\frac{{{above}}}{{{below}}}", gold).outcome == "correct"
    if below != 10:  # 1 1/10 is 11/10
        assert compare_math(f"{whole}{above}/{below}", gold).outcome == "incorrect"


@PROPERTY
@given(st.integers(1, 10**6), st.sampled_from(["cm", "m", "kg", "apples", "oranges", "hours", "dollars"]), st.data())
def test_a_unit_differs_from_every_other_unit(n, unit, data):
    other = data.draw(st.sampled_from(["cm", "m", "kg", "apples", "oranges", "hours", "dollars"]))
    check = compare_math(rf"{n} \text{{ {unit}}}", rf"{n} \text{{ {other}}}")
    assert (check.outcome == "correct") == (unit == other)


@PROPERTY
@given(st.text(alphabet=st.sampled_from(list("0123456789.,/^_-+=%$\\{}()[] exmo~'")), max_size=30), st.integers(0, 999))
def test_what_is_correct_for_a_number_is_not_correct_for_another(answer, n):
    outcomes = [compare_math(answer, str(gold)).outcome for gold in (n, n + 1)]
    assert outcomes != ["correct", "correct"]


@PROPERTY
@given(st.text(max_size=60), st.text(max_size=30))
def test_no_text_raises(answer, gold):
    for check in (compare_math(answer, gold), check_math(answer, gold), check_math(rf"\boxed{{{answer}}}", gold)):
        assert check.outcome in ("correct", "incorrect", "undecided")
        assert check.reason
