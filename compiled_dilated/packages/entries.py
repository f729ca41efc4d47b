"""Entries of a package: input tensors, ranges of sizes, and their check.

The check exists twice, with the same messages: here for a package loaded by Python, and in
native/src/inputs.cpp as the first operator of the graph, for every other caller.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Varying sizes and dtypes, by the numbers that they have in native/src/inputs.cpp.
NAMES = TOKENS, BATCH, QUERIES = "tokens", "batch", "queries"
_FLOATS = ("float32", "float64", "float16", "bfloat16")
DTYPES = (*_FLOATS, "bool", "int8", "int16", "int32", "int64", "uint8")
# Devices of packages, in the words of errors.
PLACES = {"cpu": "a CPU", "cuda": "a GPU"}


def dtype_of(x: Tensor) -> str:
    """A tensor's dtype without "torch."."""
    return str(x.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Input:
    """An input tensor of an entry.

    shape: sizes, or names of ranges.
    contiguous: whether generated code reads it, assuming contiguous strides; attention alone
        takes any strides.
    """

    dtype: str
    shape: tuple[int | str, ...]
    contiguous: bool = False

    def __str__(self) -> str:
        text = f"{self.dtype} {shape_text(self.shape)}"
        if self.contiguous:
            text += ", contiguous"
        return text


@dataclass(frozen=True)
class Entry:
    """A function of a package.

    inputs: input tensors, in order.
    ranges: (least, most) of each varying size.
    attention: descriptions of its attention calls.
    queries_last: whether the queries are the last tokens of the cache.
    device: of all inputs, a key of `PLACES`.
    """

    inputs: tuple[Input, ...]
    ranges: Mapping[str, tuple[int, int]]
    attention: tuple[str, ...] = ()
    queries_last: bool = False
    device: str = "cpu"

    def check(self, inputs: Sequence[object]) -> None:
        """Raise TypeError or ValueError unless the inputs fit the entry."""
        if len(inputs) != len(self.inputs):
            raise TypeError(f"the package takes {len(self.inputs)} tensors; got {len(inputs)}")
        # Dtypes and shapes input by input; varying sizes are collected on the way.
        sizes: dict[str, int] = {}
        for number, (x, expected) in enumerate(zip(inputs, self.inputs, strict=True)):
            if not isinstance(x, Tensor):
                raise TypeError(f"input {number} must be a tensor; got {type(x).__name__}")
            if dtype_of(x) != expected.dtype or x.device.type != self.device:
                place = PLACES.get(x.device.type, "another device")
                raise TypeError(
                    f"input {number} must be {expected.dtype} on {PLACES[self.device]}; "
                    f"got {dtype_of(x)} on {place}"
                )
            if not _fits(x.shape, expected.shape, sizes):
                raise ValueError(
                    f"input {number} must have the shape {shape_text(expected.shape)}; "
                    f"got {shape_text(x.shape)}"
                )
        self._check_ranges(sizes)

    def _check_ranges(self, sizes: Mapping[str, int]) -> None:
        """Raise ValueError unless varying sizes are within their ranges."""
        for name in NAMES:
            if name not in sizes:
                continue
            least, most = self.ranges[name]
            if not least <= sizes[name] <= most:
                raise ValueError(
                    f"{name} must be from {least:,} to {most:,}, for which the package was made; "
                    f"got {sizes[name]:,}"
                )
        if self.queries_last and sizes[QUERIES] > sizes[TOKENS]:
            raise ValueError(
                f"queries must be the last of the tokens; "
                f"got {sizes[QUERIES]:,} queries of {sizes[TOKENS]:,} tokens"
            )

    @property
    def code(self) -> list[int]:
        """The check as integers, for the first operator of the graph.

        Ranges in the order of `NAMES`, queries_last, number of the device in `PLACES`, then for
        each input: dtype, contiguous, rank, sizes; a varying size as -1 - its number in `NAMES`.
        """
        numbers: list[int] = []
        for name in NAMES:
            numbers += self.ranges.get(name, (0, 0))
        numbers += [int(self.queries_last), list(PLACES).index(self.device)]
        for expected in self.inputs:
            numbers += [DTYPES.index(expected.dtype), int(expected.contiguous), len(expected.shape)]
            for size in expected.shape:
                if isinstance(size, str):
                    size = -1 - NAMES.index(size)
                numbers.append(size)
        return numbers

    def with_strides(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The inputs, contiguous where generated code reads them."""
        tensors = []
        for x, expected in zip(inputs, self.inputs, strict=True):
            if expected.contiguous:
                x = x.contiguous()
            tensors.append(x)
        return tensors

    def lines(self) -> list[str]:
        """The entry as lines of text."""
        lines = []
        for number, x in enumerate(self.inputs):
            lines.append(f"input {number}: {x}")
        for name, (least, most) in self.ranges.items():
            lines.append(f"{name}: {least:,} to {most:,}")
        for number, text in enumerate(self.attention):
            lines.append(f"attention {number}: {text}")
        return lines


def _fits(shape: torch.Size, expected: Sequence[int | str], sizes: dict[str, int]) -> bool:
    """Whether a shape is the expected one.

    sizes: varying sizes by name; those of a first input are added.
    """
    if len(shape) != len(expected):
        return False
    for size, expected_size in zip(shape, expected, strict=True):
        # All inputs agree in a varying size; the first one defines it.
        if isinstance(expected_size, str):
            expected_size = sizes.setdefault(expected_size, size)
        if size != expected_size:
            return False
    return True


def shape_text(shape: Sequence[int | str] | torch.Size) -> str:
    """A shape as Python writes a tuple, with names unquoted."""
    if len(shape) == 1:
        return f"({shape[0]},)"
    return f"({', '.join(map(str, shape))})"
