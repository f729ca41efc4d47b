"""A traced mod as text, its parser, and its values on tiles.

    [["score", "b", ...], operands, [[operator, arguments, options, single, varies], ...], result]

The operators are pure ATen operators on scalars, captured tensors and literals. Values are
numbered: inputs first, then operands, then the results of the operators.

single   the operator maps scalars to a scalar, or loads one from a table, or does not vary
varies   its result differs from pair to pair

A graph all of whose operators are single is evaluated on a whole tile at once. Any other is
evaluated pair by pair under vmap, which is slower.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from .pairs import over_pairs

# Keys of literals: a value by its number, a dtype, the device of the indices, a layout or format.
REF, DTYPE, DEVICE, FORMAT = "%", "%dtype", "%device", "%format"
READS_A_VALUE = frozenset(
    ("aten._local_scalar_dense", "aten.is_nonzero", "aten.equal", "aten.nonzero", "aten.item"),
)
_MOST_CHARACTERS = 2**20
# Operators that are neither core nor pointwise, but functions of their inputs only.
_ALSO_ALLOWED = frozenset(
    (
        "aten._to_copy", "aten.dot", "aten.mv", "aten.stack", "aten.unbind",
        "aten.linalg_vector_norm", "aten.lift_fresh", "aten.lift_fresh_copy", "aten.detach",
        "aten.t", "aten.transpose", "aten.squeeze", "aten._unsafe_view", "aten.new_full",
        "aten.new_ones", "aten.new_zeros", "aten.ones", "aten.zeros", "aten.full",
        "aten.scalar_tensor", "aten.ones_like", "aten.zeros_like", "aten.count_nonzero",
        "aten.all", "aten.any", "aten.logsumexp", "aten.special_erf", "aten.vdot", "aten.index",
        "aten.floor_divide", "aten.bucketize", "aten.searchsorted", "aten.isin", "aten.take",
    )
)  # fmt: skip


class ModError(ValueError):
    """A function that cannot be traced, or an invalid graph."""


@dataclass(frozen=True)
class Graph:
    """A traced mod as text.

    Equal by text, so that everything derived from it can be cached by value. The parser accepts
    only pure ATen operators and literals.
    """

    text: str

    @cached_property
    def _code(self) -> _Code:
        return _read(self.text)

    def check(self) -> Graph:
        """Return the graph; raises ModError if its text cannot be parsed."""
        _ = self._code
        return self

    @property
    def operands(self) -> int:
        """The number of captured tensors that it reads."""
        return self._code.operands

    @property
    def is_elementwise(self) -> bool:
        """Whether a whole tile can be evaluated at once."""
        return self._code.is_elementwise

    def reads(self, name: str) -> bool:
        """Whether the result depends on an input.

        name: "score", "b", "h", "q_idx" or "kv_idx".
        """
        return self._code.inputs.index(name) in self._code.dependencies

    def score(self, operands: Sequence[Tensor], score: Tensor, *indices: Tensor) -> Tensor:
        """The new scores of all pairs, of `score`'s shape and dtype.

        indices: b, h, q and kv, of as many dimensions as `score`, broadcasting with it.
        """
        out = self._over_tile(operands, score, *indices)
        return out.to(score.dtype).expand(score.shape)

    def mask(self, operands: Sequence[Tensor], *indices: Tensor) -> Tensor:
        """The allowed pairs as bools that broadcast with the indices.

        indices: b, h, q and kv.
        """
        return self._over_tile(operands, *indices)

    def scalar(
        self,
        operands: Sequence[Tensor],
        *arguments: Tensor,
        subscripts: bool = False,
    ) -> Tensor:
        """The mod on scalars, as FlexAttention calls it.

        subscripts: read operands by x[i], the one way that FlexAttention differentiates.
        """
        return self._code.run((*arguments, *operands), 0, subscripts)

    def _over_tile(self, operands: Sequence[Tensor], *arguments: Tensor) -> Tensor:
        """The mod on all pairs: at once if elementwise, else under vmap."""
        if self.is_elementwise:
            return self._code.run((*arguments, *operands), arguments[0].dim())
        out: Tensor = over_pairs(lambda *scalars: self.scalar(operands, *scalars), *arguments)
        return out


@dataclass(frozen=True)
class _Instruction:
    op: Any
    args: list[Any]
    kwargs: dict[str, Any]
    varies: bool


@dataclass(frozen=True)
class _Code:
    """A parsed graph.

    result: the number of the mod's result.
    dependencies: numbers of the values that the result depends on.
    """

    inputs: tuple[str, ...]
    operands: int
    instructions: tuple[_Instruction, ...]
    result: int
    dependencies: frozenset[int]
    is_elementwise: bool

    def run(self, values: Sequence[Tensor], dims: int, subscripts: bool = False) -> Tensor:
        """The result for these inputs and operands.

        dims: of a tile. Scalar constants are reshaped to as many dimensions, so that dtypes
            promote as among scalars.
        subscripts: as in `Graph.scalar`.
        """
        device, env = values[0].device, list(values)
        for instruction in self.instructions:
            spread = dims if instruction.varies else 0
            args = _resolve(instruction.args, env, device, spread)
            kwargs = _resolve(instruction.kwargs, env, device, spread)
            op = instruction.op
            if subscripts and op is torch.ops.aten.index.Tensor:
                op = _subscript
            env.append(op(*args, **kwargs))
        # A result that is the same for all pairs broadcasts over the tile.
        out = env[self.result]
        if out.dim() < dims:
            return out.reshape((1,) * dims)
        return out


def _subscript(x: Tensor, indices: Sequence[Tensor | None]) -> Tensor:
    """aten.index as x[indices]."""
    entries: list[Any] = []
    for index in indices:
        if index is None:
            entries.append(slice(None))
        else:
            entries.append(index)
    return x[tuple(entries)]


def _resolve(value: Any, env: list[Any], device: torch.device, dims: int) -> Any:
    """An argument of the text with values in place of references.

    device: in place of the device of the indices.
    dims: scalars are reshaped to as many dimensions; 0 leaves them.
    """
    if isinstance(value, list):
        return [_resolve(item, env, device, dims) for item in value]
    if not isinstance(value, dict):
        return value
    if REF in value:
        x = env[value[REF]]
        if dims and isinstance(x, Tensor) and x.dim() == 0:
            return x.reshape((1,) * dims)
        return x
    if DTYPE in value:
        return getattr(torch, value[DTYPE])
    if FORMAT in value:
        return getattr(torch, value[FORMAT])
    if DEVICE in value:
        return device
    return {key: _resolve(item, env, device, dims) for key, item in value.items()}


@lru_cache(maxsize=256)
def _read(text: str) -> _Code:
    """Parse the text of a graph; raises ModError if it is invalid."""
    if len(text) > _MOST_CHARACTERS:
        raise ModError(f"a mod's graph may have {_MOST_CHARACTERS:,} characters; got {len(text):,}")
    try:
        inputs, operands, body, result = json.loads(text)
        arguments = len(inputs) + operands
        instructions = []
        for place, entry in enumerate(body, arguments):
            instructions.append(_instruction(entry, place))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ModError(f"the text is no graph of a mod: {error}") from None
    values = arguments + len(instructions)
    if not isinstance(result, int) or not 0 <= result < values:
        raise ModError(f"the graph's result must be one of its {values} values; got {result!r}")
    dependencies = _dependencies(instructions, result, arguments)
    elementwise = all(entry[3] for entry in body)
    names, code = tuple(inputs), tuple(instructions)
    return _Code(names, operands, code, result, dependencies, elementwise)


def _instruction(entry: Any, place: int) -> _Instruction:
    """Check an instruction of the text.

    place: number of the result.
    """
    name, args, kwargs, _, varies = entry
    _, packet, overload = name.split(".")
    op = getattr(getattr(torch.ops.aten, packet), overload)
    if not is_allowed(op):
        raise ModError(f"{name} is no pure operator that a mod may call")
    # An instruction reads earlier values only, so that a graph has no cycle.
    late = [reference for reference in _references([args, kwargs]) if not 0 <= reference < place]
    if late:
        raise ModError(f"{name} reads the values {late}, which come after it")
    return _Instruction(op, args, kwargs, bool(varies))


def is_allowed(op: Any) -> bool:
    """Whether an operator is a function of its inputs only.

    It is pointwise, of ATen's core in any overload, or in `_ALSO_ALLOWED`.
    """
    name = str(op._schema.name).replace("::", ".")
    is_random = torch.Tag.nondeterministic_seeded in op.tags
    if op._schema.is_mutable or is_random or name in READS_A_VALUE:
        return False
    return torch.Tag.pointwise in op.tags or name in _ALSO_ALLOWED or _is_core(op.overloadpacket)


@lru_cache(maxsize=512)
def _is_core(packet: Any) -> bool:
    """Whether an overload of an operator belongs to ATen's core."""
    return any(torch.Tag.core in getattr(packet, overload).tags for overload in packet.overloads())


def _references(value: Any) -> Iterator[int]:
    """Yield the value numbers that an argument of the text refers to."""
    if isinstance(value, list):
        for item in value:
            yield from _references(item)
    elif isinstance(value, dict):
        if REF in value:
            yield value[REF]
        else:
            yield from _references(list(value.values()))


def _dependencies(
    instructions: Sequence[_Instruction], result: int, arguments: int
) -> frozenset[int]:
    """The values that the result depends on, the result included."""
    values = {result}
    # Backwards: an instruction reads earlier values only.
    for place in reversed(range(len(instructions))):
        if arguments + place in values:
            instruction = instructions[place]
            values.update(_references([instruction.args, instruction.kwargs]))
    return frozenset(values)
