"""ATen's choices and activation functions on single entries.

Their gradients at kinks are torch's own.
"""

from __future__ import annotations

import math

import torch

from .cells import Argument, Cell, Pointwise
from .derivatives import linear

# Choices ------------------------------------------------------------------------------------


def _where(c: Cell, condition: Argument, a: Argument, b: Argument) -> int:
    return c.x.choice(c.node(condition, torch.bool), c.node(a, c.dtype), c.node(b, c.dtype))


def _masked_fill(c: Cell, a: Argument, condition: Argument, b: Argument) -> int:
    return _where(c, condition, b, a)


def _clamp(
    c: Cell,
    a: Argument,
    low: Argument = None,
    high: Argument = None,
    min: Argument = None,
    max: Argument = None,
) -> int:
    """minimum(maximum(a, low), high).

    low, high: or the keywords min and max.
    """
    low = min if low is None else low
    high = max if high is None else high
    x = c.node(a)
    least = None if low is None else c.node(low)
    greatest = None if high is None else c.node(high)
    out = x if least is None else c.binary("maximum", x, least)
    if greatest is not None:
        out = c.binary("minimum", out, greatest)
    if not c.compute.is_floating_point or out == x:
        return out
    return c.x.apart(out, "clamp", lambda grad: _clamp_gradients(c, x, least, greatest, grad))


def _clamp_gradients(
    c: Cell,
    x: int,
    least: int | None,
    greatest: int | None,
    grad: int,
) -> list[tuple[int, int]]:
    """torch's own gradients: to x within the bounds, else to a bound.

    A number on a bound is within.
    """
    zero = c.zero_like(grad)
    of_x, of_bounds = grad, []
    if least is not None:
        is_below = c.binary("less", x, least)
        of_x = c.x.choice(is_below, zero, of_x)
        if greatest is not None:  # of crossed bounds the upper one is in effect
            is_below = c.binary("both", is_below, c.binary("less", least, greatest))
        of_bounds.append((least, c.x.choice(is_below, grad, zero)))
    if greatest is not None:
        is_above = c.binary("less", greatest, x)
        of_x = c.x.choice(is_above, zero, of_x)
        if least is not None:
            is_above = c.binary("either", is_above, c.binary("less", greatest, least))
        of_bounds.append((greatest, c.x.choice(is_above, grad, zero)))
    return [(x, of_x), *of_bounds]


def _clamp_min(c: Cell, a: Argument, low: Argument) -> int:
    return _clamp(c, a, low)


def _clamp_max(c: Cell, a: Argument, high: Argument) -> int:
    return _clamp(c, a, None, high)


# Activations --------------------------------------------------------------------------------


def _hardtanh(c: Cell, a: Argument, low: float = -1, high: float = 1) -> int:
    x, least, greatest = c.node(a), c.node(low), c.node(high)

    def pull(grad: int) -> list[tuple[int, int]]:
        is_below = c.binary("less_equal", x, least)
        is_above = c.binary("less_equal", greatest, x)
        is_outside = c.binary("either", is_below, is_above)
        return [(x, c.x.choice(is_outside, c.zero_like(grad), grad))]

    out = c.binary("minimum", c.binary("maximum", x, least), greatest)
    return c.x.apart(out, "hardtanh", pull)


def _relu(c: Cell, a: Argument) -> int:
    x = c.node(a)
    out = c.binary("maximum", x, c.node(0))
    if not c.compute.is_floating_point:
        return out

    def pull(grad: int) -> list[tuple[int, int]]:
        zero = c.zero_like(grad)
        return [(x, c.x.choice(c.binary("less_equal", x, zero), zero, grad))]

    return c.x.apart(out, "relu", pull)


def _leaky_relu(c: Cell, a: Argument, slope: float = 0.01) -> int:
    is_positive = c.binary("less", c.node(0), c.node(a))
    x = c.node(a)
    return c.x.choice(is_positive, x, linear(c.x, x, slope))


def _elu(c: Cell, a: Argument, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> int:
    # scale * x above 0, scale * alpha * (exp(input_scale * x) - 1) below.
    x, zero = c.node(a), c.node(0)
    negative = linear(c.x, c.unary("expm1", linear(c.x, x, input_scale)), alpha * scale)
    is_positive = c.binary("less", zero, x)

    def pull(grad: int) -> list[tuple[int, int]]:
        slope = linear(c.x, linear(c.x, negative, 1.0, alpha * scale), input_scale)
        factor = c.x.choice(is_positive, c.node(scale), slope)
        return [(x, c.binary("multiply", grad, factor))]

    out = c.x.choice(is_positive, linear(c.x, x, scale), negative)
    return c.x.apart(out, f"elu {alpha}", pull)


def _softplus(c: Cell, a: Argument, beta: float = 1, threshold: float = 20) -> int:
    # log(1 + exp(beta * x)) / beta, and x itself above the threshold.
    x = c.node(a)
    scaled = linear(c.x, x, beta)
    is_large = c.binary("less", c.node(threshold), scaled)
    logarithm = c.unary("log1p", c.unary("exp", scaled))
    small = c.binary("divide", logarithm, c.node(beta))

    def pull(grad: int) -> list[tuple[int, int]]:
        factor = c.x.choice(is_large, c.node(1), c.unary("sigmoid", scaled))
        return [(x, c.binary("multiply", grad, factor))]

    return c.x.apart(c.x.choice(is_large, x, small), "softplus", pull)


def _gelu(c: Cell, a: Argument, approximate: str = "none") -> int:
    x = c.node(a)
    if approximate == "tanh":
        cube = c.binary("multiply", x, c.binary("multiply", x, x))
        inner = c.binary("add", x, linear(c.x, cube, 0.044715))
        sigmoid = c.unary("tanh", linear(c.x, inner, math.sqrt(2 / math.pi)))
    else:
        sigmoid = c.unary("erf", linear(c.x, x, math.sqrt(0.5)))
    return c.binary("multiply", linear(c.x, x, 0.5), linear(c.x, sigmoid, 1.0, 1.0))


def _silu(c: Cell, a: Argument) -> int:
    return c.binary("multiply", c.node(a), c.unary("sigmoid", c.node(a)))


ACTIVATIONS: dict[str, Pointwise] = {
    "where": _where,
    "masked_fill": _masked_fill,
    "clamp": _clamp,
    "clamp_min": _clamp_min,
    "clamp_max": _clamp_max,
    "hardtanh": _hardtanh,
    "relu": _relu,
    "leaky_relu": _leaky_relu,
    "elu": _elu,
    "softplus": _softplus,
    "gelu": _gelu,
    "silu": _silu,
}
