"""ATen's pointwise operators on single entries: what each is in expressions, in torch's dtypes and with torch's gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .derivatives import linear
from .expressions import SHORT, Expressions, Register, Untranslatable, register_of

# An argument: a node and its dtype, or a literal.
Argument = Any


@dataclass(frozen=True)
class Cell:
    """One call of an operator. dtype: of the result. compute: that the arguments are brought to."""

    x: Expressions
    op: Any
    dtype: torch.dtype
    compute: torch.dtype

    def of(self, argument: Argument, dtype: torch.dtype | None = None) -> int:
        """An argument as a node of the dtype that is computed in."""
        dtype = dtype or self.compute
        if isinstance(argument, tuple):
            node, own = argument
            return (
                int(node)
                if own == dtype
                else self.x.cast(node, torch.float32 if dtype in SHORT and own == torch.float32 else dtype)
            )
        if dtype.is_floating_point:
            return self.x.constant(float(argument), register_of(dtype))
        if dtype == torch.bool:
            return self.x.constant(bool(argument), Register.BOOLEAN)
        return self.x.wrapped(self.x.whole(int(argument)), dtype)

    def result(self, node: int) -> int:
        """A result as a number of the result's dtype."""
        if self.dtype.is_floating_point:
            return self.x.rounded(self.x.held(node, register_of(self.dtype)), self.dtype)
        return node if self.dtype == torch.bool else self.x.wrapped(node, self.dtype)

    def number(self, value: float) -> int:
        """A literal in the register of the computation."""
        return self.of(value)

    def unary(self, op: str, a: int) -> int:
        """An operation on a node."""
        return self.x.unary(op, a)

    def binary(self, op: str, a: int, b: int) -> int:
        """An operation on two nodes."""
        return self.x.binary(op, a, b)


def _unary(op: str) -> Callable[..., int]:
    return lambda c, a, **_: c.unary(op, c.of(a))


def _rounding(op: str) -> Callable[..., int]:
    def of(c: Cell, a: Argument, decimals: int = 0) -> int:
        if decimals:
            raise Untranslatable("the tape rounds to whole numbers alone")
        return c.unary(op, c.of(a)) if c.compute.is_floating_point else c.of(a)

    return of


def _binary(op: str, of_bools: str | None = None) -> Callable[..., int]:
    def of(c: Cell, a: Argument, b: Argument) -> int:
        if c.compute == torch.bool:
            if of_bools is None:
                raise Untranslatable(f"the tape has no {c.op} of bools")
            return c.binary(of_bools, c.of(a), c.of(b))
        return c.binary(op, c.of(a), c.of(b))

    return of


def _sum_of(op: str, of_bools: str | None = None) -> Callable[..., int]:
    """add and sub, with their factor."""
    plain = _binary(op, of_bools)

    def of(c: Cell, a: Argument, b: Argument, alpha: float = 1) -> int:
        return plain(c, a, b) if alpha == 1 else c.binary(op, c.of(a), c.binary("multiply", c.of(b), c.number(alpha)))

    return of


def _rsub(c: Cell, a: Argument, b: Argument, alpha: float = 1) -> int:
    return _sum_of("subtract")(c, b, a, alpha)


def _divide(c: Cell, a: Argument, b: Argument, rounding_mode: str | None = None) -> int:
    if rounding_mode == "floor":
        return c.binary("floor_divide", c.of(a), c.of(b))
    if rounding_mode is None:
        return c.binary("divide", c.of(a), c.of(b))
    if c.compute.is_floating_point:
        return c.unary("truncate", c.binary("divide", c.of(a), c.of(b)))
    return c.binary("floor_divide", c.binary("subtract", c.of(a), c.binary("fmod", c.of(a), c.of(b))), c.of(b))


def _comparison(op: str, swaps: bool = False) -> Callable[..., int]:
    return lambda c, a, b: c.binary(op, *((c.of(b), c.of(a)) if swaps else (c.of(a), c.of(b))))


def _logical(op: str) -> Callable[..., int]:
    return lambda c, *arguments: c.x.add(op, Register.BOOLEAN, *(c.of(a, torch.bool) for a in arguments))


def _bits(op: str) -> Callable[..., int]:
    return lambda c, *arguments: c.binary(op, *map(c.of, arguments)) if len(arguments) > 1 else c.unary(op, c.of(arguments[0]))


def _where(c: Cell, condition: Argument, a: Argument, b: Argument) -> int:
    return c.x.choice(c.of(condition, torch.bool), c.of(a, c.dtype), c.of(b, c.dtype))


def _masked_fill(c: Cell, a: Argument, condition: Argument, b: Argument) -> int:
    return _where(c, condition, b, a)


def _clamp(c: Cell, a: Argument, low: Argument = None, high: Argument = None, min: Argument = None, max: Argument = None) -> int:
    """Gradients as torch has them: all of it within the bounds and on them, then the bounds where they are taken."""
    low, high = low if low is not None else min, high if high is not None else max
    of = c.of(a)
    bounds = [None if bound is None else c.of(bound) for bound in (low, high)]
    out = of if bounds[0] is None else c.binary("maximum", of, bounds[0])
    out = out if bounds[1] is None else c.binary("minimum", out, bounds[1])
    if not c.compute.is_floating_point or out == of:
        return out

    def pull(grad: int) -> list[tuple[int, int]]:
        zero = c.x.constant(0.0, c.x.type(grad))
        least, greatest = bounds
        passed, parts = grad, []
        if least is not None:
            passed = c.x.choice(c.binary("less", of, least), zero, passed)
            is_taken = c.binary("less", of, least)
            if greatest is not None:
                is_taken = c.binary("both", is_taken, c.binary("less", least, greatest))
            parts.append((least, c.x.choice(is_taken, grad, zero)))
        if greatest is not None:
            passed = c.x.choice(c.binary("less", greatest, of), zero, passed)
            is_taken = c.binary("less", greatest, of)
            if least is not None:
                is_taken = c.binary("either", is_taken, c.binary("less", greatest, least))
            parts.append((greatest, c.x.choice(is_taken, grad, zero)))
        return [(of, passed), *parts]

    return c.x.apart(out, "clamp", pull)


def _hardtanh(c: Cell, a: Argument, low: float = -1, high: float = 1) -> int:
    of, least, greatest = c.of(a), c.number(low), c.number(high)

    def pull(grad: int) -> list[tuple[int, int]]:
        is_outside = c.binary("either", c.binary("less_equal", of, least), c.binary("less_equal", greatest, of))
        return [(of, c.x.choice(is_outside, c.x.constant(0.0, c.x.type(grad)), grad))]

    return c.x.apart(c.binary("minimum", c.binary("maximum", of, least), greatest), "hardtanh", pull)


def _relu(c: Cell, a: Argument) -> int:
    of = c.of(a)
    out = c.binary("maximum", of, c.number(0))
    if not c.compute.is_floating_point:
        return out

    def pull(grad: int) -> list[tuple[int, int]]:
        zero = c.x.constant(0.0, c.x.type(grad))
        return [(of, c.x.choice(c.binary("less_equal", of, zero), zero, grad))]

    return c.x.apart(out, "relu", pull)


def _leaky_relu(c: Cell, a: Argument, slope: float = 0.01) -> int:
    return c.x.choice(c.binary("less", c.number(0), c.of(a)), c.of(a), linear(c.x, c.of(a), slope))


def _elu(c: Cell, a: Argument, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> int:
    of, zero = c.of(a), c.number(0)
    negative = linear(c.x, c.unary("expm1", linear(c.x, of, input_scale)), alpha * scale)
    is_positive = c.binary("less", zero, of)

    def pull(grad: int) -> list[tuple[int, int]]:
        slope = linear(c.x, linear(c.x, negative, 1.0, alpha * scale), input_scale)
        return [(of, c.binary("multiply", grad, c.x.choice(is_positive, c.number(scale), slope)))]

    return c.x.apart(c.x.choice(is_positive, linear(c.x, of, scale), negative), f"elu {alpha}", pull)


def _softplus(c: Cell, a: Argument, beta: float = 1, threshold: float = 20) -> int:
    of = c.of(a)
    scaled = linear(c.x, of, beta)
    is_large = c.binary("less", c.number(threshold), scaled)
    small = c.binary("divide", c.unary("log1p", c.unary("exp", scaled)), c.number(beta))

    def pull(grad: int) -> list[tuple[int, int]]:
        return [(of, c.binary("multiply", grad, c.x.choice(is_large, c.number(1), c.unary("sigmoid", scaled))))]

    return c.x.apart(c.x.choice(is_large, of, small), "softplus", pull)


def _gelu(c: Cell, a: Argument, approximate: str = "none") -> int:
    of = c.of(a)
    if approximate == "tanh":
        inner = c.binary("add", of, linear(c.x, c.binary("multiply", of, c.binary("multiply", of, of)), 0.044715))
        bent = c.unary("tanh", linear(c.x, inner, math.sqrt(2 / math.pi)))
    else:
        bent = c.unary("erf", linear(c.x, of, math.sqrt(0.5)))
    return c.binary("multiply", linear(c.x, of, 0.5), linear(c.x, bent, 1.0, 1.0))


def _silu(c: Cell, a: Argument) -> int:
    return c.binary("multiply", c.of(a), c.unary("sigmoid", c.of(a)))


def _reciprocal(c: Cell, a: Argument) -> int:
    return c.binary("divide", c.number(1), c.of(a))


def _rsqrt(c: Cell, a: Argument) -> int:
    return c.binary("divide", c.number(1), c.unary("square_root", c.of(a)))


def _square(c: Cell, a: Argument) -> int:
    return c.binary("multiply", c.of(a), c.of(a))


def _power(c: Cell, base: Argument, exponent: Argument) -> int:
    """By the products that torch takes for the exponents that it knows."""
    if isinstance(exponent, tuple):
        if not c.compute.is_floating_point:
            raise Untranslatable("the tape has no powers of whole numbers with exponents that vary")
        return c.binary("power", c.of(base), c.of(exponent))
    x, known = c.of(base), {0.5: _sqrt, -0.5: _rsqrt, -1: _reciprocal}
    if exponent == int(exponent) and 1 <= exponent <= (3 if c.compute.is_floating_point else 64):
        out = x
        for _ in range(int(exponent) - 1):
            out = c.binary("multiply", out, x)
            if not c.compute.is_floating_point:
                out = c.x.wrapped(out, c.dtype)
        return out
    if exponent == 0:
        return c.number(1)
    if not c.compute.is_floating_point:
        raise Untranslatable(f"the tape has no powers of whole numbers with the exponent {exponent}")
    if exponent in known:
        return known[exponent](c, base)
    constant = c.number(exponent)
    out = c.binary("power", x, constant)

    def pull(grad: int) -> list[tuple[int, int]]:
        lower = c.binary("power", x, c.number(exponent - 1))
        return [(x, c.binary("multiply", grad, linear(c.x, lower, float(exponent))))]

    return c.x.apart(out, "power", pull)


def _sqrt(c: Cell, a: Argument) -> int:
    return c.unary("square_root", c.of(a))


def _is_nan(c: Cell, a: Argument) -> int:
    return c.binary("not_equal", c.of(a), c.of(a))


def _is_inf(c: Cell, a: Argument) -> int:
    if not c.compute.is_floating_point:
        return c.x.constant(False, Register.BOOLEAN)
    return c.binary("equal", c.unary("absolute", c.of(a)), c.number(math.inf))


def _addcmul(c: Cell, a: Argument, b: Argument, d: Argument, value: float = 1) -> int:
    product = c.binary("multiply", c.of(b), c.of(d))
    return c.binary("add", c.of(a), product if value == 1 else c.binary("multiply", product, c.number(value)))


def _addcdiv(c: Cell, a: Argument, b: Argument, d: Argument, value: float = 1) -> int:
    part = c.binary("divide", c.of(b), c.of(d))
    return c.binary("add", c.of(a), part if value == 1 else c.binary("multiply", part, c.number(value)))


def _lerp(c: Cell, a: Argument, b: Argument, weight: Argument) -> int:
    start, end, w = c.of(a), c.of(b), c.of(weight)
    difference = c.binary("subtract", end, start)
    low = c.binary("add", start, c.binary("multiply", w, difference))
    high = c.binary("subtract", end, c.binary("multiply", c.binary("subtract", c.number(1), w), difference))
    return c.x.choice(c.binary("less", c.unary("absolute", w), c.number(0.5)), low, high)


def _cast(c: Cell, a: Argument, **_: Any) -> int:
    node, own = a
    return int(node) if own == c.dtype else c.x.cast(node, c.dtype)


_SIMPLE = {
    "abs": "absolute", "neg": "negate", "sign": "sign", "sgn": "sign", "sqrt": "square_root", "exp": "exp", "exp2": "exp2",
    "expm1": "expm1", "log": "log", "log2": "log2", "log10": "log10", "log1p": "log1p", "sin": "sin", "cos": "cos", "tan": "tan",
    "sinh": "sinh", "cosh": "cosh", "asin": "asin", "acos": "acos", "atan": "atan", "tanh": "tanh", "sigmoid": "sigmoid",
    "erf": "erf", "special_erf": "erf",
}  # fmt: skip

POINTWISE: dict[str, Callable[..., int]] = {
    **{name: _unary(op) for name, op in _SIMPLE.items()},
    "floor": _rounding("floor"),
    "ceil": _rounding("ceiling"),
    "round": _rounding("round"),
    "trunc": _rounding("truncate"),
    "add": _sum_of("add", "either"),
    "sub": _sum_of("subtract"),
    "rsub": _rsub,
    "mul": _binary("multiply", "both"),
    "div": _divide,
    "floor_divide": _binary("floor_divide"),
    "remainder": _binary("remainder"),
    "fmod": _binary("fmod"),
    "minimum": _binary("minimum", "both"),
    "maximum": _binary("maximum", "either"),
    "pow": _power,
    "square": _square,
    "atan2": _binary("atan2"),
    "eq": _comparison("equal"),
    "ne": _comparison("not_equal"),
    "lt": _comparison("less"),
    "le": _comparison("less_equal"),
    "gt": _comparison("less", swaps=True),
    "ge": _comparison("less_equal", swaps=True),
    "logical_and": _logical("both"),
    "logical_or": _logical("either"),
    "logical_xor": _logical("exclusive"),
    "logical_not": _logical("complement"),
    "bitwise_and": _bits("both"),
    "bitwise_or": _bits("either"),
    "bitwise_xor": _bits("exclusive"),
    "bitwise_not": _bits("complement"),
    **dict.fromkeys(("bitwise_left_shift", "__lshift__"), _bits("shift_left")),
    **dict.fromkeys(("bitwise_right_shift", "__rshift__"), _bits("shift_right")),
    "where": _where,
    "masked_fill": _masked_fill,
    "clamp": _clamp,
    "clamp_min": lambda c, a, low: _clamp(c, a, low),
    "clamp_max": lambda c, a, high: _clamp(c, a, None, high),
    "hardtanh": _hardtanh,
    "relu": _relu,
    "leaky_relu": _leaky_relu,
    "elu": _elu,
    "softplus": _softplus,
    "gelu": _gelu,
    "silu": _silu,
    "reciprocal": _reciprocal,
    "rsqrt": _rsqrt,
    "isnan": _is_nan,
    "isinf": _is_inf,
    "addcmul": _addcmul,
    "addcdiv": _addcdiv,
    "lerp": _lerp,
    "_to_copy": _cast,
}
