"""An entry of a package: the tensors that it takes, in which ranges, and the check of both.

The check is written twice, with the same words: here for a loaded package, whose errors are Python's, and in
native/src/inputs.cpp for the graph itself, which refuses the same whoever runs it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Sizes that vary, and the dtypes of inputs: in native/src/inputs.cpp they have the same numbers.
NAMES = TOKENS, BATCH, QUERIES = "tokens", "batch", "queries"
DTYPES = (
    "float32",
    "float64",
    "float16",
    "bfloat16",
    "bool",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
)


def dtype_of(x: Tensor) -> str:
    """A tensor's dtype without "torch."."""
    return str(x.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Input:
    """A tensor that an entry takes.

    shape: numbers, or names of ranges.
    contiguous: whether generated code reads it, in the order of its dimensions; attention takes any strides.
    """

    dtype: str
    shape: tuple[int | str, ...]
    contiguous: bool = False

    def __str__(self) -> str:
        return f"{self.dtype} {shown(self.shape)}{', contiguous' if self.contiguous else ''}"


@dataclass(frozen=True)
class Entry:
    """A function of a package.

    inputs: in order.
    ranges: (least, most) by name.
    attention: what each attention of it computes, and by which plan.
    queries_last: whether queries are the last of the tokens, so that there are at most as many.
    """

    inputs: tuple[Input, ...]
    ranges: Mapping[str, tuple[int, int]]
    attention: tuple[str, ...] = ()
    queries_last: bool = False

    def check(self, inputs: Sequence[object]) -> None:
        """Raise TypeError or ValueError unless the entry may run with these."""
        if len(inputs) != len(self.inputs):
            raise TypeError(f"the package takes {len(self.inputs)} tensors; got {len(inputs)}")
        sizes: dict[str, int] = {}
        for number, (x, expected) in enumerate(zip(inputs, self.inputs, strict=True)):
            if not isinstance(x, Tensor):
                raise TypeError(f"input {number} must be a tensor; got {type(x).__name__}")
            if dtype_of(x) != expected.dtype or x.device.type != "cpu":
                device = "a CPU" if x.device.type == "cpu" else "another device"
                raise TypeError(
                    f"input {number} must be {expected.dtype} on a CPU; got {dtype_of(x)} on {device}"
                )
            # A size with a name is what the first input has, and the same in all others.
            fits = x.dim() == len(expected.shape) and all(
                size == (sizes.setdefault(axis, size) if isinstance(axis, str) else axis)
                for size, axis in zip(x.shape, expected.shape, strict=True)
            )
            if not fits:
                raise ValueError(
                    f"input {number} must have the shape {shown(expected.shape)}; got {shown(x.shape)}"
                )
        self._check_ranges(sizes)

    def _check_ranges(self, sizes: Mapping[str, int]) -> None:
        for name in NAMES:
            if name in sizes and not self.ranges[name][0] <= sizes[name] <= self.ranges[name][1]:
                least, most = self.ranges[name]
                raise ValueError(
                    f"{name} must be from {least:,} to {most:,}, for which the package was made; got {sizes[name]:,}"
                )
        if self.queries_last and sizes[QUERIES] > sizes[TOKENS]:
            raise ValueError(
                f"queries must be the last of the tokens; got {sizes[QUERIES]:,} queries of {sizes[TOKENS]:,} tokens"
            )

    @property
    def code(self) -> list[int]:
        """The same check as numbers, which the first operator of the graph reads."""
        numbers = [bound for name in NAMES for bound in self.ranges.get(name, (0, 0))]
        numbers.append(int(self.queries_last))
        for expected in self.inputs:
            numbers += [DTYPES.index(expected.dtype), int(expected.contiguous), len(expected.shape)]
            numbers += [
                -1 - NAMES.index(size) if isinstance(size, str) else size for size in expected.shape
            ]
        return numbers

    def laid_out(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The inputs, copied where generated code reads them and they lie in another order."""
        return [
            x.contiguous() if expected.contiguous else x
            for x, expected in zip(inputs, self.inputs, strict=True)
        ]

    def lines(self) -> list[str]:
        """What a user reads of it."""
        lines = [f"input {number}: {x}" for number, x in enumerate(self.inputs)]
        lines += [f"{name}: {least:,} to {most:,}" for name, (least, most) in self.ranges.items()]
        return lines + [f"attention {number}: {text}" for number, text in enumerate(self.attention)]


def shown(shape: Sequence[int | str] | torch.Size) -> str:
    """A shape as Python writes a tuple, with bare names."""
    return f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"
