"""ATen's operators that make tensors of numbers: full, ones, zeros, arange."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .expressions import register_of
from .tensors import Cells, Index, Tensors, cells


def _constant(t: Tensors, out: torch.Tensor, value: Any) -> Cells:
    def at(_: tuple[Index, ...]) -> int:
        if out.dtype.is_floating_point:
            number = t.x.constant(float(value), register_of(out.dtype))
            return t.x.rounded(number, out.dtype)
        if out.dtype == torch.bool:
            return t.x.constant(value, register_of(out.dtype))
        return t.x.whole(int(value))

    return cells(out.dtype, out.shape, at)


def _full(t: Tensors, out: torch.Tensor, size: Any, value: Any, **_: Any) -> Cells:
    if isinstance(value, Cells):
        return cells(out.dtype, out.shape, lambda _: t.converted(value, (), out.dtype))
    return _constant(t, out, value)


def _new_full(t: Tensors, out: torch.Tensor, x: Cells, size: Any, value: Any, **_: Any) -> Cells:
    return _full(t, out, size, value)


def _scalar_tensor(t: Tensors, out: torch.Tensor, value: Any, **_: Any) -> Cells:
    return _full(t, out, (), value)


def _ones(t: Tensors, out: torch.Tensor, *_: Any, **__: Any) -> Cells:
    return _constant(t, out, 1)


def _zeros(t: Tensors, out: torch.Tensor, *_: Any, **__: Any) -> Cells:
    return _constant(t, out, 0)


def _arange(
    t: Tensors,
    out: torch.Tensor,
    start: float,
    end: float,
    step: float = 1,
    **_: Any,
) -> Cells:
    (size,) = out.shape

    def number(position: int) -> int:
        return t.x.constant(start + step * position, register_of(out.dtype))

    def at(index: tuple[Index, ...]) -> int:
        if out.dtype.is_floating_point:
            return t.choose(index[0], size, number)
        return t.node(t.strided(index[0], size, int(start), int(step)))

    return cells(out.dtype, out.shape, at)


CONSTANTS: dict[str, Callable[..., Cells]] = {
    "full": _full,
    "full_like": _full,
    "new_full": _new_full,
    "scalar_tensor": _scalar_tensor,
    "ones": _ones,
    "ones_like": _ones,
    "new_ones": _ones,
    "zeros": _zeros,
    "zeros_like": _zeros,
    "new_zeros": _zeros,
    "arange": _arange,
}
