"""Calls in graphs as primitives: a reader for each, and the table of readers.

Dynamo records built-in functions, operators and methods, torch.export aten operators. A reader has
the signature of what it reads without the options that no primitive has: a call that does not bind
is not read.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional as F

aten = torch.ops.aten
_LINEARS = (F.linear, aten.linear.default)
_SPLITS = (
    *("chunk", "split", torch.chunk, torch.split, torch.functional.split),
    *(aten.chunk.default, aten.split.Tensor),
)


@dataclass(frozen=True)
class Read:
    """A node as a primitive.

    primitive: its name, or "" if the value is the operand's (dropout in inference) or parts of it
        (chunk)
    operands: nodes, numbers and None
    """

    primitive: str
    operands: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)


Reader = Callable[..., Read | None]


def bound(reader: Reader, node: Node) -> Read | None:
    """Read a call with a reader; None if it does not bind, or is refused."""
    try:
        call = inspect.signature(reader).bind(*node.args, **node.kwargs)
    except TypeError:
        return None
    return reader(*call.args, **call.kwargs)


def example_value(node: Node) -> Any:
    """The traced value of a node in a Dynamo or an aten graph, or None."""
    return node.meta.get("example_value", node.meta.get("val"))


# Products.


def _linear(input: Node, weight: Node, bias: Node | None = None) -> Read:
    return Read("linear", (input, weight, bias))


# Activations.


def _gelu(input: Node, *, approximate: str = "none") -> Read:
    return Read("gelu", (input,), {"approximate": approximate})


def _in_place(name: str) -> Reader:
    """Read an activation with an inplace argument; in-place only on a linear's unshared result."""

    def reader(input: Node, inplace: bool = False) -> Read | None:
        return Read(name, (input,)) if not inplace or _is_unshared_linear(input) else None

    return reader


def _always_in_place(name: str) -> Reader:
    """Read an in-place activation, if it overwrites a linear's unshared result."""
    return lambda input: Read(name, (input,)) if _is_unshared_linear(input) else None


def _is_unshared_linear(node: Node) -> bool:
    """Whether a node is a linear with one user: an activation may overwrite its result."""
    return node.target in _LINEARS and len(node.users) == 1


def _unary(name: str) -> Reader:
    return lambda input: Read(name, (input,))


# Norms.


def _layer_norm(
    input: Node,
    normalized_shape: Sequence[Any],
    weight: Node | None = None,
    bias: Node | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Read | None:
    if len(normalized_shape) != 1 or not _is_number(eps):
        return None
    return Read("layer_norm", (input, weight, bias), {"eps": eps})


def _rms_norm(
    input: Node,
    normalized_shape: Sequence[Any],
    weight: Node | None = None,
    eps: float | None = None,
) -> Read | None:
    if len(normalized_shape) != 1 or not (eps is None or _is_number(eps)):
        return None
    return Read("rms_norm", (input, weight), {"eps": eps})


# Arithmetic.


def _binary(name: str) -> Reader:
    def reader(input: Any, other: Any) -> Read | None:
        if _is_number(input):  # primitives take a number as their last operand
            return Read(name, (other, input)) if name in ("add", "mul") else None
        return Read(name, (input, other))

    return reader


def _pow(input: Node, exponent: Any) -> Read | None:
    return Read("pow", (input,), {"exponent": exponent}) if _is_number(exponent) else None


def _square(input: Node) -> Read:
    return Read("pow", (input,), {"exponent": 2})


def _mean(input: Node, dim: Any, keepdim: bool = False) -> Read | None:
    return Read("mean", (input,)) if _is_last(input, dim) and keepdim else None


# Copies and casts. Dropout in inference is its operand.


def _contiguous(input: Node) -> Read:
    return Read("", (input,))


def _to(input: Node, dtype: Any) -> Read | None:
    if not isinstance(dtype, torch.dtype):
        return None
    return Read("to", (input,), {"dtype": str(dtype).removeprefix("torch.")})


def _float(input: Node) -> Read:
    return Read("to", (input,), {"dtype": "float32"})


def _dropout(
    input: Node, p: Any = 0.5, training: bool = True, inplace: bool = False
) -> Read | None:
    return Read("", (input,)) if training is False else None


# Parts of the features.


def _parts(input: Node, size: Any, dim: int = 0) -> Read | None:
    return Read("", (input,)) if _is_last(input, dim) else None


def _part(parts: Node, index: Any) -> Read | None:
    """Read one of the parts of a chunk or split, or x[..., start:stop]."""
    if isinstance(index, tuple):
        return _slice(parts, index)
    if not isinstance(index, int) or parts.target not in _SPLITS:
        return None
    split, pieces = bound(_parts, parts), example_value(parts)
    if split is None or not isinstance(pieces, (list, tuple)):
        return None
    lengths = [piece.shape[-1] for piece in pieces]
    index %= len(lengths)
    if not all(isinstance(length, int) for length in lengths):
        return None
    return Read("narrow", split.operands, {"start": sum(lengths[:index]), "length": lengths[index]})


def _slice(input: Node, index: tuple[Any, ...]) -> Read | None:
    """Read x[..., start:stop], the bounds numbers."""
    value = example_value(input)
    if len(index) != 2 or index[0] is not ... or not isinstance(index[1], slice):
        return None
    last = index[1]
    if not isinstance(value, Tensor) or not isinstance(value.shape[-1], int):
        return None
    is_static = isinstance(last.start, int | None) and isinstance(last.stop, int | None)
    if not is_static or last.step not in (None, 1):
        return None
    start, stop, _ = last.indices(value.shape[-1])
    if stop <= start:
        return None
    return Read("narrow", (input,), {"start": start, "length": stop - start})


def _cat(tensors: Sequence[Node], dim: int = 0) -> Read | None:
    return Read("cat", tuple(tensors)) if _is_last(tensors[0], dim) else None


# Reductions.


def _logsumexp(input: Node, dim: Any, keepdim: bool = False) -> Read | None:
    return Read("logsumexp", (input,), {"keepdim": keepdim}) if _is_last(input, dim) else None


def _argmax(input: Node, dim: Any, keepdim: bool = False) -> Read | None:
    return Read("argmax", (input,), {"keepdim": keepdim}) if _is_last(input, dim) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_last(node: Node, dim: Any) -> bool:
    """Whether a dim argument is the last dim of a node's value."""
    value = example_value(node)
    (dim,) = dim if isinstance(dim, (list, tuple)) and len(dim) == 1 else (dim,)
    return isinstance(value, Tensor) and dim in (-1, value.ndim - 1)


# Each reader with what graphs call: functions, operators and operators' packets, methods by name.
_TABLE: tuple[tuple[Reader, tuple[Any, ...]], ...] = (
    (_linear, _LINEARS),
    (_gelu, (F.gelu, aten.gelu.default)),
    (_in_place("relu"), (F.relu,)),
    (_in_place("silu"), (F.silu,)),
    (_always_in_place("relu"), (torch.relu_, aten.relu_.default, "relu_")),
    (_always_in_place("silu"), (aten.silu_.default,)),
    (_unary("relu"), (torch.relu, aten.relu, aten.relu.default, "relu")),
    (_unary("silu"), (aten.silu.default,)),
    (_unary("sigmoid"), (torch.sigmoid, F.sigmoid, aten.sigmoid.default, "sigmoid")),
    (_unary("tanh"), (torch.tanh, F.tanh, aten.tanh.default, "tanh")),
    (_unary("rsqrt"), (torch.rsqrt, aten.rsqrt, aten.rsqrt.default, "rsqrt")),
    (_unary("neg"), (torch.neg, operator.neg, aten.neg.default, "neg")),
    (_layer_norm, (F.layer_norm, aten.layer_norm.default)),
    (_rms_norm, (F.rms_norm, torch.rms_norm, aten.rms_norm.default)),
    (_binary("add"), (torch.add, operator.add, aten.add.Tensor, "add")),
    (_binary("sub"), (torch.sub, operator.sub, aten.sub.Tensor, "sub")),
    (_binary("mul"), (torch.mul, operator.mul, aten.mul.Tensor, "mul")),
    (_binary("div"), (torch.div, operator.truediv, aten.div.Tensor, "div")),
    (_pow, (torch.pow, operator.pow, aten.pow.Tensor_Scalar, "pow")),
    (_square, (torch.square, aten.square.default, "square")),
    (_mean, (torch.mean, aten.mean.dim, "mean")),
    (_contiguous, ("contiguous", aten.contiguous.default)),
    (_to, (aten.to.dtype, "to")),
    (_float, ("float",)),
    (_dropout, (F.dropout, torch.dropout, aten.dropout.default)),
    (_parts, _SPLITS),
    (_part, (operator.getitem,)),
    (_cat, (torch.cat, aten.cat.default)),
    (_logsumexp, (torch.logsumexp, aten.logsumexp.default, "logsumexp")),
    (_argmax, (torch.argmax, aten.argmax.default, "argmax")),
)
READERS: dict[Any, Reader] = {target: reader for reader, targets in _TABLE for target in targets}
