"""Readers of graph nodes as primitives.

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


@dataclass(frozen=True)
class Roles:
    """The nodes among the operands of a primitive. A node may be in both: F.linear(x, x).

    rows: values whose leading dims are the rows of the result
    shared: values that all rows are computed with
    """

    rows: tuple[Node, ...]
    shared: tuple[Node, ...]


Reader = Callable[..., Read | None]
_READERS: dict[Any, Reader] = {}


def read(node: Node) -> Read | None:
    """Read a node as a primitive; None if it is none, or has options that no primitive has."""
    reader = _READERS.get(node.target) if node.op in ("call_function", "call_method") else None
    if reader is None:
        return None
    try:
        bound = inspect.signature(reader).bind(*node.args, **node.kwargs)
    except TypeError:
        return None
    return reader(*bound.args, **bound.kwargs)


def primitive_of(node: Node) -> str | None:
    """The name of a node's primitive, "" if its value is its operand's; None if it is none."""
    call = read(node)
    return None if call is None else call.primitive


def example_value(node: Node) -> Any:
    """The traced value of a node in a Dynamo or an aten graph; None if the graph does not say."""
    return node.meta.get("example_value", node.meta.get("val"))


def is_along_rows(primitive: str, place: int, operand: Any) -> bool:
    """Whether a primitive's operand at `place` has the rows of its result.

    The place in the call decides, never a size: a linear's weight is shared by all rows, however
    many it has itself. Elementwise primitives align dims from the last on, so an operand of one dim
    has features only; one of more has rows.
    """
    value = example_value(operand) if isinstance(operand, Node) else None
    if not isinstance(value, Tensor) or value.ndim < 2:
        return False
    has_weights = primitive == "linear" or primitive.endswith("_norm")
    return place == 0 or not has_weights


def tensor_of(node: Node) -> Node:
    """The tensor that x.item() reads (a module's float with dynamic=True); else the node."""
    source = node.args[0] if node.op == "call_method" and node.target == "item" else node
    assert isinstance(source, Node)
    return source


def roles(node: Node) -> Roles | None:
    """The operands of a node by their role; None if it is no primitive."""
    call = read(node)
    if call is None:
        return None
    rows, shared = dict[Node, None](), dict[Node, None]()
    for place, operand in enumerate(call.operands):
        if not isinstance(operand, Node):
            continue
        source = tensor_of(operand)
        if is_along_rows(call.primitive, place, source):
            rows[source] = None
        else:
            shared[source] = None
    return Roles(tuple(rows), tuple(shared))


def needs_gradient(node: Node) -> bool:
    """Whether a backward will pass through a node."""
    value = example_value(node)
    return torch.is_grad_enabled() and isinstance(value, Tensor) and value.requires_grad


def _reads(*targets: Any) -> Callable[[Reader], Reader]:
    """Register a reader. targets: functions and operators, methods of tensors by name."""

    def register(reader: Reader) -> Reader:
        _READERS.update(dict.fromkeys(targets, reader))
        return reader

    return register


# Products.


@_reads(F.linear, aten.linear.default)
def _linear(input: Node, weight: Node, bias: Node | None = None) -> Read:
    return Read("linear", (input, weight, bias))


# Activations.


@_reads(F.gelu, aten.gelu.default)
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
    return primitive_of(node) == "linear" and len(node.users) == 1


for _name in ("relu", "silu"):
    _reads(getattr(F, _name))(_in_place(_name))
    _reads(getattr(aten, _name + "_").default)(_always_in_place(_name))
_reads(torch.relu_, "relu_")(_always_in_place("relu"))


def _unary(name: str) -> Reader:
    return lambda input: Read(name, (input,))


_reads(aten.silu.default)(_unary("silu"))
for _name, _function in {
    "relu": aten.relu,
    "sigmoid": F.sigmoid,
    "tanh": F.tanh,
    "rsqrt": aten.rsqrt,
    "neg": operator.neg,
}.items():
    _reads(_function, getattr(torch, _name), getattr(aten, _name).default, _name)(_unary(_name))


# Norms.


@_reads(F.layer_norm, aten.layer_norm.default)
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


@_reads(F.rms_norm, torch.rms_norm, aten.rms_norm.default)
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


for _name in ("add", "sub", "mul", "div"):
    _targets = (getattr(torch, _name), getattr(aten, _name).Tensor, _name)
    _reads(*_targets, getattr(operator, {"div": "truediv"}.get(_name, _name)))(_binary(_name))


@_reads(torch.pow, operator.pow, aten.pow.Tensor_Scalar, "pow")
def _pow(input: Node, exponent: Any) -> Read | None:
    return Read("pow", (input,), {"exponent": exponent}) if _is_number(exponent) else None


@_reads(torch.square, aten.square.default, "square")
def _square(input: Node) -> Read:
    return Read("pow", (input,), {"exponent": 2})


@_reads(torch.mean, aten.mean.dim, "mean")
def _mean(input: Node, dim: Any, keepdim: bool = False) -> Read | None:
    return Read("mean", (input,)) if _is_last(input, dim) and keepdim else None


# Copies and casts. Dropout in inference is its operand.


@_reads("contiguous", aten.contiguous.default)
def _contiguous(input: Node) -> Read:
    return Read("", (input,))


@_reads(aten.to.dtype, "to")
def _to(input: Node, dtype: Any) -> Read | None:
    if not isinstance(dtype, torch.dtype):
        return None
    return Read("to", (input,), {"dtype": str(dtype).removeprefix("torch.")})


@_reads("float")
def _float(input: Node) -> Read:
    return Read("to", (input,), {"dtype": "float32"})


@_reads(F.dropout, torch.dropout, aten.dropout.default)
def _dropout(
    input: Node, p: Any = 0.5, training: bool = True, inplace: bool = False
) -> Read | None:
    return Read("", (input,)) if training is False else None


# Parts of the features.


@_reads(
    *("chunk", "split", torch.chunk, torch.split, torch.functional.split),
    *(aten.chunk.default, aten.split.Tensor),
)
def _parts(input: Node, size: Any, dim: int = 0) -> Read | None:
    return Read("", (input,)) if _is_last(input, dim) else None


@_reads(operator.getitem)
def _part(parts: Node, index: Any) -> Read | None:
    """Read one of the parts that chunk or split makes, or x[..., start:stop]."""
    if isinstance(index, tuple):
        return _slice(parts, index)
    split = read(parts) if isinstance(index, int) else None
    pieces = example_value(parts)
    if split is None or split.primitive or not isinstance(pieces, (list, tuple)):
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


@_reads(torch.cat, aten.cat.default)
def _cat(tensors: Sequence[Node], dim: int = 0) -> Read | None:
    return Read("cat", tuple(tensors)) if _is_last(tensors[0], dim) else None


# Reductions.


@_reads(torch.logsumexp, aten.logsumexp.default, "logsumexp")
def _logsumexp(input: Node, dim: Any, keepdim: bool = False) -> Read | None:
    return Read("logsumexp", (input,), {"keepdim": keepdim}) if _is_last(input, dim) else None


@_reads(torch.argmax, aten.argmax.default, "argmax")
def _argmax(input: Node, dim: Any, keepdim: bool = False) -> Read | None:
    return Read("argmax", (input,), {"keepdim": keepdim}) if _is_last(input, dim) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_last(node: Node, dim: Any) -> bool:
    """Whether a dim argument is the last dim of a node's value."""
    value = example_value(node)
    (dim,) = dim if isinstance(dim, (list, tuple)) and len(dim) == 1 else (dim,)
    return isinstance(value, Tensor) and dim in (-1, value.ndim - 1)
