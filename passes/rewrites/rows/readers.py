"""How graphs spell the primitives: built-in functions, operators and methods (Dynamo), aten operators (torch.export).

A reader has the signature of what it reads, options that it cannot say left out: a call that does not bind is not read.
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
    """A node as a primitive. primitive "": the value is its operand's (dropout in inference) or parts of it (chunk)."""

    primitive: str
    operands: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Roles:
    """The operands of a primitive, None and numbers left out. A node may be in both: F.linear(x, x).

    rows: values whose leading dims are the rows of the result. shared: what all rows are computed with.
    """

    rows: tuple[Node, ...]
    shared: tuple[Node, ...]


Reader = Callable[..., Read | None]
_READERS: dict[Any, Reader] = {}


def read(node: Node) -> Read | None:
    """What a node does as a primitive; None where it is none of them, or with options that they do not have."""
    reader = _READERS.get(node.target) if node.op in ("call_function", "call_method") else None
    if reader is None:
        return None
    try:
        bound = inspect.signature(reader).bind(*node.args, **node.kwargs)
    except TypeError:
        return None
    return reader(*bound.args, **bound.kwargs)


def primitive_of(node: Node) -> str | None:
    """The name of the primitive that a node is, "" of one that hands its operand on; None where it is none."""
    call = read(node)
    return None if call is None else call.primitive


def value_of(node: Node) -> Any:
    """What a node was traced with: a fake tensor, a number, a list; None where the graph does not say."""
    return node.meta.get("example_value", node.meta.get("val"))


def is_along_rows(primitive: str, place: int, operand: Any) -> bool:
    """Whether the operand at `place` of a primitive has the rows of its result.

    The place in the call decides, never a size: a linear's weight is shared by all rows, however many it has itself. Elementwise
    primitives align dims from the last on, so an operand of one dim lies along the features; one of more has rows.
    """
    value = value_of(operand) if isinstance(operand, Node) else None
    if not isinstance(value, Tensor) or value.ndim < 2:
        return False
    has_weights = primitive == "linear" or primitive.endswith("_norm")
    return place == 0 or not has_weights


def tensor_of(node: Node) -> Node:
    """The tensor that a number is read from (dynamic=True passes a module's floats so); other nodes themselves."""
    source = node.args[0] if node.op == "call_method" and node.target == "item" else node
    assert isinstance(source, Node)
    return source


def roles(node: Node) -> Roles | None:
    """The operands of a node by their role; None of a node that is no primitive."""
    call = read(node)
    if call is None:
        return None
    rows, shared = dict[Node, None](), dict[Node, None]()
    for place, operand in enumerate(call.operands):
        if isinstance(operand, Node):
            source = tensor_of(operand)
            (rows if is_along_rows(call.primitive, place, source) else shared)[source] = None
    return Roles(tuple(rows), tuple(shared))


def needs_gradient(node: Node) -> bool:
    """Whether a backward will come by."""
    value = value_of(node)
    return torch.is_grad_enabled() and isinstance(value, Tensor) and value.requires_grad


def _reads(*targets: Any) -> Callable[[Reader], Reader]:
    """targets: functions and operators, methods of tensors by name."""

    def register(reader: Reader) -> Reader:
        _READERS.update(dict.fromkeys(targets, reader))
        return reader

    return register


@_reads(F.linear, aten.linear.default)
def _linear(input: Node, weight: Node, bias: Node | None = None) -> Read:
    return Read("linear", (input, weight, bias))


@_reads(F.gelu, aten.gelu.default)
def _gelu(input: Node, *, approximate: str = "none") -> Read:
    return Read("gelu", (input,), {"approximate": approximate})


def _in_place(name: str) -> Reader:
    """Activations that may be asked to overwrite what they are given, which is theirs if they alone use a linear's result."""

    def reader(input: Node, inplace: bool = False) -> Read | None:
        return Read(name, (input,)) if not inplace or _owned(input) else None

    return reader


def _overwriting(name: str) -> Reader:
    return lambda input: Read(name, (input,)) if _owned(input) else None


def _owned(node: Node) -> bool:
    found = read(node)
    return found is not None and found.primitive == "linear" and len(node.users) == 1


for _name in ("relu", "silu"):
    _reads(getattr(F, _name))(_in_place(_name))
    _reads(getattr(aten, _name + "_").default)(_overwriting(_name))
_reads(torch.relu_, "relu_")(_overwriting("relu"))


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


@_reads(F.layer_norm, aten.layer_norm.default)
def _layer_norm(
    input: Node,
    normalized_shape: Sequence[Any],
    weight: Node | None = None,
    bias: Node | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Read | None:
    return Read("layer_norm", (input, weight, bias), {"eps": eps}) if len(normalized_shape) == 1 and _number(eps) else None


@_reads(F.rms_norm, torch.rms_norm, aten.rms_norm.default)
def _rms_norm(input: Node, normalized_shape: Sequence[Any], weight: Node | None = None, eps: float | None = None) -> Read | None:
    known = eps is None or _number(eps)
    return Read("rms_norm", (input, weight), {"eps": eps}) if len(normalized_shape) == 1 and known else None


def _binary(name: str) -> Reader:
    def reader(input: Any, other: Any) -> Read | None:
        if _number(input):  # a number stands last
            return Read(name, (other, input)) if name in ("add", "mul") else None
        return Read(name, (input, other))

    return reader


for _name in ("add", "sub", "mul", "div"):
    _targets = (getattr(torch, _name), getattr(aten, _name).Tensor, _name)
    _reads(*_targets, getattr(operator, {"div": "truediv"}.get(_name, _name)))(_binary(_name))


@_reads(torch.pow, operator.pow, aten.pow.Tensor_Scalar, "pow")
def _pow(input: Node, exponent: Any) -> Read | None:
    return Read("pow", (input,), {"exponent": exponent}) if _number(exponent) else None


@_reads(torch.square, aten.square.default, "square")
def _square(input: Node) -> Read:
    return Read("pow", (input,), {"exponent": 2})


@_reads(torch.mean, aten.mean.dim, "mean")
def _mean(input: Node, dim: Any, keepdim: bool = False) -> Read | None:
    return Read("mean", (input,)) if _is_last(input, dim) and keepdim else None


@_reads("contiguous", aten.contiguous.default)
def _contiguous(input: Node) -> Read:
    return Read("", (input,))


@_reads(aten.to.dtype, "to")
def _to(input: Node, dtype: Any) -> Read | None:
    return Read("to", (input,), {"dtype": str(dtype).removeprefix("torch.")}) if isinstance(dtype, torch.dtype) else None


@_reads("float")
def _float(input: Node) -> Read:
    return Read("to", (input,), {"dtype": "float32"})


@_reads(F.dropout, torch.dropout, aten.dropout.default)
def _dropout(input: Node, p: Any = 0.5, training: bool = True, inplace: bool = False) -> Read | None:
    return Read("", (input,)) if training is False else None


@_reads(torch.chunk, aten.chunk.default, "chunk", torch.split, torch.functional.split, aten.split.Tensor, "split")
def _parts(input: Node, size: Any, dim: int = 0) -> Read | None:
    return Read("", (input,)) if _is_last(input, dim) else None


@_reads(operator.getitem)
def _part(parts: Node, number: Any) -> Read | None:
    if isinstance(number, tuple):
        return _slice(parts, number)
    whole = read(parts) if isinstance(number, int) else None
    if whole is None or whole.primitive or not isinstance(pieces := value_of(parts), (list, tuple)):
        return None
    lengths = [each.shape[-1] for each in pieces]
    number %= len(lengths)
    if not all(isinstance(each, int) for each in lengths):
        return None
    return Read("narrow", whole.operands, {"start": sum(lengths[:number]), "length": lengths[number]})


def _slice(input: Node, index: tuple[Any, ...]) -> Read | None:
    """x[..., start:stop]."""
    value = value_of(input)
    if len(index) != 2 or index[0] is not ... or not isinstance(index[1], slice) or not isinstance(value, Tensor):
        return None
    width, bounds = value.shape[-1], (index[1].start, index[1].stop)
    if not isinstance(width, int) or index[1].step not in (None, 1) or not all(isinstance(each, int | None) for each in bounds):
        return None
    start, stop, _ = index[1].indices(width)
    return Read("narrow", (input,), {"start": start, "length": stop - start}) if stop > start else None


@_reads(torch.cat, aten.cat.default)
def _cat(tensors: Sequence[Node], dim: int = 0) -> Read | None:
    return Read("cat", tuple(tensors)) if _is_last(tensors[0], dim) else None


@_reads(torch.logsumexp, aten.logsumexp.default, "logsumexp")
def _logsumexp(input: Node, dim: Any, keepdim: bool = False) -> Read | None:
    return Read("logsumexp", (input,), {"keepdim": keepdim}) if _is_last(input, dim) else None


@_reads(torch.argmax, aten.argmax.default, "argmax")
def _argmax(input: Node, dim: Any, keepdim: bool = False) -> Read | None:
    return Read("argmax", (input,), {"keepdim": keepdim}) if _is_last(input, dim) else None


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_last(node: Node, dim: Any) -> bool:
    value = value_of(node)
    (dim,) = dim if isinstance(dim, (list, tuple)) and len(dim) == 1 else (dim,)
    return isinstance(value, Tensor) and dim in (-1, value.ndim - 1)
