"""The loss of a language model without its logits: linear and cross entropy as one, some rows at a time.

    logits = F.linear(x, weight)                                  (tokens, classes), and its gradient: never whole
    loss = F.cross_entropy(logits.float().view(-1, classes), target)

Torch has an operator for it from 2.12 on; before, and where it is asked for, it is that of rows/losses.py.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.nn import functional as F

from .. import arguments
from ..versions import HAS_LINEAR_CROSS_ENTROPY
from .rows import losses
from .rows.chunks import InChunks, put
from .rows.readers import read, value_of
from .rows.regions import mixed_up

aten = torch.ops.aten
# What the logits of a chunk take where nobody says.
_CHUNK_BYTES = 32 * 2**20
_FLATTENING = {
    *("view", "reshape", "flatten", torch.flatten, torch.reshape),
    *(aten.view.default, aten.reshape.default, aten.flatten.using_ints),
}
_SAME = {"contiguous", aten.contiguous.default}


@dataclass(frozen=True)
class LinearCrossEntropy(InChunks):
    """Rewrites a linear whose result a cross entropy alone uses, by way of casts, slices of rows and flattening.

    rows: tokens at a time. chunk_bytes: instead, as many as their logits fit in (at least one). own: True for the operator of
    rows/losses.py, False for torch's, None for torch's where there is one. Torch's has no label smoothing and gives the loss in
    the dtype of x, so with it such losses, and logits that are converted first, are left alone; with either, probabilities as
    targets and losses over more than (tokens, classes) are.
    Raises ValueError where a number is less than 1, where both are given, and where torch's is asked for and there is none.
    """

    own: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        arguments.flag("own", self.own, or_none=True)
        if self.own is False and not HAS_LINEAR_CROSS_ENTROPY:
            raise ValueError(f"own=False asks for torch's operator, which torch {torch.__version__} has not. Leave it out")

    def __call__(self, graph: Graph) -> list[str]:
        own = not HAS_LINEAR_CROSS_ENTROPY if self.own is None else self.own
        nodes = list(graph.nodes)
        found = [loss for node in nodes if (loss := _loss(node)) is not None and not mixed_up(nodes, loss.made[::-1])]
        return [self._replace(graph, loss, own) for loss in found if own or loss.torch_can]

    def _replace(self, graph: Graph, loss: _Loss, own: bool) -> str:
        classes, features = (int(size) for size in value_of(loss.weight).shape)
        size = max(4, value_of(loss.x).element_size())  # softmax is taken in 32 bits at least
        rows = self.rows_of(classes * size, _CHUNK_BYTES)
        with graph.inserting_before(loss.node):
            x = loss.x
            for index in loss.slices:
                x = graph.call_function(operator.getitem, (x, index))
            x = graph.call_method("reshape", (x, -1, features))
            options = (loss.reduction, loss.ignore_index, *((loss.label_smoothing, loss.converted) if own else ()), rows)
            target = losses.OPERATOR if own else by_torch
            node = graph.call_function(target, (x, loss.weight, loss.target, loss.bias, loss.class_weight, *options))
        source = put(graph, node, loss.made[::-1], loss.node)
        return f"{loss.node.name} without its logits, {rows} tokens at a time of {classes} classes  {source}".rstrip()


@dataclass(frozen=True)
class _Loss:
    """A cross entropy of a linear of x. made: the nodes that nobody else needs, the loss first. slices: of x's rows."""

    node: Node
    x: Node
    weight: Node
    bias: Node | None
    target: Node
    class_weight: Node | None
    reduction: str
    ignore_index: int
    label_smoothing: float
    made: tuple[Node, ...]
    slices: tuple[Any, ...]
    converted: bool

    @property
    def torch_can(self) -> bool:
        return not self.converted and self.label_smoothing == 0


def _loss(node: Node) -> _Loss | None:
    call = _call(node)
    if call is None or not _is_plain(call) or (origin := _origin(call["input"])) is None:
        return None
    made, slices = origin
    found = read(made[-1])
    assert found is not None
    x, weight, bias = found.operands
    given, converted = value_of(x).dtype, value_of(call["input"]).dtype
    by_autocast = len({value_of(each).dtype for each in (x, weight, made[-1])}) > 1
    classes = {value_of(each).shape[-1] if isinstance(value_of(each).shape[-1], int) else None for each in made}
    as_wide = converted in (given, torch.promote_types(given, torch.float32))
    if by_autocast or not as_wide or len(classes) > 1 or not all(isinstance(size, int) for size in value_of(weight).shape):
        return None
    options = (call["target"], call["weight"], call["reduction"], call["ignore_index"], call["label_smoothing"])
    return _Loss(node, x, weight, bias, *options, (node, *made), slices, converted != given)


def _origin(logits: Node) -> tuple[tuple[Node, ...], tuple[Any, ...]] | None:
    """The nodes from logits back to their linear, used by nothing else; and the slices among them, the linear's first."""
    made, slices = [logits], list[Any]()
    while True:
        node = made[-1]
        found = read(node)
        if node.op == "placeholder" or len(node.users) != 1:
            return None
        if found is not None and found.primitive == "linear":
            return tuple(made), tuple(slices)
        if node.target is operator.getitem and _keeps_classes(node.args[1], node.args[0]):
            slices.insert(0, node.args[1])
        elif node.target in _FLATTENING and slices:
            return None  # then the slice is one of flattened rows
        elif node.target not in _FLATTENING | _SAME and (found is None or found.primitive != "to"):
            return None
        source = node.args[0]
        assert isinstance(source, Node)
        made.append(source)


def _call(node: Node) -> dict[str, Any] | None:
    """The arguments of a cross entropy by their names."""

    def functional(
        input: Any, target: Any, weight: Any = None, size_average: Any = None, ignore_index: Any = -100, reduce: Any = None,
        reduction: Any = "mean", label_smoothing: Any = 0.0,
    ) -> dict[str, Any]:  # fmt: skip
        return locals()

    def operator_of_aten(
        input: Any, target: Any, weight: Any = None, reduction: Any = 1, ignore_index: Any = -100, label_smoothing: Any = 0.0
    ) -> dict[str, Any]:
        return {**locals(), "reduction": ("none", "mean", "sum")[reduction], "size_average": None, "reduce": None}

    if node.target is F.cross_entropy:
        return functional(*node.args, **node.kwargs)
    if node.target in (torch._C._nn.cross_entropy_loss, aten.cross_entropy_loss.default):
        return operator_of_aten(*node.args, **node.kwargs)
    return None


def _is_plain(call: dict[str, Any]) -> bool:
    """Class indices for (tokens, classes), and settings that are known."""
    logits, target = value_of(call["input"]), value_of(call["target"])
    known = call["size_average"] is None and call["reduce"] is None and isinstance(call["ignore_index"], int)
    tensors = isinstance(logits, Tensor) and isinstance(target, Tensor) and logits.ndim == 2 and target.ndim == 1
    return known and tensors and target.dtype == torch.int64 and isinstance(call["label_smoothing"], (int, float))


def _keeps_classes(index: Any, source: Any) -> bool:
    """Whether an index is one of slices, the last dim whole."""
    value = value_of(source) if isinstance(source, Node) else None
    if (
        not isinstance(index, tuple)
        or not isinstance(value, Tensor)
        or not all(isinstance(each, slice | type(...)) for each in index)
    ):
        return False
    to_the_end = ... in index or len(index) == value.ndim
    return index[-1] == slice(None) if to_the_end else True


def by_torch(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    chunk_rows: int,
) -> Tensor:
    """Torch's operator. Its first backward must not consume what it keeps: a compiled graph would not see that."""
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk_rows, chunking_method=None, allow_retain_graph=True)
    return F.linear_cross_entropy(
        x, weight, target, linear_bias=bias, weight=class_weight, reduction=reduction, ignore_index=ignore_index, options=options
    )
