"""Gradients of expressions, from the result backwards, as torch's autograd has them where there is a choice."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from .expressions import Expressions, Register

# From an expression, one of its nodes and its gradient to the gradients of the inputs.
Rule = Callable[[Expressions, int, int], Sequence[tuple[int, int]]]


def gradients(x: Expressions, result: int, register: Register) -> tuple[int, list[int]]:
    """The gradient of the score, and nodes that add to the gradients of the operands.

    register: of the scores and of the gradients' sums.
    """
    grads: dict[int, int] = {}
    learns = _learning(x, result)
    if x.type(result).is_float:
        grads[result] = x.held(x.add("gradient", register), x.type(result))
    of_score, sums = x.constant(0.0, register), []
    for place in range(result, -1, -1):
        if place not in grads or place not in learns:
            continue
        node, grad = x.nodes[place], grads[place]
        if node.op == "score":
            of_score = grad
        elif node.op == "load":
            sums.append(x.add("scatter", register, x.held(grad, register), *node.inputs, number=node.number))
        else:
            pull = x.pulls.get(place)
            for to, part in pull(grad) if pull else _RULES[node.op](x, place, grad):
                if to in learns:
                    part = x.held(part, x.type(to))
                    grads[to] = x.binary("add", grads[to], part) if to in grads else part
    return of_score, sums


def _learning(x: Expressions, result: int) -> set[int]:
    """Nodes that depend on the score or on a floating operand, by floating numbers."""
    out: set[int] = set()
    for place, node in enumerate(x.nodes[: result + 1]):
        if node.type.is_float and (node.op in ("score", "load") or any(input in out for input in node.inputs)):
            out.add(place)
    return out


def _by_factor(factor: Callable[[Expressions, int, int], int]) -> Rule:
    """The rule of a function of one number: factor(expressions, input, result) is its derivative."""

    def rule(x: Expressions, place: int, grad: int) -> list[tuple[int, int]]:
        (of,) = x.nodes[place].inputs
        return [(of, x.binary("multiply", grad, factor(x, of, place)))]

    return rule


def _over(divisor: Callable[[Expressions, int, int], int]) -> Rule:
    """The same of a function whose derivative is one over that."""

    def rule(x: Expressions, place: int, grad: int) -> list[tuple[int, int]]:
        (of,) = x.nodes[place].inputs
        return [(of, x.binary("divide", grad, divisor(x, of, place)))]

    return rule


def linear(x: Expressions, of: int, factor: float, shift: float = 0.0) -> int:
    """of * factor + shift."""
    product = of if factor == 1 else x.binary("multiply", of, x.constant(factor, x.type(of)))
    return product if shift == 0 else x.binary("add", product, x.constant(shift, x.type(of)))


def _square(x: Expressions, of: int) -> int:
    return x.binary("multiply", of, of)


def _none(x: Expressions, place: int, grad: int) -> list[tuple[int, int]]:
    return []


def _same(x: Expressions, place: int, grad: int) -> list[tuple[int, int]]:
    return [(x.nodes[place].inputs[0], grad)]


def _add(x: Expressions, place: int, grad: int) -> list[tuple[int, int]]:
    return [(of, grad) for of in x.nodes[place].inputs]


def _subtract(x: Expressions, place: int, grad: int) -> list[tuple[int, int]]:
    a, b = x.nodes[place].inputs
    return [(a, grad), (b, x.unary("negate", grad))]


def _multiply(x: Expressions, place: int, grad: int) -> list[tuple[int, int]]:
    a, b = x.nodes[place].inputs
    return [(a, x.binary("multiply", grad, b)), (b, x.binary("multiply", grad, a))]


def _divide(x: Expressions, place: int, grad: int) -> list[tuple[int, int]]:
    _, b = x.nodes[place].inputs
    part = x.binary("divide", grad, b)
    return [(x.nodes[place].inputs[0], part), (b, x.unary("negate", x.binary("multiply", part, place)))]


def _remainder(rounding: str) -> Rule:
    def rule(x: Expressions, place: int, grad: int) -> list[tuple[int, int]]:
        a, b = x.nodes[place].inputs
        turns = x.unary(rounding, x.binary("divide", a, b))
        return [(a, grad), (b, x.unary("negate", x.binary("multiply", grad, turns)))]

    return rule


def _extreme(loses: str) -> Rule:
    """Of maximum and minimum: the gradient goes to the one that is taken, in halves to two equal ones."""

    def rule(x: Expressions, place: int, grad: int) -> list[tuple[int, int]]:
        a, b = x.nodes[place].inputs
        equal, half, zero = x.binary("equal", a, b), linear(x, grad, 0.5), x.constant(0.0, x.type(grad))

        def part(mine: int, other: int) -> int:
            first, second = (mine, other) if loses == "less" else (other, mine)
            return x.choice(x.binary("less", first, second), zero, x.choice(equal, half, grad))

        return [(a, part(a, b)), (b, part(b, a))]

    return rule


def _power(x: Expressions, place: int, grad: int) -> list[tuple[int, int]]:
    base, exponent = x.nodes[place].inputs
    type = x.type(place)
    zero = x.constant(0.0, type)
    lower = x.binary("power", base, linear(x, exponent, 1.0, -1.0))
    of_base = x.binary("multiply", grad, x.binary("multiply", exponent, lower))
    has_no_power = x.binary("equal", exponent, zero)
    of_exponent = x.binary("multiply", grad, x.binary("multiply", place, x.unary("log", base)))
    is_flat = x.binary("both", x.binary("equal", base, zero), x.binary("less_equal", zero, exponent))
    return [(base, x.choice(has_no_power, zero, of_base)), (exponent, x.choice(is_flat, zero, of_exponent))]


def _atan2(x: Expressions, place: int, grad: int) -> list[tuple[int, int]]:
    a, b = x.nodes[place].inputs
    total = x.binary("add", _square(x, a), _square(x, b))
    zero = x.constant(0.0, x.type(grad))
    part = x.choice(x.binary("equal", total, zero), zero, x.binary("divide", grad, total))
    return [(a, x.binary("multiply", part, b)), (b, x.unary("negate", x.binary("multiply", part, a)))]


def _where(x: Expressions, place: int, grad: int) -> list[tuple[int, int]]:
    condition, a, b = x.nodes[place].inputs
    zero = x.constant(0.0, x.type(grad))
    return [(a, x.choice(condition, grad, zero)), (b, x.choice(condition, zero, grad))]


def _root_of_rest(x: Expressions, of: int, sign: float = 1.0) -> int:
    """sqrt(1 - of**2), negated for a sign of -1."""
    root = x.unary("square_root", linear(x, _square(x, of), -1.0, 1.0))
    return root if sign > 0 else x.unary("negate", root)


_RULES: dict[str, Rule] = {
    **dict.fromkeys(("sign", "floor", "ceiling", "round", "truncate", "floor_divide", "constant"), _none),
    "convert": _same,
    "round_to": _same,
    "add": _add,
    "subtract": _subtract,
    "multiply": _multiply,
    "divide": _divide,
    "remainder": _remainder("floor"),
    "fmod": _remainder("truncate"),
    "minimum": _extreme("more"),
    "maximum": _extreme("less"),
    "power": _power,
    "atan2": _atan2,
    "where": _where,
    "negate": _by_factor(lambda x, of, out: x.constant(-1.0, x.type(out))),
    "absolute": _by_factor(lambda x, of, out: x.unary("sign", of)),
    "square_root": _over(lambda x, of, out: linear(x, out, 2.0)),
    "exp": _by_factor(lambda x, of, out: out),
    "exp2": _by_factor(lambda x, of, out: linear(x, out, math.log(2))),
    "expm1": _by_factor(lambda x, of, out: linear(x, out, 1.0, 1.0)),
    "log": _over(lambda x, of, out: of),
    "log2": _over(lambda x, of, out: linear(x, of, math.log(2))),
    "log10": _over(lambda x, of, out: linear(x, of, math.log(10))),
    "log1p": _over(lambda x, of, out: linear(x, of, 1.0, 1.0)),
    "sin": _by_factor(lambda x, of, out: x.unary("cos", of)),
    "cos": _by_factor(lambda x, of, out: x.unary("negate", x.unary("sin", of))),
    "tan": _by_factor(lambda x, of, out: linear(x, _square(x, out), 1.0, 1.0)),
    "sinh": _by_factor(lambda x, of, out: x.unary("cosh", of)),
    "cosh": _by_factor(lambda x, of, out: x.unary("sinh", of)),
    "asin": _over(lambda x, of, out: _root_of_rest(x, of)),
    "acos": _over(lambda x, of, out: _root_of_rest(x, of, -1.0)),
    "atan": _over(lambda x, of, out: linear(x, _square(x, of), 1.0, 1.0)),
    "tanh": _by_factor(lambda x, of, out: linear(x, _square(x, out), -1.0, 1.0)),
    "sigmoid": _by_factor(lambda x, of, out: x.binary("multiply", out, linear(x, out, -1.0, 1.0))),
    "erf": _by_factor(lambda x, of, out: linear(x, x.unary("exp", x.unary("negate", _square(x, of))), 2 / math.sqrt(math.pi))),
}
