"""Entries from example inputs: which sizes of which inputs vary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import arguments
from ..native.expressions import MOST_POSITIONS
from .entries import BATCH, DTYPES, PLACES, QUERIES, TOKENS, Entry, Input, dtype_of

Ranges = dict[str, tuple[int, int]]


def ranges_of(lengths: object, batches: object) -> Ranges:
    """The ranges of `export`, checked."""
    ranges: Ranges = {}
    for name, argument, value in ((TOKENS, "lengths", lengths), (BATCH, "batches", batches)):
        if value is None:
            continue
        numbers = arguments.integers(argument, value, 1)
        if len(numbers) != 2 or numbers[0] > numbers[1]:
            raise ValueError(
                f"{argument} must be the least and the most, as (1, 65536); got {value!r}"
            )
        if name == TOKENS and numbers[1] > MOST_POSITIONS:
            raise ValueError(
                f"{argument} must end at {MOST_POSITIONS} or before, the positions of the kernels; "
                f"got {value!r}"
            )
        ranges[name] = (numbers[0], numbers[1])
    return ranges


def tensors_of(argument: str, inputs: Any) -> tuple[Tensor, ...]:
    """Example inputs, checked one by one."""
    if isinstance(inputs, Tensor) or not arguments.is_iterable(inputs):
        raise TypeError(f"{argument} must be a sequence of tensors; got {type(inputs).__name__}")
    tensors = tuple(inputs)
    if not tensors:
        raise ValueError(f"{argument} is empty; pass at least one tensor")
    for number, x in enumerate(tensors):
        if not isinstance(x, Tensor) or x.device.type not in PLACES:
            kind = f"one on {x.device}" if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{argument}[{number}] must be a tensor on a CPU or a GPU; got {kind}")
        if x.device != tensors[0].device:
            raise ValueError(
                f"{argument} must all be on one device; "
                f"{argument}[0] is on {tensors[0].device}, {argument}[{number}] on {x.device}"
            )
        if dtype_of(x) not in DTYPES:
            raise TypeError(
                f"{argument}[{number}] must have one of the dtypes {', '.join(DTYPES)}; "
                f"got {dtype_of(x)}"
            )
        if x.dim() < 2:
            raise ValueError(
                f"{argument}[{number}] must have a batch and tokens; got the shape {tuple(x.shape)}"
            )
    # torch.export merges inputs that are the same tensor: copy repetitions.
    distinct: list[Tensor] = []
    for x in tensors:
        is_repeated = any(x is y for y in distinct)
        distinct.append(x.clone() if is_repeated else x)
    return tuple(distinct)


def entry_of(
    argument: str,
    inputs: Sequence[Tensor],
    ranges: Ranges,
    decodes: bool,
    queries_last: bool = False,
) -> Entry:
    """The entry of example inputs.

    argument: the example's name in errors.
    decodes: whether some inputs are queries, with fewer tokens than the cache.
    queries_last: as in `Entry`.
    """
    ranges = dict(ranges)
    varying = {
        name: _sizes_of(argument, name, inputs, decodes and name == TOKENS)
        for name in (TOKENS, BATCH)
        if name in ranges
    }
    # torch.export makes a size of 1 a constant: an example of one query fixes the size.
    queries = 0
    query_size: int | str = 1
    if decodes:
        queries = min(varying[TOKENS].values())
    if queries > 1:
        query_size = QUERIES
        ranges[QUERIES] = (1, ranges[TOKENS][1])
    # Varying sizes become names, all others stay numbers.
    result = []
    for number, x in enumerate(inputs):
        shape: list[int | str] = list(x.shape)
        for name, sizes in varying.items():
            is_query = decodes and name == TOKENS and sizes[number] == queries
            shape[_axis(name, x)] = query_size if is_query else name
        result.append(Input(dtype_of(x), tuple(shape)))
    for name, sizes in varying.items():
        _check_example(argument, name, max(sizes.values()), ranges[name])
    return Entry(tuple(result), ranges, (), queries_last, inputs[0].device.type)


def _axis(name: str, x: Tensor) -> int:
    """The dimension of a varying size.

    x: (batch, tokens) or (batch, ..., tokens, width).
    """
    if name == BATCH:
        return 0
    return max(1, x.dim() - 2)


def _sizes_of(argument: str, name: str, inputs: Sequence[Tensor], decodes: bool) -> dict[int, int]:
    """One size of all inputs by number: equal, or two when decoding."""
    sizes = {number: x.shape[_axis(name, x)] for number, x in enumerate(inputs)}
    if decodes:
        distinct = sorted(set(sizes.values()))
        if len(distinct) != 2:
            raise ValueError(
                f"{argument} must have two sizes of tokens, that of the queries and that of "
                f"the cache, which is larger; got {distinct}"
            )
        return sizes
    for number, size in sizes.items():
        if size != sizes[0]:
            raise ValueError(
                f"all inputs must have as many {name} as the first, {sizes[0]}; "
                f"{argument}[{number}] has {size}"
            )
    return sizes


def _check_example(argument: str, name: str, size: int, bounds: tuple[int, int]) -> None:
    """Raise ValueError for an example with which a size cannot vary."""
    if size < 2:
        # torch.export makes a size of 1 a constant.
        raise ValueError(f"{argument} must have at least 2 {name} where that varies; got {size}")
    if not bounds[0] <= size <= bounds[1]:
        raise ValueError(f"{argument} must have {name} within the range {bounds}; got {size}")


def dims_of(entry: Entry) -> tuple[Any, ...]:
    """torch.export's dynamic shapes of an entry's inputs."""
    dims = {
        name: torch.export.Dim(name, min=least, max=most)
        for name, (least, most) in entry.ranges.items()
    }
    shapes = []
    for x in entry.inputs:
        varying = {axis: dims[size] for axis, size in enumerate(x.shape) if isinstance(size, str)}
        shapes.append(varying)
    return tuple(shapes)
