"""A traced mod as numbers that the native kernel reads: tapes of operations on registers.

    version
    operands, then of each: type, dimensions, then the size of each that the tapes were made for (-1: any)
    tapes, then of each: kind (Kind), nodes, then of each node: operation, register, number, inputs, then the inputs
                         (numbers of earlier nodes); last the number of the node that is the result

src/functions.h reads the same. expressions.py has the operations, cells.py and aten.py what torch's operators are in them,
derivatives.py their gradients.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from enum import IntEnum
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..mods import Graph
from ..mods.graphs import DTYPE, FORMAT, REF
from .aten import Cells, Operators
from .derivatives import gradients
from .expressions import OPERATIONS, TYPES, Expressions, Register, Untranslatable

__all__ = ["Untranslatable", "encode"]

VERSION = 1


class Kind(IntEnum):
    """What a tape computes, of scores of what type."""

    MASK = 0
    SCORE_F32 = 1
    SCORE_F64 = 2
    BACKWARD_F32 = 3
    BACKWARD_F64 = 4


Shapes = tuple[tuple[torch.dtype, tuple[Any, ...]], ...]


def encode(graph: Graph, operands: Sequence[Tensor]) -> tuple[int, ...]:
    """The numbers of a graph.

    operands: those that it reads; their dtypes, shapes and nothing else are looked at.

    Raises Untranslatable with a reason.
    """
    shapes: Shapes = tuple((operand.dtype, tuple(operand.shape)) for operand in operands)
    if any(not isinstance(size, int) for _, shape in shapes for size in shape):
        return _encode(graph, shapes)
    return _encode_cached(graph, shapes)


def _encode(graph: Graph, shapes: Shapes) -> tuple[int, ...]:
    fixed: dict[tuple[int, int], int] = {}
    tapes = []
    if "score" in json.loads(graph.text)[0]:
        for dtype, score, backward in (
            (torch.float32, Kind.SCORE_F32, Kind.BACKWARD_F32),
            (torch.float64, Kind.SCORE_F64, Kind.BACKWARD_F64),
        ):
            x, result = _translated(graph, shapes, fixed, dtype)
            tapes.append([score, *_tape(x, result, [])])
            register = Register.F32 if dtype == torch.float32 else Register.F64
            tapes.append([backward, *_tape(x, *gradients(x, result, register))])
    else:
        x, result = _translated(graph, shapes, fixed, None)
        tapes.append([Kind.MASK, *_tape(x, result, [])])
    written: list[int] = [VERSION, len(shapes)]
    for number, (dtype, shape) in enumerate(shapes):
        written += [TYPES[dtype], len(shape), *(fixed.get((number, dim), -1) for dim in range(len(shape)))]
    return (*written, len(tapes), *(int(number) for tape in tapes for number in tape))


_encode_cached = lru_cache(maxsize=256)(_encode)


def _translated(
    graph: Graph, shapes: Shapes, fixed: dict[tuple[int, int], int], dtype: torch.dtype | None
) -> tuple[Expressions, int]:
    """The expressions of a graph and its result. dtype: of the scores; None for a mask."""
    x = Expressions()
    operators = Operators(x, fixed)
    names = {"b": "batch", "h": "head", "q_idx": "query", "kv_idx": "key"}
    values: list[Cells] = []
    code = graph._code
    for name in code.inputs:
        if name == "score":
            assert dtype is not None
            values.append(_single(dtype, x.add("score", Register.F32 if dtype == torch.float32 else Register.F64)))
        else:
            values.append(_single(torch.int64, x.index(names[name])))
    if code.operands != len(shapes):
        raise Untranslatable(f"the graph reads {code.operands} operands; got {len(shapes)}")
    for number, (of, shape) in enumerate(shapes):
        if of not in TYPES:
            raise Untranslatable(f"it captures a tensor of {of}")
        if len(shape) > 8:
            raise Untranslatable(f"it captures a tensor of {len(shape)} dimensions, more than 8")
        values.append(operators.operand(number, of, shape))
    for place, instruction in enumerate(code.instructions, len(values)):
        if place not in code.read:
            values.append(_single(torch.int64, 0))  # nobody reads it
            continue
        kwargs: dict[str, Any] = _resolved(instruction.kwargs, values)
        values.append(operators.call(instruction.op, _resolved(instruction.args, values), kwargs))
    result = values[code.result].at(())
    if dtype is None:
        return x, x.held(result, Register.BOOLEAN)
    return x, x.cast(result, dtype)


def _single(dtype: torch.dtype, node: int) -> Cells:
    return Cells(dtype, (), lambda _: node)


def _resolved(value: Any, values: Sequence[Cells]) -> Any:
    """The arguments of an instruction, values for references to them."""
    if isinstance(value, list):
        return [_resolved(item, values) for item in value]
    if not isinstance(value, dict):
        return value
    if REF in value:
        return values[value[REF]]
    for key in (DTYPE, FORMAT):
        if key in value:
            return getattr(torch, value[key])
    return {key: _resolved(item, values) for key, item in value.items()}


def _tape(x: Expressions, result: int, sums: Sequence[int]) -> list[int]:
    """Nodes that the result and the sums need, under new numbers, and the result."""
    needed = sorted(_needed(x, [result, *sums]))
    numbers = {place: number for number, place in enumerate(needed)}
    written = [len(needed)]
    for place in needed:
        node = x.nodes[place]
        inputs = [numbers[input] for input in node.inputs]
        written += [OPERATIONS[node.op], node.type, node.number, len(inputs), *inputs]
    return [*written, numbers[result]]


def _needed(x: Expressions, roots: Sequence[int]) -> Iterator[int]:
    seen = set(roots)
    waiting = list(seen)
    while waiting:
        place = waiting.pop()
        yield place
        for input in x.nodes[place].inputs:
            if input not in seen:
                seen.add(input)
                waiting.append(input)
