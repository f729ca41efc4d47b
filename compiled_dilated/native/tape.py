"""A traced mod as numbers: tapes of operations on registers.

    version
    number of operands; per operand: type, dimensions, and per dimension the size that the tapes
                                     were made for (-1: any)
    number of tapes; per tape: kind (Kind), number of nodes, the nodes, the result's node
                     per node: operation, register, number, count of inputs, the inputs (numbers of
                               earlier nodes)

src/functions.h reads the same layout. expressions.py has the operations, aten.py torch's operators
in terms of them, derivatives.py their gradients.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from enum import IntEnum
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..mods import Graph
from ..mods.graphs import DTYPE, FORMAT, REF
from .aten import call
from .derivatives import gradients
from .expressions import OPERATIONS, TYPES, Expressions, Register, Untranslatable
from .tensors import Cells, Tensors, cells

__all__ = ["Untranslatable", "encode"]

VERSION = 1
_MOST_DIMENSIONS = 8  # of an operand, as of Array in src/problem.h
_INDEX_NAMES = {"b": "batch", "h": "head", "q_idx": "query", "kv_idx": "key"}


class Kind(IntEnum):
    """The result of a tape, and the type of its scores."""

    MASK = 0
    SCORE_F32 = 1
    SCORE_F64 = 2
    BACKWARD_F32 = 3
    BACKWARD_F64 = 4


# dtype and sizes, per operand.
Shapes = tuple[tuple[torch.dtype, tuple[Any, ...]], ...]


def encode(graph: Graph, operands: Sequence[Tensor]) -> tuple[int, ...]:
    """The numbers of a graph.

    operands: the tensors that it reads; only their dtypes and shapes count.

    Raises Untranslatable with a reason.
    """
    shapes: Shapes = tuple((operand.dtype, tuple(operand.shape)) for operand in operands)
    if any(not isinstance(size, int) for _, shape in shapes for size in shape):
        return _encode(graph, shapes)  # symbolic sizes are no keys of a cache
    return _encode_cached(graph, shapes)


def _encode(graph: Graph, shapes: Shapes) -> tuple[int, ...]:
    fixed: dict[tuple[int, int], int] = {}
    tapes = _tapes(graph, shapes, fixed)
    numbers: list[int] = [VERSION, len(shapes)]
    for operand, (dtype, shape) in enumerate(shapes):
        sizes = [fixed.get((operand, dim), -1) for dim in range(len(shape))]
        numbers += [TYPES[dtype], len(shape), *sizes]
    numbers.append(len(tapes))
    for tape in tapes:
        numbers += map(int, tape)
    return tuple(numbers)


_encode_cached = lru_cache(maxsize=256)(_encode)


def _tapes(graph: Graph, shapes: Shapes, fixed: dict[tuple[int, int], int]) -> list[list[int]]:
    """The tapes of a mask, or of a score and its gradients.

    fixed: receives the size of each (operand, dimension) that the tapes depend on.
    """
    if "score" not in json.loads(graph.text)[0]:
        x, result = _translate(graph, shapes, fixed, None)
        return [[Kind.MASK, *_tape(x, result, [])]]
    precisions = (
        (torch.float32, Register.F32, Kind.SCORE_F32, Kind.BACKWARD_F32),
        (torch.float64, Register.F64, Kind.SCORE_F64, Kind.BACKWARD_F64),
    )
    tapes = []
    for dtype, register, score, backward in precisions:
        x, result = _translate(graph, shapes, fixed, dtype)
        tapes.append([score, *_tape(x, result, [])])
        tapes.append([backward, *_tape(x, *gradients(x, result, register))])
    return tapes


# Translation --------------------------------------------------------------------------------


def _translate(
    graph: Graph,
    shapes: Shapes,
    fixed: dict[tuple[int, int], int],
    dtype: torch.dtype | None,
) -> tuple[Expressions, int]:
    """The expressions of a graph, and the node of its result.

    dtype: of the scores; None for a mask.
    """
    x = Expressions()
    tensors = Tensors(x, fixed)
    code = graph._code
    if code.operands != len(shapes):
        raise Untranslatable(f"the graph reads {code.operands} operands; got {len(shapes)}")
    # Values in the graph's numbering: inputs, operands, results of instructions.
    values = [_input(x, name, dtype) for name in code.inputs]
    for number, (operand_dtype, shape) in enumerate(shapes):
        _check_operand(operand_dtype, shape)
        values.append(tensors.operand(number, operand_dtype, shape))
    for place, instruction in enumerate(code.instructions, len(values)):
        if place not in code.dependencies:
            values.append(_scalar(torch.int64, 0))  # a placeholder: nothing reads it
            continue
        args: list[Any] = _resolve(instruction.args, values)
        kwargs: dict[str, Any] = _resolve(instruction.kwargs, values)
        values.append(call(tensors, instruction.op, args, kwargs))
    result = values[code.result].at(())
    if dtype is None:
        return x, x.held(result, Register.BOOLEAN)
    return x, x.cast(result, dtype)


def _input(x: Expressions, name: str, dtype: torch.dtype | None) -> Cells:
    if name != "score":
        return _scalar(torch.int64, x.index(_INDEX_NAMES[name]))
    assert dtype is not None
    register = Register.F32 if dtype == torch.float32 else Register.F64
    return _scalar(dtype, x.add("score", register))


def _check_operand(dtype: torch.dtype, shape: tuple[Any, ...]) -> None:
    if dtype not in TYPES:
        raise Untranslatable(f"it captures a tensor of {dtype}")
    if len(shape) > _MOST_DIMENSIONS:
        raise Untranslatable(
            f"it captures a tensor of {len(shape)} dimensions, more than {_MOST_DIMENSIONS}",
        )


def _scalar(dtype: torch.dtype, node: int) -> Cells:
    return cells(dtype, (), lambda _: node)


def _resolve(value: Any, values: Sequence[Cells]) -> Any:
    """An instruction's arguments with values in place of references."""
    if isinstance(value, list):
        return [_resolve(item, values) for item in value]
    if not isinstance(value, dict):
        return value
    if REF in value:
        return values[value[REF]]
    for key in (DTYPE, FORMAT):
        if key in value:
            return getattr(torch, value[key])
    return {key: _resolve(item, values) for key, item in value.items()}


# Tapes --------------------------------------------------------------------------------------


def _tape(x: Expressions, result: int, scatters: Sequence[int]) -> list[int]:
    """The numbers of the nodes that result and scatters need."""
    needed = sorted(_needed(x, [result, *scatters]))
    new_numbers = {place: number for number, place in enumerate(needed)}
    tape = [len(needed)]
    for place in needed:
        node = x.nodes[place]
        inputs = [new_numbers[source] for source in node.inputs]
        tape += [OPERATIONS[node.op], node.type, node.number, len(inputs), *inputs]
    return [*tape, new_numbers[result]]


def _needed(x: Expressions, roots: Iterable[int]) -> set[int]:
    """The nodes that the roots depend on, the roots included."""
    needed = set(roots)
    pending = list(needed)
    while pending:
        for source in x.nodes[pending.pop()].inputs:
            if source not in needed:
                needed.add(source)
                pending.append(source)
    return needed
