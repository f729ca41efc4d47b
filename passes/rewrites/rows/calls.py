"""Calls in graphs as primitives: readers, and the table of them.

Dynamo records built-in functions, operators and methods, torch.export aten operators. A reader has
the signature of what it reads without the options that no primitive has: a call that does not bind
is not read.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
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
    """Read a call with a reader; None if unbound or refused."""
    try:
        call = signature(reader).bind(*node.args, **node.kwargs)
    except TypeError:
        return None
    return reader(*call.args, **call.kwargs)


# As many as there are readers and rules in the tables, and more.
@lru_cache(maxsize=256)
def signature(function: Callable[..., Any]) -> inspect.Signature:
    """The signature of a reader or a rule; slow to find."""
    return inspect.signature(function)


def example_value(node: Any) -> Any:
    """The traced value of a node in a Dynamo or aten graph.

    None for a node without one, and for what is no node.
    """
    if not isinstance(node, Node):
        return None
    return node.meta.get("example_value", node.meta.get("val"))


# Products.


def _linear(input: Node, weight: Node, bias: Node | None = None) -> Read:
    return Read("linear", (input, weight, bias))


# Activations.


def _gelu(input: Node, *, approximate: str = "none") -> Read:
    return Read("gelu", (input,), {"approximate": approximate})


def _in_place(name: str) -> Reader:
    """Read an activation with an inplace argument.

    In-place only on a linear's unshared result.
    """

    def reader(input: Node, inplace: bool = False) -> Read | None:
        if inplace and not _is_unshared_linear(input):
            return None
        return Read(name, (input,))

    return reader


def _always_in_place(name: str) -> Reader:
    """Read an in-place activation, if it overwrites a linear's unshared result."""

    def reader(input: Node) -> Read | None:
        if not _is_unshared_linear(input):
            return None
        return Read(name, (input,))

    return reader


def _is_unshared_linear(node: Node) -> bool:
    """Whether a node is a linear with one user.

    An activation may overwrite its result.
    """
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
    # torch's names of the operands, for calls with keywords.
    def reader(input: Any, other: Any) -> Read | None:
        for operand in (input, other):
            if not isinstance(operand, Node) and not _is_number(operand):
                return None
        if isinstance(input, Node):
            return Read(name, (input, other))
        # Primitives take a number as their last operand.
        if name in ("add", "mul"):
            return Read(name, (other, input))
        return None

    return reader


def _pow(input: Node, exponent: Any) -> Read | None:
    # The derivative of x ** 0 by the rule of powers is NaN where x is 0.
    if not _is_number(exponent) or exponent == 0:
        return None
    return Read("pow", (input,), {"exponent": exponent})


def _square(input: Node) -> Read:
    return Read("pow", (input,), {"exponent": 2})


def _mean(input: Node, dim: Any, keepdim: bool = False) -> Read | None:
    if not keepdim or not _is_last(input, dim):
        return None
    return Read("mean", (input,))


# Copies and casts. Dropout in inference is its operand.


def _contiguous(input: Node) -> Read:
    return Read("", (input,))


def _to(input: Node, dtype: Any) -> Read | None:
    # No gradient flows through integers.
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        return None
    return Read("to", (input,), {"dtype": str(dtype).removeprefix("torch.")})


def _float(input: Node) -> Read:
    return Read("to", (input,), {"dtype": "float32"})


def _dropout(
    input: Node, p: Any = 0.5, training: bool = True, inplace: bool = False
) -> Read | None:
    if training is not False:
        return None
    return Read("", (input,))


# Parts of the features.


def _parts(input: Node, size: Any, dim: int = 0) -> Read | None:
    if not _is_last(input, dim):
        return None
    return Read("", (input,))


def _part(parts: Node, index: Any) -> Read | None:
    """Read a part of a chunk or split, or x[..., start:stop]."""
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
    if not _is_last(tensors[0], dim):
        return None
    return Read("cat", tuple(tensors))


# Reductions.


def _reduction(name: str) -> Reader:
    """Read a reduction over the features."""

    def reader(input: Node, dim: Any, keepdim: bool = False) -> Read | None:
        if not _is_last(input, dim):
            return None
        return Read(name, (input,), {"keepdim": keepdim})

    return reader


def _is_number(value: Any) -> bool:
    """Whether a value is a number that a recipe can state.

    Infinity and NaN have no literals.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return math.isfinite(value)


def _is_last(node: Node, dim: Any) -> bool:
    """Whether a dim argument is the last dim of a node's value."""
    value = example_value(node)
    if isinstance(dim, (list, tuple)) and len(dim) == 1:
        (dim,) = dim
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
    (_reduction("logsumexp"), (torch.logsumexp, aten.logsumexp.default, "logsumexp")),
    (_reduction("argmax"), (torch.argmax, aten.argmax.default, "argmax")),
)
READERS: dict[Any, Reader] = {}
for _reader, _targets in _TABLE:
    READERS.update(dict.fromkeys(_targets, _reader))
