"""A mod's graph while it is traced: values, operands, operators."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..symbolic import example_size
from .graphs import DEVICE, DTYPE, FORMAT, REF, ModError

# Attribute of a tensor that replaces a number which is symbolic in an outer graph.
NUMBER = "_compiled_dilated_number"


@dataclass
class _Value:
    """A tensor of the trace.

    number: in the graph's numbering; negative for operands until their count is fixed.
    varies: whether it differs from pair to pair.
    tensor: referenced so that no other tensor takes its id, by which values are looked up.
    """

    number: int
    varies: bool
    tensor: Tensor


class Draft:
    """The values and operators of a graph under construction.

    about: the mod's kind and name, for errors.
    names: of the mod's arguments.
    captured: tensors and symbolic numbers from outside, the operands of the graph.
    """

    def __init__(self, about: str, names: Sequence[str]) -> None:
        self.about, self.names = about, tuple(names)
        self.captured: list[Any] = []
        self._body: list[tuple[str, Any, Any, bool, bool]] = []
        # By id, within one trace, which keeps the tensors alive. Operands are numbered -1, -2, ...
        # until the trace ends and their count is fixed.
        self._values: dict[int, _Value] = {}
        self._placeholders: dict[int, Tensor] = {}
        # Tensors in place of symbolic numbers, which promote as numbers do.
        self._numbers: set[int] = set()
        # Tensors that the mod computes from literals only.
        self._constants: dict[int, Tensor] = {}

    # Values ---------------------------------------------------------------------------------

    def argument(self, number: int, dtype: torch.dtype) -> Tensor:
        """An argument of the mod: a scalar without a value."""
        x = torch.empty((), dtype=dtype, device="meta")
        self._values[id(x)] = _Value(number, True, x)
        return x

    def is_traced(self, x: object) -> bool:
        """Whether an object is one of the trace's tensors without values."""
        return id(x) in self._values

    def varies(self, x: Tensor) -> bool:
        """Whether a tensor of the trace differs from pair to pair."""
        return self._values[id(x)].varies

    def is_operand(self, x: Tensor) -> bool:
        """Whether a tensor of the trace replaces a captured tensor."""
        return self._values[id(x)].number < 0

    def rename(self, target: Tensor, source: Tensor) -> None:
        """Assign the value of `source` to `target`, as in-place writes do."""
        value = self._values[id(source)]
        self._values[id(target)] = _Value(value.number, value.varies, target)

    def number(self, x: Tensor) -> Tensor:
        """Mark a tensor that replaces a symbolic number."""
        self._numbers.add(id(x))
        return x

    def is_number(self, x: Tensor) -> bool:
        """Whether a tensor replaces a symbolic number."""
        return id(x) in self._numbers

    def add_constants(self, tensors: Iterable[Tensor]) -> None:
        """Register tensors that are computed from literals only."""
        self._constants.update((id(x), x) for x in tensors)

    # Captured tensors -----------------------------------------------------------------------

    def placeholders(self, value: Any) -> Any:
        """The same nest of arguments with captured tensors replaced by placeholders."""
        if isinstance(value, Tensor):
            return self.placeholder(value)
        if isinstance(value, dict):
            return {key: self.placeholders(item) for key, item in value.items()}
        if type(value) in (tuple, list):
            return type(value)(self.placeholders(item) for item in value)
        return value

    def placeholder(self, x: Tensor) -> Tensor:
        """The placeholder of a captured tensor; a traced tensor unchanged."""
        if self.is_traced(x):
            return x
        if id(x) in self._constants and x.dim() == 0:
            return self._literal_number(x)
        if id(x) in self._placeholders:
            return self._placeholders[id(x)]
        # A new operand: its placeholder has the same sizes and strides, without data.
        self.captured.append(x)
        with _disable_current_modes():
            sizes = [example_size(size) for size in x.shape]
            strides = [example_size(size) for size in x.stride()]
            empty = torch.empty_strided(sizes, strides, dtype=x.dtype, device="meta")
        self._placeholders[id(x)] = empty
        self._values[id(empty)] = _Value(-len(self.captured), False, empty)
        if getattr(x, NUMBER, False):
            self.number(empty)
        return empty

    def operand_of(self, number: Any) -> Tensor:
        """The placeholder of a number, which becomes an operand of the graph."""
        dtype = torch.float64
        if isinstance(number, int | torch.SymInt):
            dtype = torch.int64
        with _disable_current_modes():
            empty = torch.empty((), dtype=dtype, device="meta")
        self.captured.append(number)
        self._values[id(empty)] = _Value(-len(self.captured), False, empty)
        return self.number(empty)

    def _literal_number(self, x: Tensor) -> Tensor:
        """A scalar constant as an operator of the graph."""
        with _disable_current_modes():
            empty = torch.empty((), dtype=x.dtype, device="meta")
            value = x.item()
        options = {"dtype": x.dtype, "device": empty.device}
        self.append(torch.ops.aten.scalar_tensor.default, [value], options, True, False, empty)
        return empty

    # Operators ------------------------------------------------------------------------------

    def append(
        self,
        op: Any,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        single: bool,
        varies: bool,
        out: Tensor,
    ) -> None:
        """Append an operator and number its result.

        single, varies: as in graphs.py.
        out: the result, a tensor without data.
        """
        # A symbolic number can become an operand where the operator takes a tensor.
        takes_tensor = {}
        for argument in op._schema.arguments:
            takes_tensor[argument.name] = isinstance(argument.type, torch.TensorType)
        by_position = list(takes_tensor.values())
        arguments = []
        for place, value in enumerate(args):
            arguments.append(self._literal(value, by_position[place]))
        options = {}
        for name, value in kwargs.items():
            options[name] = self._literal(value, takes_tensor[name])
        # Results are numbered after the inputs; `text` shifts them by the count of operands.
        self._body.append((str(op), arguments, options, single, varies))
        self._values[id(out)] = _Value(len(self.names) + len(self._body) - 1, varies, out)

    def _literal(self, value: Any, takes_tensor: bool = False) -> Any:
        """An argument as JSON: a reference, or a tagged literal."""
        if takes_tensor and isinstance(value, torch.SymInt | torch.SymFloat):
            self.captured.append(value)
            return {REF: -len(self.captured)}
        if isinstance(value, Tensor):
            # A tensor created inside of an operator, below Captures, has no placeholder yet.
            return {REF: self._values[id(self.placeholder(value))].number}
        if isinstance(value, (tuple, list)):
            return [self._literal(item) for item in value]
        if isinstance(value, torch.dtype):
            return {DTYPE: str(value).removeprefix("torch.")}
        if isinstance(value, torch.device):
            return {DEVICE: None}
        if isinstance(value, (torch.memory_format, torch.layout)):
            return {FORMAT: str(value).removeprefix("torch.")}
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise ModError(
            f"{self.about} uses the {type(value).__name__} {value!r}, which a graph cannot carry"
        )

    # Text -----------------------------------------------------------------------------------

    def text(self, result: Tensor) -> str:
        """The graph as text, once the trace is complete.

        result: the mod's result, a tensor of the trace.
        """
        body = []
        for name, args, kwargs, single, varies in self._body:
            body.append([name, self._renumbered(args), self._renumbered(kwargs), single, varies])
        number = self._renumbered({REF: self._values[id(result)].number})[REF]
        graph = [self.names, len(self.captured), body, number]
        return json.dumps(graph, separators=(",", ":"))

    def _renumbered(self, value: Any) -> Any:
        """References in the graph's numbering: inputs, operands, results of operators."""
        if isinstance(value, list):
            return [self._renumbered(item) for item in value]
        if not isinstance(value, dict):
            return value
        if REF not in value:
            return {key: self._renumbered(item) for key, item in value.items()}
        inputs, number = len(self.names), value[REF]
        if number < 0:
            return {REF: inputs - 1 - number}
        if number >= inputs:
            number += len(self.captured)
        return {REF: number}
