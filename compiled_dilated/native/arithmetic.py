"""ATen's arithmetic, rounding, comparisons and logic on single entries."""

from __future__ import annotations

import math
from typing import Any

import torch

from .cells import Argument, Cell, Pointwise, binary, unary
from .derivatives import linear
from .expressions import Register, Untranslatable

# The most factors of a power that is computed as a product, by whether numbers are floating-point.
_MOST_FACTORS = {True: 3, False: 64}

# Sums, quotients, rounding ------------------------------------------------------------------


def _sum(op: str, for_bools: str | None = None) -> Pointwise:
    """add and sub, with the factor alpha of the second operand."""
    plain = binary(op, for_bools)

    def rule(c: Cell, a: Argument, b: Argument, alpha: float = 1) -> int:
        if alpha == 1:
            return plain(c, a, b)
        return c.binary(op, c.node(a), c.binary("multiply", c.node(b), c.node(alpha)))

    return rule


def _rsub(c: Cell, a: Argument, b: Argument, alpha: float = 1) -> int:
    return _sum("subtract")(c, b, a, alpha)


def _divide(c: Cell, a: Argument, b: Argument, rounding_mode: str | None = None) -> int:
    x, y = c.node(a), c.node(b)
    if rounding_mode == "floor":
        return c.binary("floor_divide", x, y)
    if rounding_mode is None:
        return c.binary("divide", x, y)
    if c.compute.is_floating_point:
        return c.unary("truncate", c.binary("divide", x, y))
    # Whole numbers: fmod has the sign of x, so that the difference divides without a remainder.
    return c.binary("floor_divide", c.binary("subtract", x, c.binary("fmod", x, y)), y)


def _rounding(op: str) -> Pointwise:
    def rule(c: Cell, a: Argument, decimals: int = 0) -> int:
        if decimals:
            raise Untranslatable("the tape rounds to whole numbers only")
        return c.unary(op, c.node(a)) if c.compute.is_floating_point else c.node(a)

    return rule


def _addcmul(c: Cell, a: Argument, b: Argument, d: Argument, value: float = 1) -> int:
    product = c.binary("multiply", c.node(b), c.node(d))
    return _add_scaled(c, a, product, value)


def _addcdiv(c: Cell, a: Argument, b: Argument, d: Argument, value: float = 1) -> int:
    quotient = c.binary("divide", c.node(b), c.node(d))
    return _add_scaled(c, a, quotient, value)


def _add_scaled(c: Cell, a: Argument, term: int, value: float) -> int:
    x = c.node(a)
    if value != 1:
        term = c.binary("multiply", term, c.node(value))
    return c.binary("add", x, term)


def _lerp(c: Cell, a: Argument, b: Argument, weight: Argument) -> int:
    # torch's two formulas: each is exact at its own end.
    start, end, w = c.node(a), c.node(b), c.node(weight)
    difference = c.binary("subtract", end, start)
    low = c.binary("add", start, c.binary("multiply", w, difference))
    complement = c.binary("subtract", c.node(1), w)
    high = c.binary("subtract", end, c.binary("multiply", complement, difference))
    is_low = c.binary("less", c.unary("absolute", w), c.node(0.5))
    return c.x.choice(is_low, low, high)


# Powers -------------------------------------------------------------------------------------


def _square(c: Cell, a: Argument) -> int:
    return c.binary("multiply", c.node(a), c.node(a))


def _sqrt(c: Cell, a: Argument) -> int:
    return c.unary("square_root", c.node(a))


def _rsqrt(c: Cell, a: Argument) -> int:
    return c.binary("divide", c.node(1), c.unary("square_root", c.node(a)))


def _reciprocal(c: Cell, a: Argument) -> int:
    return c.binary("divide", c.node(1), c.node(a))


def _power(c: Cell, base: Argument, exponent: Argument) -> int:
    """base ** exponent; for a literal exponent by torch's own special cases."""
    is_float = c.compute.is_floating_point
    if isinstance(exponent, tuple):
        if not is_float:
            raise Untranslatable("the tape has no powers of whole numbers with exponents that vary")
        return c.binary("power", c.node(base), c.node(exponent))
    # Literal exponents: products of few factors, then roots and reciprocals.
    x = c.node(base)
    if exponent == int(exponent) and 1 <= exponent <= _MOST_FACTORS[is_float]:
        return _product(c, x, int(exponent))
    if exponent == 0:
        return c.node(1)
    if not is_float:
        raise Untranslatable(
            f"the tape has no powers of whole numbers with the exponent {exponent}"
        )
    special = {0.5: _sqrt, -0.5: _rsqrt, -1: _reciprocal}.get(exponent)
    if special is not None:
        return special(c, base)

    def pull(grad: int) -> list[tuple[int, int]]:
        lower = c.binary("power", x, c.node(exponent - 1))
        return [(x, c.binary("multiply", grad, linear(c.x, lower, float(exponent))))]

    return c.x.apart(c.binary("power", x, c.node(exponent)), "power", pull)


def _product(c: Cell, x: int, factors: int) -> int:
    """x * x * ..., whole numbers with the dtype's wrap-around."""
    out = x
    for _ in range(factors - 1):
        out = c.binary("multiply", out, x)
        if not c.compute.is_floating_point:
            out = c.x.wrapped(out, c.dtype)
    return out


# Comparisons, logic and bits ----------------------------------------------------------------


def _comparison(op: str) -> Pointwise:
    def rule(c: Cell, a: Argument, b: Argument) -> int:
        return c.binary(op, c.node(a), c.node(b))

    return rule


def _swapped_comparison(op: str) -> Pointwise:
    def rule(c: Cell, a: Argument, b: Argument) -> int:
        return c.binary(op, c.node(b), c.node(a))

    return rule


def _logical(op: str) -> Pointwise:
    def rule(c: Cell, *arguments: Argument) -> int:
        nodes = [c.node(argument, torch.bool) for argument in arguments]
        return c.x.add(op, Register.BOOLEAN, *nodes)

    return rule


def _bits(op: str) -> Pointwise:
    def rule(c: Cell, *arguments: Argument) -> int:
        nodes = [c.node(argument) for argument in arguments]
        return c.unary(op, *nodes) if len(nodes) == 1 else c.binary(op, *nodes)

    return rule


def _is_nan(c: Cell, a: Argument) -> int:
    return c.binary("not_equal", c.node(a), c.node(a))


def _is_inf(c: Cell, a: Argument) -> int:
    if not c.compute.is_floating_point:
        return c.x.constant(False, Register.BOOLEAN)
    return c.binary("equal", c.unary("absolute", c.node(a)), c.node(math.inf))


def _cast(c: Cell, a: Argument, **_: Any) -> int:
    node, source = a
    return int(node) if source == c.dtype else c.x.cast(node, c.dtype)


def _sign(c: Cell, a: Argument) -> int:
    node = c.node(a)
    # The sign of a bool is the bool.
    return node if c.compute == torch.bool else c.unary("sign", node)


_UNARY = {
    "abs": "absolute", "neg": "negate", "sqrt": "square_root",
    "exp": "exp", "exp2": "exp2", "expm1": "expm1", "log": "log", "log2": "log2",
    "log10": "log10", "log1p": "log1p", "sin": "sin", "cos": "cos", "tan": "tan",
    "sinh": "sinh", "cosh": "cosh", "asin": "asin", "acos": "acos", "atan": "atan",
    "tanh": "tanh", "sigmoid": "sigmoid", "erf": "erf", "special_erf": "erf",
}  # fmt: skip

ARITHMETIC: dict[str, Pointwise] = {
    **{name: unary(op) for name, op in _UNARY.items()},
    "sign": _sign,
    "sgn": _sign,
    "floor": _rounding("floor"),
    "ceil": _rounding("ceiling"),
    "round": _rounding("round"),
    "trunc": _rounding("truncate"),
    "add": _sum("add", "either"),
    "sub": _sum("subtract"),
    "rsub": _rsub,
    "mul": binary("multiply", "both"),
    "div": _divide,
    "floor_divide": binary("floor_divide"),
    "remainder": binary("remainder"),
    "fmod": binary("fmod"),
    "minimum": binary("minimum", "both"),
    "maximum": binary("maximum", "either"),
    "pow": _power,
    "square": _square,
    "reciprocal": _reciprocal,
    "rsqrt": _rsqrt,
    "atan2": binary("atan2"),
    "addcmul": _addcmul,
    "addcdiv": _addcdiv,
    "lerp": _lerp,
    "eq": _comparison("equal"),
    "ne": _comparison("not_equal"),
    "lt": _comparison("less"),
    "le": _comparison("less_equal"),
    "gt": _swapped_comparison("less"),
    "ge": _swapped_comparison("less_equal"),
    "logical_and": _logical("both"),
    "logical_or": _logical("either"),
    "logical_xor": _logical("exclusive"),
    "logical_not": _logical("complement"),
    "bitwise_and": _bits("both"),
    "bitwise_or": _bits("either"),
    "bitwise_xor": _bits("exclusive"),
    "bitwise_not": _bits("complement"),
    "bitwise_left_shift": _bits("shift_left"),
    "__lshift__": _bits("shift_left"),
    "bitwise_right_shift": _bits("shift_right"),
    "__rshift__": _bits("shift_right"),
    "isnan": _is_nan,
    "isinf": _is_inf,
    "_to_copy": _cast,
}
