"""Captured tensors and numbers in a trace, at torch's function layer.

At this layer, above the recorder's dispatch layer, x.item(), float(x), table[i] and
clamp(x, 0, y) are still one call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from .draft import Draft
from .pairs import gathered, has_scalar_tensor

# float(x) and int(x) of a symbolic number, as torch.compile writes them.
_CONVERSIONS = {torch.sym_float: torch.float64, torch.sym_int: torch.int64}
# Tensors of literals. On the device of an index, "meta" in a trace, their values would be lost.
_FROM_LITERALS = frozenset((torch.tensor, torch.as_tensor, torch.asarray))
_READS = ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "numpy")
_READS_A_NUMBER = frozenset(getattr(Tensor, name) for name in _READS)
_READS_A_SIZE = frozenset(
    (Tensor.shape.__get__, Tensor.size, Tensor.numel, Tensor.__len__)  # type: ignore[attr-defined]
)
_CLAMPS = frozenset((torch.clamp, Tensor.clamp, torch.clip, Tensor.clip))


class Captures(TorchFunctionMode):
    """Replaces captured tensors by tensors without data, the operands of the graph."""

    def __init__(self, draft: Draft) -> None:
        super().__init__()
        self.draft = draft

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        draft = self.draft
        # 1. Calls on a captured tensor itself: its value now, or its size.
        if func in _READS_A_NUMBER and not draft.is_traced(args[0]):
            if _has_value(args[0]):
                with _disable_current_modes():
                    return func(*args, **kwargs)
            if func is Tensor.item:  # without a value in an outer graph: an operand
                return draft.number(draft.placeholder(args[0]).detach())
        if func in _FROM_LITERALS and torch.device(kwargs.get("device") or "cpu").type == "meta":
            kwargs = kwargs | {"device": "cpu"}
        if func in _READS_A_SIZE and _has_symbolic_size(args[0]):
            return func(*args, **kwargs)  # the placeholder has the size of this trace only
        # 2. All other calls, on placeholders.
        return self._call(func, draft.placeholders(args), draft.placeholders(kwargs))

    def _call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Call a function on traced tensors, in a form that torch accepts."""
        if func in _CONVERSIONS and isinstance(args[0], Tensor):
            return self.draft.number(args[0].to(_CONVERSIONS[func]))
        if func in _CLAMPS and _has_tensor((*args[1:], *kwargs.values())):
            return _clamp(*args, **kwargs)
        if func is Tensor.__getitem__ and has_scalar_tensor(args[1]):
            return gathered(args[0], args[1])
        return func(*args, **kwargs)


def _has_value(x: Any) -> bool:
    """Whether a captured object is a tensor with data."""
    return type(x) in (Tensor, torch.nn.Parameter) and x.device.type != "meta"


def _has_symbolic_size(x: Tensor) -> bool:
    return any(isinstance(size, torch.SymInt) for size in x.shape)


def _has_tensor(values: tuple[Any, ...]) -> bool:
    return any(isinstance(value, Tensor) for value in values)


def _clamp(x: Tensor, min: Any = None, max: Any = None) -> Tensor:
    """torch.clamp between a tensor and a number, which torch refuses."""
    if min is not None:
        x = torch.maximum(x, _bound(min, x))
    if max is not None:
        x = torch.minimum(x, _bound(max, x))
    return x


def _bound(bound: Any, x: Tensor) -> Tensor:
    """A bound of clamp as a tensor of the dtype of x."""
    if isinstance(bound, Tensor):
        return bound.to(x.dtype)
    return torch.full((), bound, dtype=x.dtype, device=x.device)
