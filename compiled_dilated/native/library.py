"""The native operators: schemas, shapes, and the first call.

    compiled_dilated::native -> the C++ kernel, once loaded
                             -> _first_call -> build.load -> the C++ kernel

Importing this module starts no compiler and opens no library: the first call does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..mods import sums_dtype
from ..partials import empty_out, lse_dtype
from . import build

COUNT_NUMBERS = 8  # of the work that a call executed

# src/door/door.cpp repeats the schemas for programs without Python.
_INPUTS = "Tensor q, Tensor k, Tensor v"
_TENSORS = "Tensor[]? data, Tensor[]? operands"
_PROGRAM = f"{_TENSORS}, int[] code, float scale, SymInt q_offset"
_CALL = f"({_INPUTS}, {_PROGRAM}, Tensor? offsets, bool by_token)"
SCHEMAS = {
    "native": f"{_CALL} -> (Tensor, Tensor)",
    "native_counted": f"{_CALL} -> (Tensor, Tensor, Tensor)",
    "native_backward": (
        f"(Tensor grad_out, Tensor? grad_lse, {_INPUTS}, Tensor out, Tensor lse, {_PROGRAM}, "
        "Tensor? offsets, int[] learned) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "native_merge": f"(Tensor(a!) out, Tensor(b!) lse, {_INPUTS}, {_PROGRAM}) -> ()",
    "native_counts": (
        f"({_TENSORS}, int[] code, int[] sizes, SymInt q_offset, Tensor? offsets) -> Tensor"
    ),
    "check_inputs": "(Tensor[] inputs, int[] code) -> Tensor",
}

_library = torch.library.Library("compiled_dilated", "FRAGMENT")
for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))

operators: Any = torch.ops.compiled_dilated

# Data tensors or operands of a call.
_Tensors = Sequence[Tensor] | None


# Shapes -------------------------------------------------------------------------------------


@torch.library.register_fake("compiled_dilated::native", lib=_library)
def _(
    q: Tensor, k: Tensor, v: Tensor, data: _Tensors, operands: _Tensors,
    code: Sequence[int], scale: float, q_offset: Any, offsets: Tensor | None, by_token: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return empty_out(q, v, by_token), q.new_empty(q.shape[:3], dtype=lse_dtype(q.dtype))


@torch.library.register_fake("compiled_dilated::native_counted", lib=_library)
def _(
    q: Tensor, k: Tensor, v: Tensor, data: _Tensors, operands: _Tensors,
    code: Sequence[int], scale: float, q_offset: Any, offsets: Tensor | None, by_token: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    lse = q.new_empty(q.shape[:3], dtype=lse_dtype(q.dtype))
    return empty_out(q, v, by_token), lse, q.new_empty(COUNT_NUMBERS, dtype=torch.int64)


@torch.library.register_fake("compiled_dilated::native_backward", lib=_library)
def _(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
    out: Tensor, lse: Tensor, data: _Tensors, operands: _Tensors, code: Sequence[int],
    scale: float, q_offset: Any, offsets: Tensor | None, learned: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    numbers = sum((operands or ())[number].numel() for number in learned)
    gradients = (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape))
    return *gradients, q.new_empty((numbers,), dtype=sums_dtype(operands or (), learned))


@torch.library.register_fake("compiled_dilated::native_merge", lib=_library)
def _(
    out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, data: _Tensors,
    operands: _Tensors, code: Sequence[int], scale: float, q_offset: Any,
) -> None:  # fmt: skip
    pass


@torch.library.register_fake("compiled_dilated::native_counts", lib=_library)
def _(
    data: _Tensors, operands: _Tensors, code: Sequence[int], sizes: Sequence[int],
    q_offset: Any, offsets: Tensor | None,
) -> Tensor:  # fmt: skip
    return torch.empty(COUNT_NUMBERS, dtype=torch.int64)


@torch.library.register_fake("compiled_dilated::check_inputs", lib=_library)
def _(inputs: Sequence[Tensor], code: Sequence[int]) -> Tensor:
    return torch.empty((), dtype=torch.int64)


# The first call -----------------------------------------------------------------------------


def _first_call(name: str) -> Callable[..., Any]:
    """The operator until its kernel is loaded, and for other devices."""

    def load_and_call(*arguments: Any) -> Any:
        for x in arguments:
            if isinstance(x, Tensor) and x.device.type != "cpu":
                raise NotImplementedError(
                    f"compiled_dilated::{name} computes on the CPU; got a tensor on {x.device}"
                )
        if name == "check_inputs":
            build.load_part("inputs")
        else:
            build.load()
        # Dispatches to the kernel that has just been registered.
        return getattr(torch.ops.compiled_dilated, name).default(*arguments)

    return load_and_call


# The key of lowest priority: the kernels register for CPU and BackendSelect, which precede it.
for _name in SCHEMAS:
    _library.impl(_name, _first_call(_name), "CompositeExplicitAutograd")
