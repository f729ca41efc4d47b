"""Recipes of a transformer block, written from its nodes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node

from .growing import sizes_of
from .heads import Dims
from .readers import is_along_rows, read, tensor_of
from .steps import Step


@dataclass
class Writer:
    """Writes the steps of one recipe.

    joined: the node of the joined heads, an input of the result's recipe
    shared: inputs so far; extended
    names: of the recipe's values, by their nodes
    """

    dims: Dims
    members: list[Node]
    rows: list[Node]
    shared: list[Node]
    joined: Node
    steps: list[Step] = field(default_factory=list)
    names: dict[Node, str] = field(default_factory=dict)

    def write(self, node: Node) -> str | None:
        """Write the steps of a value, and return its name, or None."""
        if node in self.names:
            return self.names[node]
        if node in self.rows or node is self.joined:
            return f"x{[*self.rows, self.joined].index(node)}"
        if node not in self.members:
            return None
        base = self.dims.base(node)
        if base is not None:
            return self._heads(node, *base)
        call = read(node)
        if call is None:
            return None
        operands: list[Any] = []
        for place, operand in enumerate(call.operands):
            operands.append(self._operand(call.primitive, place, operand))
            if operands[-1] is None and isinstance(operand, Node):
                return None
        if not call.primitive:  # its value is its operand's
            return str(operands[0])
        self.names[node] = self._step(call.primitive, operands, call.options)
        return self.names[node]

    def _operand(self, primitive: str, place: int, operand: Any) -> Any:
        """An operand's name by its role; numbers and None as they are."""
        if not isinstance(operand, Node):
            return operand
        source = tensor_of(operand)
        if is_along_rows(primitive, place, source):
            return self.write(source)
        return self._shared(source)

    def _shared(self, node: Node) -> str:
        if node not in self.shared:
            self.shared.append(node)
        return f"w{self.shared.index(node)}"

    def _heads(self, node: Node, base: Node, start: int) -> str | None:
        """Write heads as a view of rows.

        Of a packed linear only their part is computed.

        base: the rows
        start: where in the rows' features the heads begin
        """
        _, heads, _, features = sizes_of(node)
        call = read(base) if base in self.members else None
        if call is not None and call.primitive == "linear":
            primitive = "linear_part"
            operands = [
                self._operand("linear", place, operand)
                for place, operand in enumerate(call.operands)
            ]
        else:
            primitive, operands = "narrow", [self.write(base)]
        if operands[0] is None:
            return None
        part = self._step(primitive, operands, {"start": start, "length": heads * features})
        self.names[node] = self._step("split_heads", [part], {"heads": heads})
        return self.names[node]

    def _step(self, primitive: str, operands: list[Any], options: dict[str, Any]) -> str:
        """Append a step, and return the name of its result."""
        name = f"v{len(self.steps)}"
        self.steps.append(Step(name, primitive, tuple(operands), tuple(options.items())))
        return name
