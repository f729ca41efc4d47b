"""From examples to entries: which sizes of which inputs vary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import arguments
from .entries import BATCH, DTYPES, QUERIES, TOKENS, Entry, Input, dtype_of

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
        if not isinstance(x, Tensor) or x.device.type != "cpu":
            kind = f"one on {x.device}" if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{argument}[{number}] must be a tensor on a CPU; got {kind}")
        if dtype_of(x) not in DTYPES:
            raise TypeError(
                f"{argument}[{number}] must have one of the dtypes {', '.join(DTYPES)}; got {dtype_of(x)}"
            )
        if x.dim() < 2:
            raise ValueError(
                f"{argument}[{number}] must have a batch and tokens; got the shape {tuple(x.shape)}"
            )
    # torch.export makes one input of a tensor that comes twice.
    return tuple(
        x.clone() if any(x is y for y in tensors[:number]) else x
        for number, x in enumerate(tensors)
    )


def entry_of(
    argument: str,
    inputs: Sequence[Tensor],
    ranges: Ranges,
    decodes: bool,
    queries_last: bool = False,
) -> Entry:
    """An entry for tensors like these. decodes: whether some of them have fewer tokens than the cache, the queries'."""
    ranges = dict(ranges)
    names = {
        name: _sizes_of(argument, name, inputs, decodes and name == TOKENS)
        for name in (TOKENS, BATCH)
        if name in ranges
    }
    fewer = min(names[TOKENS].values()) if decodes else 0
    # One query at a time is a size that does not vary: torch.export takes a size of 1 for a constant.
    if decodes and fewer > 1:
        ranges[QUERIES] = (1, ranges[TOKENS][1])
    result = []
    for number, x in enumerate(inputs):
        shape: list[int | str] = list(x.shape)
        for name, sizes in names.items():
            is_query = decodes and name == TOKENS and sizes[number] == fewer
            shape[_axis(name, x)] = (QUERIES if fewer > 1 else 1) if is_query else name
        result.append(Input(dtype_of(x), tuple(shape)))
    for name, sizes in names.items():
        _check_example(argument, name, max(sizes.values()), ranges[name])
    return Entry(tuple(result), ranges, queries_last=queries_last)


def _axis(name: str, x: Tensor) -> int:
    """The dimension of a size that varies."""
    return 0 if name == BATCH else 1 if x.dim() == 2 else x.dim() - 2


def _sizes_of(argument: str, name: str, inputs: Sequence[Tensor], decodes: bool) -> dict[int, int]:
    """A size of each input by its number; all alike, or of two kinds where some are queries."""
    sizes = {number: x.shape[_axis(name, x)] for number, x in enumerate(inputs)}
    if decodes:
        if len(set(sizes.values())) != 2:
            raise ValueError(
                f"{argument} must have two sizes of tokens, that of the queries and that of the cache, which is larger; "
                f"got {sorted(set(sizes.values()))}"
            )
        return sizes
    for number, size in sizes.items():
        if size != sizes[0]:
            raise ValueError(
                f"all inputs must have as many {name} as the first, {sizes[0]}; {argument}[{number}] has {size}"
            )
    return sizes


def _check_example(argument: str, name: str, size: int, bounds: tuple[int, int]) -> None:
    if size < 2:
        # torch.export takes a size of 1 for a constant.
        raise ValueError(f"{argument} must have at least 2 {name} where that varies; got {size}")
    if not bounds[0] <= size <= bounds[1]:
        raise ValueError(f"{argument} must have {name} within the range {bounds}; got {size}")


def dims_of(entry: Entry) -> tuple[Any, ...]:
    """torch.export's dynamic shapes of an entry's inputs."""
    dims = {
        name: torch.export.Dim(name, min=least, max=most)
        for name, (least, most) in entry.ranges.items()
    }
    return tuple(
        {axis: dims[size] for axis, size in enumerate(x.shape) if isinstance(size, str)}
        for x in entry.inputs
    )
