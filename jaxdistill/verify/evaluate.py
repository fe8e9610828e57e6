"""Decides whether two formulas are equal: exactly where they are rational, otherwise by values of 100 digits and more.

Nothing is simplified and nothing is expanded, so the work is bounded by the size of the tree. A formula in variables is
compared at positive, negative and integer points: different formulas of an answer's size do not agree at fractions of
large primes, and what agrees at some kinds of points only (the root of x^2 and x) stays undecided. Roots, powers,
logarithms and constants are computed by mpmath at a precision that resolves the largest against the smallest number
that occurs (so 1 + e^-1000 is not 1), and once more at twice that precision: what agrees to three quarters of the
digits is equal, what differs in the first half of them is different, and anything else stays undecided.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from jaxdistill.verify.latex import Node, Refused

MAX_BITS = 8_000
"""Of any number: of numerator, denominator and binary exponent."""
DIGITS = 100
MAX_FACTORIAL = 400

# primes of this size cancel with nothing that stands in an answer; at integers cos(n pi) is (-1)^n
_PRIMES = (1009, 1013, 1019, 1021, 1031, 1033, 1039, 1049, 1051, 1061, 1063, 1069)
POINTS: dict[str, tuple[Callable[[int], Fraction], ...]] = {
    "positive": (lambda n: Fraction(_PRIMES[n % 12], 7_919 + n), lambda n: Fraction(_PRIMES[n % 12], 317 + n)),
    "negative": (lambda n: Fraction(-_PRIMES[n % 12], 6_007 + n), lambda n: Fraction(-_PRIMES[n % 12], 331 + n)),
    "integer": (lambda n: Fraction(3 + 2 * n), lambda n: Fraction(8 + 3 * n)),
}
"""Two values for each variable, by its number."""
_TRIG = {"sec": "cos", "csc": "sin", "cot": "tan"}
_INVERSE = {"arcsin": "asin", "arccos": "acos", "arctan": "atan"}


class Undefined(Exception):
    """A formula has no value at a point, such as 1/0."""


def variables(node: Node) -> frozenset[str]:
    """Names of the variables of a tree."""
    if node[0] == "sym":
        return frozenset((node[1],))
    return frozenset().union(*(variables(part) for part in node if isinstance(part, tuple) and part))


def is_equal(a: Node, b: Node) -> bool:
    """Whether two formulas have the same value, for every value of their variables.

    Raises:
      Refused: that could not be decided.
    """
    if a == b:
        return True
    names = sorted(variables(a) | variables(b))
    if variables(a) != variables(b):
        raise Refused("different variables")
    if not names:
        try:
            return _same_value(a, b, {})
        except Undefined:
            raise Refused("no value") from None
    if _has_steps(a) or _has_steps(b):
        raise Refused("a step function")  # it may agree at all points and differ elsewhere
    found = {name: _same_at(a, b, names, points) for name, points in POINTS.items()}
    seen = {agrees for agrees in found.values() if agrees is not None}
    if len(seen) != 1:
        raise Refused("equal for some values only" if seen else "no value")
    return seen.pop()


def _has_steps(node: Node) -> bool:
    if node[:2] in (("fn", "floor"), ("fn", "ceil")):
        return True
    return any(_has_steps(part) for part in node if isinstance(part, tuple) and part)


def _same_at(a: Node, b: Node, names: list[str], points: Any) -> bool | None:
    """Whether two formulas agree at all points of a class where both have a value; None if there is no such point."""
    agree = None
    for point in points:
        values = {name: point(n) for n, name in enumerate(names)}
        try:
            if not _same_value(a, b, values):
                return False
        except Undefined:
            continue
        agree = True
    return agree


def _same_value(a: Node, b: Node, values: dict[str, Fraction]) -> bool:
    first, second, extent = [Evaluator(values, DIGITS) for _ in range(2)], None, 0.0
    left, right = first[0].value(a), first[1].value(b)
    if isinstance(left, Fraction) and isinstance(right, Fraction):
        return left == right
    extent = max(e.high for e in first) - min(e.low for e in first)
    digits = DIGITS + int(extent * 0.302) + 1
    if digits * 3.33 > MAX_BITS:
        raise Refused("too large")
    second = Evaluator(values, 2 * digits)
    gap = second.to_real(second.value(a)) - second.to_real(second.value(b))
    scale = max(second.high, *(e.high for e in first))
    distance = second.magnitude(gap) - scale  # binary digits below the largest number that occurred
    if distance < -digits * 3.32 * 1.5:
        return True
    if distance > -digits * 3.32:
        return False
    raise Refused("too close to decide")


_LOCAL = threading.local()


def _context() -> Any:
    """mpmath's functions with a precision of this thread's own."""
    if not hasattr(_LOCAL, "mp"):
        from mpmath import MPContext

        _LOCAL.mp = MPContext()
    return _LOCAL.mp


class Evaluator:
    """The value of a tree: a Fraction as long as it is rational, otherwise a real or complex number of mpmath."""

    def __init__(self, values: dict[str, Fraction], digits: int) -> None:
        self.values, self.digits, self.mp = values, digits, _context()
        # binary magnitudes of the largest and the smallest number that occurred, 0 left out
        self.high, self.low = 0.0, 0.0

    def value(self, node: Node) -> Any:
        """Raises Undefined where there is none, Refused where it is too large or is no number at all."""
        self.mp.dps = self.digits
        try:
            return self._value(node)
        except (ArithmeticError, ValueError):  # mpmath's words for a pole, and for what is too large
            raise Undefined from None

    def _value(self, node: Node) -> Any:
        operator = node[0]
        method = getattr(self, f"_{operator}", None)
        if method is None:
            raise Refused("not a formula")
        return self._check(method(*node[1:]))

    def _check(self, x: Any) -> Any:
        if isinstance(x, Fraction):
            if max(abs(x.numerator).bit_length(), x.denominator.bit_length()) > MAX_BITS:
                raise Refused("too large")
            if x:
                self._seen(x.numerator.bit_length() - x.denominator.bit_length())
            return x
        if not self.mp.isfinite(x):
            raise Undefined
        if x:
            self._seen(self.magnitude(x))
        return x

    def _seen(self, magnitude: float) -> None:
        if abs(magnitude) > MAX_BITS:
            raise Refused("too large")
        self.high, self.low = max(self.high, magnitude), min(self.low, magnitude)

    def magnitude(self, x: Any) -> float:
        return float(self.mp.mag(x)) if x else -math.inf

    def to_real(self, x: Any) -> Any:
        """The same number as one of mpmath."""
        return self.mp.mpf(x.numerator) / x.denominator if isinstance(x, Fraction) else x

    # -------------------------------------------------------------------------------- leaves

    def _num(self, number: Fraction, _text: str) -> Fraction:
        return number

    def _sym(self, name: str) -> Fraction:
        if name not in self.values:
            raise Refused("a variable where a number is needed")
        return self.values[name]

    def _const(self, name: str) -> Any:
        match name:
            case "pi":
                return +self.mp.pi
            case "e":
                return +self.mp.e
            case "i":
                return self.mp.mpc(0, 1)
        raise Refused("infinite")

    def _brackets(self, left: str, right: str, *entries: Node) -> Any:
        if len(entries) != 1 or (left, right) not in (("(", ")"), ("[", "]")):
            raise Refused("not a formula")
        return self._value(entries[0])

    # ------------------------------------------------------------------------------ arithmetic

    def _add(self, *terms: Node) -> Any:
        total = self._value(terms[0])
        for term in terms[1:]:
            a, b = self._alike(total, self._value(term))
            total = self._check(a + b)
        return total

    def _mul(self, *factors: Node) -> Any:
        total = self._value(factors[0])
        for factor in factors[1:]:
            a, b = self._alike(total, self._value(factor))
            total = self._check(a * b)
        return total

    _juxtaposed = _mul

    def _alike(self, a: Any, b: Any) -> tuple[Any, Any]:
        if isinstance(a, Fraction) and isinstance(b, Fraction):
            return a, b
        return self.to_real(a), self.to_real(b)

    def _neg(self, a: Node) -> Any:
        return -self._value(a)

    def _div(self, above: Node, below: Node) -> Any:
        a, b = self._alike(self._value(above), self._value(below))
        self._not_zero(b)
        return a / b

    def _not_zero(self, x: Any) -> None:
        # a divisor that should be 0, as in 1/(sqrt 2 sqrt 2 - 2), is one of the rounding errors
        if not x or (not isinstance(x, Fraction) and self.magnitude(x) < self.high - self.digits * 3.0):
            raise Undefined

    def _percent(self, a: Node) -> Any:
        return self._mul(a, ("num", Fraction(1, 100), ""))

    def _degree(self, a: Node) -> Any:
        return self._mul(a, ("const", "pi"), ("num", Fraction(1, 180), ""))

    def _pow(self, base: Node, exponent: Node) -> Any:
        b, e = self._value(base), self._value(exponent)
        if not b:
            if isinstance(e, Fraction) and e > 0:
                return Fraction(0)
            raise Undefined
        if isinstance(e, Fraction) and e.denominator == 1:
            # the size first, because a float holds no large integer
            if abs(e) > MAX_BITS or abs(e.numerator) * (abs(self._magnitude_of(b)) + 1) > 2 * MAX_BITS:
                raise Refused("too large")
            if e < 0:
                self._not_zero(b)
            return b**e.numerator
        if isinstance(e, Fraction) and isinstance(b, Fraction) and b > 0 and e.denominator <= 6:
            exact = _exact_root(b, e.denominator)
            if exact is not None:
                return self._pow(("num", exact, ""), ("num", Fraction(e.numerator), ""))
        b, e = self.to_real(b), self.to_real(e)
        if self._is_negative(b) and isinstance(e, self.mp.mpf):
            raise Undefined  # the real or the principal root, nobody knows
        if self.magnitude(e) + math.log2(abs(self.magnitude(b)) + 2) > math.log2(MAX_BITS):
            raise Refused("too large")
        return self.mp.power(b, e)

    def _magnitude_of(self, x: Any) -> float:
        if isinstance(x, Fraction):
            return max(x.numerator.bit_length(), x.denominator.bit_length())
        return self.magnitude(x)

    def _is_negative(self, x: Any) -> bool:
        return isinstance(x, self.mp.mpf) and x < 0

    def _root(self, degree: Node, radicand: Node) -> Any:
        n, a = self._value(degree), self._value(radicand)
        if not isinstance(n, Fraction) or n.denominator != 1 or not 2 <= n <= 100:
            raise Refused("not a formula")
        n = n.numerator
        if not a:
            return Fraction(0)
        exact = _exact_root(abs(a), n) if isinstance(a, Fraction) else None
        negative = a < 0 if isinstance(a, Fraction) else self._is_negative(a)
        if negative and n % 2 == 0 and n > 2:
            raise Undefined
        if exact is not None:
            return exact if not negative else -exact if n % 2 else self.mp.mpc(0, 1) * self.to_real(exact)
        a = self.to_real(a)
        if negative and n % 2:
            return -self.mp.root(-a, n)
        return self.mp.sqrt(a) if n == 2 else self.mp.root(a, n)

    # ------------------------------------------------------------------------------- functions

    def _log(self, base: Node, a: Node) -> Any:
        below = self._fn("ln", base)
        self._not_zero(below)
        return self._fn("ln", a) / below

    def _binom(self, n: Node, k: Node) -> Fraction:
        a, b = self._value(n), self._value(k)
        if not all(isinstance(x, Fraction) and x.denominator == 1 for x in (a, b)):
            raise Undefined
        if not 0 <= b <= a <= MAX_FACTORIAL:
            raise Refused("too large")
        return Fraction(math.comb(a.numerator, b.numerator))

    def _fn(self, name: str, argument: Node) -> Any:
        x = self._value(argument)
        if isinstance(x, Fraction) and name in ("abs", "floor", "ceil", "factorial"):
            return self._of_rational(name, x)
        x = self.to_real(x)
        if name in ("abs", "floor", "ceil"):
            if name != "abs" and (not isinstance(x, self.mp.mpf) or abs(x - self.mp.nint(x)) < 1e-9):
                raise Undefined
            return getattr(self.mp, {"abs": "fabs"}.get(name, name))(x)
        if name == "log":
            raise Refused("a logarithm without a base")
        if name == "ln" and not x:
            raise Undefined
        if name in ("exp", "sinh", "cosh", "tanh") and abs(x) > MAX_BITS:
            raise Refused("too large")
        if name in ("factorial",) or self.magnitude(x) > 1000:
            raise Undefined
        if name in _TRIG:
            below = getattr(self.mp, _TRIG[name])(x)
            self._not_zero(below)
            return 1 / below
        found = getattr(self.mp, _INVERSE.get(name, name))(x)
        if name == "tan":
            self._not_zero(self.mp.cos(x))
        return found

    def _of_rational(self, name: str, x: Fraction) -> Fraction:
        match name:
            case "abs":
                return abs(x)
            case "floor":
                return Fraction(math.floor(x))
            case "ceil":
                return Fraction(math.ceil(x))
        if x.denominator != 1 or x < 0:
            raise Undefined
        if x > MAX_FACTORIAL:
            raise Refused("too large")
        return Fraction(math.factorial(x.numerator))


def _exact_root(x: Fraction, n: int) -> Fraction | None:
    """The positive n-th root, if it is rational."""
    above, below = _integer_root(x.numerator, n), _integer_root(x.denominator, n)
    return Fraction(above, below) if above is not None and below is not None else None


def _integer_root(x: int, n: int) -> int | None:
    if n == 2:
        root = math.isqrt(x)
    elif x.bit_length() > 900:
        return None
    else:
        root = round(math.exp(math.log(x) / n)) if x else 0
    return next((r for r in (root - 1, root, root + 1) if r >= 0 and r**n == x), None)
