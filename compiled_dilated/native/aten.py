"""ATen's operators over tensors of expressions: their table and call.

pointwise.py     arithmetic, comparisons, activations, entry by entry
views.py         transpose, slice, cat, table[i]
constants.py     full, ones, zeros, arange
reductions.py    sum, amax, norm, mm
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .cells import Argument, Cell
from .constants import CONSTANTS
from .expressions import Untranslatable
from .pointwise import POINTWISE
from .reductions import REDUCTIONS
from .tensors import Cells, Index, Tensors, broadcast_entry, cells
from .views import VIEWS

OPERATORS: dict[str, Callable[..., Cells]] = {**VIEWS, **CONSTANTS, **REDUCTIONS}


def call(t: Tensors, op: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Cells:
    """The result of one operator.

    args, kwargs: its arguments, a `Cells` for a tensor.

    Raises Untranslatable for an operator that tapes lack.
    """
    name = str(op._schema.name).removeprefix("aten::")
    # The operator itself, on tensors without data, decides dtype and shape.
    out = op(*_metas(args), **_metas(kwargs))
    if out.dtype.is_complex:
        raise Untranslatable(f"{op} gives complex numbers")
    if name in POINTWISE:
        return _pointwise(t, name, op, out, args, kwargs)
    if name not in OPERATORS:
        raise Untranslatable(f"the tape has no {op}")
    return OPERATORS[name](t, out, *args, **kwargs)


def _pointwise(
    t: Tensors,
    name: str,
    op: Any,
    out: torch.Tensor,
    args: Sequence[Any],
    kwargs: dict[str, Any],
) -> Cells:
    """The result of an entrywise operator, whose arguments broadcast."""
    compute = _promoted_dtype(args) if out.dtype == torch.bool else out.dtype

    def at(index: tuple[Index, ...]) -> int:
        arguments = [_argument(arg, index) for arg in args]
        cell = Cell(t.x, op, out.dtype, compute)
        return cell.result(POINTWISE[name](cell, *arguments, **kwargs))

    return cells(out.dtype, out.shape, at)


def _argument(arg: Any, index: tuple[Index, ...]) -> Argument:
    """One entry of an argument: its node and dtype, or the literal."""
    if not isinstance(arg, Cells):
        return arg
    return broadcast_entry(arg, index), arg.dtype


def _promoted_dtype(args: Sequence[Any]) -> torch.dtype:
    """The dtype in which torch compares the arguments."""
    numbers: list[Any] = [_metas(arg) for arg in args if isinstance(arg, Cells | int | float)]
    if len(numbers) > 1:
        return torch.result_type(numbers[0], numbers[-1])
    dtype: torch.dtype = numbers[0].dtype
    return dtype


def _metas(value: Any) -> Any:
    """The same nest of arguments with meta tensors in place of `Cells`."""
    if isinstance(value, Cells):
        return value.meta
    if isinstance(value, (list, tuple)):
        return [_metas(item) for item in value]
    if not isinstance(value, dict):
        return value
    out = {}
    for key, item in value.items():
        out[key] = torch.device("meta") if key == "device" else _metas(item)
    return out
