"""Checks of tensors, data and scales, shared by all entry points.

One check and one message per mistake.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from . import arguments
from .tracing import is_traced

DTYPES = frozenset(getattr(torch, name) for name in arguments.BYTES)
_LARGEST = sys.float_info.max
_PACKAGES = ("compiled_dilated", "torch.")


@dataclass(frozen=True)
class Layout:
    """Tensor layout of an entry point.

    axes: dimensions of batch, heads, tokens and head_dim.
    """

    names: tuple[str, str, str] = ("q", "k", "v")
    shape: str = "(batch, heads, tokens, head_dim)"
    axes: tuple[int, int, int, int] = (0, 1, 2, 3)
    hint: str = "Add the missing dimensions"


HEADS_FIRST = Layout()
TOKENS_FIRST = Layout(
    ("query", "key", "value"),
    "(batch, tokens, heads, head_dim)",
    (0, 2, 1, 3),
    "Modules take tokens before heads; split the last dimension with unflatten",
)


def tensors(q: Any, k: Any, v: Any, layout: Layout = HEADS_FIRST) -> None:
    """Raise unless q, k and v agree in type, shape, dtype, device."""
    for name, x in zip(layout.names, (q, k, v), strict=True):
        tensor(name, x, layout)
    dtypes(q.dtype, k.dtype, v.dtype, layout)
    devices(q, k, v, layout)
    shapes(q.shape, k.shape, v.shape, layout)


def devices(q: Tensor, k: Tensor, v: Tensor, layout: Layout = HEADS_FIRST) -> None:
    """Raise unless all three are on one device."""
    of_q, of_k, of_v = layout.names
    for name, x in ((of_k, k), (of_v, v)):
        if x.device != q.device:
            raise ValueError(
                f"{of_q}, {of_k} and {of_v} must be on one device; "
                f"got {of_q} on {q.device} and {name} on {x.device}. "
                f"Move it with {name}.to({of_q}.device)"
            )


def tensor(name: str, x: Any, layout: Layout = HEADS_FIRST) -> None:
    """Raise unless x is a dense 4-D tensor of a supported dtype."""
    if not isinstance(x, Tensor):
        kind = type(x).__name__
        raise TypeError(
            f"{name} must be a torch.Tensor; got {kind}. Convert it with torch.as_tensor"
        )
    if x.layout != torch.strided or x.is_nested:
        kind = "nested" if x.is_nested else str(x.layout)
        raise TypeError(
            f"{name} must be a dense tensor; got a {kind} one. "
            "Pad it, or concatenate it with masks.documents(...)"
        )
    if x.dim() != 4:
        raise ValueError(
            f"{name} must be {layout.shape}; got shape {tuple(x.shape)}. {layout.hint}"
        )
    dtype(name, x.dtype)


def dtypes(q: torch.dtype, k: torch.dtype, v: torch.dtype, layout: Layout = HEADS_FIRST) -> None:
    """Raise unless all three are one dtype."""
    of_q, of_k, of_v = layout.names
    for name, value in ((of_k, k), (of_v, v)):
        if value != q:
            raise TypeError(
                f"{of_q}, {of_k} and {of_v} must have one dtype; "
                f"got {of_q} {q} and {name} {value}. "
                f"Cast with {name}.to({of_q}.dtype)"
            )


def shapes(
    q: Sequence[int], k: Sequence[int], v: Sequence[int], layout: Layout = HEADS_FIRST
) -> None:
    """Raise unless the shapes of q, k and v fit together."""
    of_q, of_k, of_v = layout.names
    batch, heads, tokens, width = layout.axes
    if any(k[axis] != v[axis] for axis in (batch, heads, tokens)):
        raise ValueError(
            f"{of_k} and {of_v} must agree in batch, heads and tokens; "
            f"got {of_k} {tuple(k)} and {of_v} {tuple(v)}"
        )
    if q[batch] != k[batch]:
        raise ValueError(
            f"{of_q} and {of_k} must have one batch size; "
            f"got {of_q} {tuple(q)} and {of_k} {tuple(k)}. Expand the smaller one"
        )
    if q[width] != k[width]:
        raise ValueError(
            f"{of_q} and {of_k} must have one head_dim; got {of_q} {tuple(q)} and {of_k} {tuple(k)}"
        )
    if q[width] == 0:
        raise ValueError(f"{of_q} and {of_k} must have a head_dim of 1 at least; got 0")
    if v[width] == 0:
        raise ValueError(f"{of_v} must have a head_dim of 1 at least; got 0")
    groups(q[heads], k[heads])


def warn_of_swapped_axes(q: Tensor, layout: Layout = HEADS_FIRST) -> None:
    """Warn if far more heads than tokens suggest swapped axes."""
    heads, tokens = q.shape[layout.axes[1]], q.shape[layout.axes[2]]
    if is_traced() or not (heads > 256 and tokens > 1 and heads >= 32 * tokens):
        return
    alternative = "compiled_dilated.DilatedAttention takes (batch, tokens, heads, head_dim)"
    if layout is TOKENS_FIRST:
        alternative = "compiled_dilated.compile(program) takes (batch, heads, tokens, head_dim)"
    warnings.warn(
        f"{layout.names[0]} is {layout.shape}, so {tuple(q.shape)} has {heads} heads of {tokens} "
        f"tokens. If these are {heads} tokens, transpose with .transpose(1, 2); {alternative}",
        stacklevel=_level_of_caller(),
    )


def _level_of_caller() -> int:
    """The `stacklevel` of the caller of this package, for a warning."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and str(frame.f_globals.get("__name__")).startswith(_PACKAGES):
        level, frame = level + 1, frame.f_back
    return level


def dtype(name: str, value: object) -> None:
    """Raise unless attention is computed in this dtype."""
    if value not in DTYPES:
        raise TypeError(
            f"{name} must be float16, bfloat16, float32 or float64; got {value}. Cast it first"
        )


def groups(heads: int, kv_heads: int) -> None:
    """Raise unless query heads are a multiple of key heads."""
    if (kv_heads == 0 and heads != 0) or (kv_heads != 0 and heads % kv_heads):
        raise ValueError(
            f"the {heads} query heads must be a multiple of the {kv_heads} key heads, "
            "so that they share evenly. Change kv_heads, or the heads of k and v"
        )


def scale(name: str, value: object) -> None:
    """Raise unless a scale is a finite number or a scalar tensor."""
    if isinstance(value, Tensor):
        if value.dim() != 0 or not value.dtype.is_floating_point:
            raise ValueError(
                f"{name} must be a finite number or a tensor of one; "
                f"got shape {tuple(value.shape)} of {value.dtype}. "
                "A scale for each head is a score_mod"
            )
        return
    if isinstance(value, torch.SymFloat | torch.SymInt):
        return
    number(name, value)


def number(name: str, value: object) -> None:
    """Raise unless a value is a finite number."""
    # Dynamo traces int and float only.
    if isinstance(value, bool) or not (
        isinstance(value, int | float) or (not is_traced() and isinstance(value, Real))
    ):
        raise TypeError(
            f"{name} must be a finite number; got {arguments.kind_and_text(value)}. "
            "Leave it out for 1 / sqrt(head_dim)"
        )
    # Compared, not math.isfinite: a number that varies may come while torch.compile traces.
    comparable = value if isinstance(value, int | float) else float(value)
    if is_traced():
        is_finite = -math.inf < comparable < math.inf
    else:  # integers too large for a float are refused as well
        is_finite = -_LARGEST <= comparable <= _LARGEST
    if not is_finite:
        raise ValueError(
            f"{name} must be a finite number; got {str(value)[:40]}. "
            "Leave it out for 1 / sqrt(head_dim)"
        )


@dataclass(frozen=True)
class Shape:
    """Sizes that data tensors are checked against.

    query_tokens, key_tokens: tokens up to the last query and the last key.
    """

    batch: int
    query_tokens: int
    key_tokens: int
    device: torch.device


def by_name(values: object) -> Mapping[str, Any]:
    """The data of a call; raises TypeError unless a dict or None."""
    if values is not None and not isinstance(values, Mapping):
        raise TypeError(
            f"data must be a dict of tensors by name; got {type(values).__name__}. "
            "Pass data={name: tensor}"
        )
    return values or {}


def data_names(reads: str, names: Sequence[str], values: object) -> Mapping[str, Any]:
    """The data of a call; raises unless it has exactly these names.

    reads: what reads them, as the start of a sentence.
    """
    passed = by_name(values)
    if set(passed) != set(names):
        raise ValueError(
            f"{reads} the data tensors {list(names)}; got {sorted(map(str, passed))}. "
            "Pass data={name: tensor} with exactly those"
        )
    return passed


def data(
    names: Sequence[str],
    query_names: Sequence[str],
    values: Mapping[str, Tensor] | None,
    shape: Shape,
) -> list[Tensor]:
    """The checked data tensors, in the order of `names`.

    values: (batch or 1, tokens) by name.
    query_names: tensors that are read at query positions too.

    Raises if a tensor is missing, not read by the program, or of a wrong dtype, shape or device.
    """
    passed = data_names("the program reads", names, values)
    for name in names:
        tokens = shape.key_tokens
        if name in query_names and shape.query_tokens > tokens:
            tokens = shape.query_tokens
        _data_tensor(name, passed[name], tokens, shape)
    return [passed[name] for name in names]


def _data_tensor(name: str, x: object, tokens: int, shape: Shape) -> None:
    if not isinstance(x, Tensor) or x.dtype.is_floating_point or x.dtype.is_complex:
        came = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"data[{name!r}] must be a bool or integer tensor; got {came}")
    if x.layout != torch.strided:
        raise TypeError(
            f"data[{name!r}] must be a dense tensor; got a {x.layout} one. "
            "Convert it with .to_dense()"
        )
    if x.dim() != 2 or x.shape[0] not in (1, shape.batch) or x.shape[1] < tokens:
        raise ValueError(
            f"data[{name!r}] must be (batch or 1, tokens) with batch {shape.batch} and "
            f"at least {tokens} tokens; got shape {tuple(x.shape)}"
        )
    if x.device != shape.device:
        raise ValueError(
            f"data[{name!r}] must be on the device of q, {shape.device}; got {x.device}. "
            f"Move it with .to({str(shape.device)!r})"
        )
