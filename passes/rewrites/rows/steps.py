"""Steps of row-wise work, and their text.

v0 = layer_norm(x0, w0, w1, eps=1e-05)      x0, x1, ...   operands whose rows are worked on
v1 = linear(v0, w2, w3)                     w0, w1, ...   operands that all rows share
v2 = gelu(v1, approximate='none')           v0, v1, ...   results; the last is the recipe's
v3 = linear(v2, w4, w5)
v4 = add(x0, v3)
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .primitives import PRIMITIVES, Primitive, dtype_of

Operand = str | float | None
Values = dict[str, Tensor]


@dataclass(frozen=True)
class Step:
    """One line: result = primitive(*operands, **options).

    operands: names of values, numbers, None
    """

    result: str
    primitive: str
    operands: tuple[Operand, ...]
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        arguments = [str(operand) for operand in self.operands]
        arguments += [f"{name}={value!r}" for name, value in self.options]
        return f"{self.result} = {self.primitive}({', '.join(arguments)})"

    @property
    def definition(self) -> Primitive:
        return PRIMITIVES[self.primitive]

    @property
    def is_differentiable(self) -> bool:
        """Whether gradients flow through it.

        None flow through indices, nor through a cast to integers.
        """
        if self.primitive == "to":
            dtype = dtype_of(dict(self.options)["dtype"])
            return dtype.is_floating_point or dtype.is_complex
        return self.definition.backward is not None

    @property
    def names(self) -> list[str]:
        """The operands that are values."""
        return [operand for operand in self.operands if isinstance(operand, str)]

    def arguments(self, values: Mapping[str, Tensor]) -> list[Any]:
        """The operands, names replaced by their values."""
        arguments: list[Any] = []
        for operand in self.operands:
            arguments.append(values[operand] if isinstance(operand, str) else operand)
        return arguments

    def run(self, values: Values) -> None:
        """Compute the result and add it to `values`."""
        forward = self.definition.forward
        values[self.result] = forward(*self.arguments(values), **dict(self.options))

    def run_over(self, name: str, values: Values) -> None:
        """Compute the result into the memory of the operand `name`."""
        over = self.definition.over
        assert over is not None
        operands = [value for value in self.arguments(values) if value is not values[name]]
        values[self.result] = over(values[name], *operands, **dict(self.options))


def values_of(rows: Sequence[Tensor], shared: Sequence[Tensor]) -> Values:
    """The operands by their names in a recipe."""
    values = {f"x{i}": value for i, value in enumerate(rows)}
    return values | {f"w{i}": value for i, value in enumerate(shared)}


def parse(text: str) -> tuple[Step, ...]:
    """Parse steps, one a line."""
    return tuple(_parse_step(line) for line in ast.parse(text).body)


def _parse_step(line: ast.stmt) -> Step:
    assert isinstance(line, ast.Assign)
    assert isinstance(line.value, ast.Call)
    (target,), call = line.targets, line.value
    assert isinstance(target, ast.Name)
    assert isinstance(call.func, ast.Name)
    operands: list[Operand] = []
    for argument in call.args:
        if isinstance(argument, ast.Name):
            operands.append(argument.id)
        else:
            operands.append(ast.literal_eval(argument))
    options = [(str(option.arg), ast.literal_eval(option.value)) for option in call.keywords]
    return Step(target.id, call.func.id, tuple(operands), tuple(options))
