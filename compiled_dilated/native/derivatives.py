"""Reverse-mode gradients of expressions.

Where a gradient is not unique, as at the kink of a maximum, it is torch's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from .expressions import Expressions, Register

# From an expression, one of its nodes and its gradient to (input, gradient of the input).
Rule = Callable[[Expressions, int, int], Sequence[tuple[int, int]]]
# From an expression, the input of a unary node and its result to the node of a factor.
Factor = Callable[[Expressions, int, int], int]


def gradients(x: Expressions, result: int, register: Register) -> tuple[int, list[int]]:
    """The gradient of the score, and the scatters of the operands' gradients.

    result: the node that is differentiated.
    register: of the scores, and of the sums of gradients.
    """
    differentiable = _differentiable(x, result)
    grads: dict[int, int] = {}
    if x.type(result).is_float:
        grads[result] = x.held(x.add("gradient", register), x.type(result))
    of_score = x.constant(0.0, register)
    scatters: list[int] = []
    # Inputs come before the nodes that read them: in reverse order, every gradient is complete
    # before it is passed on.
    for place in range(result, -1, -1):
        if place not in grads or place not in differentiable:
            continue
        node, grad = x.nodes[place], grads[place]
        if node.op == "score":
            of_score = grad
        elif node.op == "load":
            total = x.held(grad, register)
            scatters.append(x.add("scatter", register, total, *node.inputs, number=node.number))
        else:
            _accumulate(x, grads, differentiable, _input_gradients(x, place, grad))
    return of_score, scatters


def _input_gradients(x: Expressions, place: int, grad: int) -> Sequence[tuple[int, int]]:
    """The gradients of a node's inputs, by its pull or operation."""
    pull = x.pulls.get(place)
    return _RULES[x.nodes[place].op](x, place, grad) if pull is None else pull(grad)


def _accumulate(
    x: Expressions,
    grads: dict[int, int],
    differentiable: set[int],
    parts: Iterable[tuple[int, int]],
) -> None:
    """Add gradients of inputs to `grads`, those of differentiable nodes only."""
    for place, part in parts:
        if place in differentiable:
            part = x.held(part, x.type(place))
            grads[place] = x.binary("add", grads[place], part) if place in grads else part


def _differentiable(x: Expressions, result: int) -> set[int]:
    """Nodes that depend on a score or operand by floating numbers only."""
    out: set[int] = set()
    for place, node in enumerate(x.nodes[: result + 1]):
        if not node.type.is_float:
            continue
        if node.op in ("score", "load") or not out.isdisjoint(node.inputs):
            out.add(place)
    return out


def linear(x: Expressions, node: int, factor: float, shift: float = 0.0) -> int:
    """node * factor + shift."""
    if factor != 1:
        node = x.binary("multiply", node, x.constant(factor, x.type(node)))
    if shift == 0:
        return node
    return x.binary("add", node, x.constant(shift, x.type(node)))


def _square(x: Expressions, node: int) -> int:
    return x.binary("multiply", node, node)


# Rules of many operations -------------------------------------------------------------------


def _times(factor: Factor) -> Rule:
    """The rule of a unary operation with derivative `factor`."""

    def rule(x: Expressions, place: int, grad: int) -> list[tuple[int, int]]:
        (source,) = x.nodes[place].inputs
        return [(source, x.binary("multiply", grad, factor(x, source, place)))]

    return rule


def _over(divisor: Factor) -> Rule:
    """The rule of a unary operation with derivative 1 / divisor."""

    def rule(x: Expressions, place: int, grad: int) -> list[tuple[int, int]]:
        (source,) = x.nodes[place].inputs
        return [(source, x.binary("divide", grad, divisor(x, source, place)))]

    return rule


def _remainder(rounding: str) -> Rule:
    """The rule of a - b * rounding(a / b)."""

    def rule(x: Expressions, place: int, grad: int) -> list[tuple[int, int]]:
        a, b = x.nodes[place].inputs
        quotient = x.unary(rounding, x.binary("divide", a, b))
        return [(a, grad), (b, x.unary("negate", x.binary("multiply", grad, quotient)))]

    return rule


def _maximum(x: Expressions, place: int, grad: int) -> list[tuple[int, int]]:
    a, b = x.nodes[place].inputs
    return _of_extreme(x, grad, a, b, is_maximum=True)


def _minimum(x: Expressions, place: int, grad: int) -> list[tuple[int, int]]:
    a, b = x.nodes[place].inputs
    return _of_extreme(x, grad, a, b, is_maximum=False)


def _of_extreme(
    x: Expressions,
    grad: int,
    a: int,
    b: int,
    is_maximum: bool,
) -> list[tuple[int, int]]:
    """The gradient to the selected operand, half to each of equal ones."""
    equal = x.binary("equal", a, b)
    half = linear(x, grad, 0.5)
    zero = x.constant(0.0, x.type(grad))

    def share(operand: int, rival: int) -> int:
        low, high = (operand, rival) if is_maximum else (rival, operand)
        is_not_selected = x.binary("less", low, high)
        return x.choice(is_not_selected, zero, x.choice(equal, half, grad))

    return [(a, share(a, b)), (b, share(b, a))]


# Rules of single operations -----------------------------------------------------------------


def _no_gradient(x: Expressions, place: int, grad: int) -> list[tuple[int, int]]:
    return []


def _identity(x: Expressions, place: int, grad: int) -> list[tuple[int, int]]:
    return [(x.nodes[place].inputs[0], grad)]


def _add(x: Expressions, place: int, grad: int) -> list[tuple[int, int]]:
    a, b = x.nodes[place].inputs
    return [(a, grad), (b, grad)]


def _subtract(x: Expressions, place: int, grad: int) -> list[tuple[int, int]]:
    a, b = x.nodes[place].inputs
    return [(a, grad), (b, x.unary("negate", grad))]


def _multiply(x: Expressions, place: int, grad: int) -> list[tuple[int, int]]:
    a, b = x.nodes[place].inputs
    return [(a, x.binary("multiply", grad, b)), (b, x.binary("multiply", grad, a))]


def _divide(x: Expressions, place: int, grad: int) -> list[tuple[int, int]]:
    a, b = x.nodes[place].inputs
    part = x.binary("divide", grad, b)
    return [(a, part), (b, x.unary("negate", x.binary("multiply", part, place)))]


def _power(x: Expressions, place: int, grad: int) -> list[tuple[int, int]]:
    base, exponent = x.nodes[place].inputs
    zero = x.constant(0.0, x.type(place))
    # exponent * base ** (exponent - 1), which for an exponent of 0 is 0 and not 0 * inf.
    lower = x.binary("power", base, linear(x, exponent, 1.0, -1.0))
    of_base = x.binary("multiply", grad, x.binary("multiply", exponent, lower))
    is_constant = x.binary("equal", exponent, zero)
    # base ** exponent * log(base), which at a base of 0 is 0 and not 0 * -inf.
    of_exponent = x.binary("multiply", grad, x.binary("multiply", place, x.unary("log", base)))
    is_zero = x.binary("equal", base, zero)
    is_flat = x.binary("both", is_zero, x.binary("less_equal", zero, exponent))
    return [
        (base, x.choice(is_constant, zero, of_base)),
        (exponent, x.choice(is_flat, zero, of_exponent)),
    ]


def _atan2(x: Expressions, place: int, grad: int) -> list[tuple[int, int]]:
    a, b = x.nodes[place].inputs
    total = x.binary("add", _square(x, a), _square(x, b))
    zero = x.constant(0.0, x.type(grad))
    is_origin = x.binary("equal", total, zero)
    part = x.choice(is_origin, zero, x.binary("divide", grad, total))
    return [
        (a, x.binary("multiply", part, b)),
        (b, x.unary("negate", x.binary("multiply", part, a))),
    ]


def _where(x: Expressions, place: int, grad: int) -> list[tuple[int, int]]:
    condition, a, b = x.nodes[place].inputs
    zero = x.constant(0.0, x.type(grad))
    return [(a, x.choice(condition, grad, zero)), (b, x.choice(condition, zero, grad))]


def _gaussian(x: Expressions, node: int) -> int:
    """2 / sqrt(pi) * exp(-node**2), the derivative of erf."""
    exponential = x.unary("exp", x.unary("negate", _square(x, node)))
    return linear(x, exponential, 2 / math.sqrt(math.pi))


def _cosine(x: Expressions, node: int) -> int:
    """The cosine of an angle whose sine is the node."""
    return x.unary("square_root", linear(x, _square(x, node), -1.0, 1.0))


# s: the input of the node. y: the node itself, the operation's result.
_RULES: dict[str, Rule] = {
    "sign": _no_gradient,
    "floor": _no_gradient,
    "ceiling": _no_gradient,
    "round": _no_gradient,
    "truncate": _no_gradient,
    "floor_divide": _no_gradient,
    "constant": _no_gradient,
    "convert": _identity,
    "round_to": _identity,
    "add": _add,
    "subtract": _subtract,
    "multiply": _multiply,
    "divide": _divide,
    "remainder": _remainder("floor"),
    "fmod": _remainder("truncate"),
    "minimum": _minimum,
    "maximum": _maximum,
    "power": _power,
    "atan2": _atan2,
    "where": _where,
    "negate": _times(lambda x, s, y: x.constant(-1.0, x.type(y))),
    "absolute": _times(lambda x, s, y: x.unary("sign", s)),
    "square_root": _over(lambda x, s, y: linear(x, y, 2.0)),
    "exp": _times(lambda x, s, y: y),
    "exp2": _times(lambda x, s, y: linear(x, y, math.log(2))),
    "expm1": _times(lambda x, s, y: linear(x, y, 1.0, 1.0)),
    "log": _over(lambda x, s, y: s),
    "log2": _over(lambda x, s, y: linear(x, s, math.log(2))),
    "log10": _over(lambda x, s, y: linear(x, s, math.log(10))),
    "log1p": _over(lambda x, s, y: linear(x, s, 1.0, 1.0)),
    "sin": _times(lambda x, s, y: x.unary("cos", s)),
    "cos": _times(lambda x, s, y: x.unary("negate", x.unary("sin", s))),
    "tan": _times(lambda x, s, y: linear(x, _square(x, y), 1.0, 1.0)),
    "sinh": _times(lambda x, s, y: x.unary("cosh", s)),
    "cosh": _times(lambda x, s, y: x.unary("sinh", s)),
    "asin": _over(lambda x, s, y: _cosine(x, s)),
    "acos": _over(lambda x, s, y: x.unary("negate", _cosine(x, s))),
    "atan": _over(lambda x, s, y: linear(x, _square(x, s), 1.0, 1.0)),
    "tanh": _times(lambda x, s, y: linear(x, _square(x, y), -1.0, 1.0)),
    "sigmoid": _times(lambda x, s, y: x.binary("multiply", y, linear(x, y, -1.0, 1.0))),
    "erf": _times(lambda x, s, y: _gaussian(x, s)),
}
