"""The loss of a language model without its logits.

    logits = F.linear(x, weight)            (tokens, classes), and its gradient: in chunks only
    loss = F.cross_entropy(logits.float().view(-1, classes), target)

torch has an operator for it from 2.12 on; before, or with own=True, rows/losses.py has it.
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
from .rows.calls import example_value
from .rows.chunks import InChunks, replace
from .rows.growing import is_interrupted, order_of
from .rows.losses import OPERATOR
from .rows.readers import primitive_of, read

aten = torch.ops.aten
# Bytes of the logits of a chunk by default.
_CHUNK_BYTES = 32 * 2**20
_FLATTENING = {
    *("view", "reshape", "flatten", torch.flatten, torch.reshape),
    *(aten.view.default, aten.reshape.default, aten.flatten.using_ints),
}
_NO_OPS = {"contiguous", aten.contiguous.default}


@dataclass(frozen=True)
class LinearCrossEntropy(InChunks):
    """Replaces a linear that only a cross entropy uses.

    Between them may be casts, slices of rows and flattening.

    rows: tokens of a chunk
    chunk_bytes: instead, bytes of a chunk's logits; it has at least one token
    own: True for the operator of rows/losses.py, False for torch's, None for torch's if it has one

    torch's has no label smoothing and returns the loss in the dtype of x: with it, such losses and
    converted logits are left alone. With either, probabilities as targets and losses over more
    than (tokens, classes) are. Raises ValueError if a number is less than 1, both are given, or
    torch does not have the operator that own=False asks for.
    """

    own: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        arguments.flag("own", self.own, or_none=True)
        if self.own is False and not HAS_LINEAR_CROSS_ENTROPY:
            raise ValueError(
                f"own=False asks for torch's operator, which torch {torch.__version__} has not. "
                "Leave it out"
            )

    def __call__(self, graph: Graph) -> list[str]:
        own = self.own
        if own is None:
            own = not HAS_LINEAR_CROSS_ENTROPY
        nodes = list(graph.nodes)
        order = order_of(nodes)
        losses: list[_Loss] = []
        for node in nodes:
            loss = _loss(node)
            if loss is not None and not is_interrupted(nodes, order, loss.members):
                losses.append(loss)
        return [self._replace(graph, loss, own) for loss in losses if own or loss.torch_can]

    def _replace(self, graph: Graph, loss: _Loss, own: bool) -> str:
        classes, features = map(int, example_value(loss.weight).shape)
        # The softmax is computed in 32 bits at least.
        class_bytes = max(4, example_value(loss.x).element_size())
        rows = self.rows_of(classes * class_bytes, _CHUNK_BYTES)
        with graph.inserting_before(loss.node):
            # The slices of the logits become slices of x.
            x = loss.x
            for index in loss.slices:
                x = graph.call_function(operator.getitem, (x, index))
            x = graph.call_method("reshape", (x, -1, features))
            operands = (x, loss.weight, loss.target, loss.bias, loss.class_weight)
            target: Any = by_torch
            options: tuple[Any, ...] = (loss.reduction, loss.ignore_index)
            if own:
                target = OPERATOR
                options += (loss.label_smoothing, loss.converted)
            node = graph.call_function(target, (*operands, *options, rows))
        source = replace(graph, node, loss.members, loss.node)
        return (
            f"{loss.node.name} without its logits, {rows} tokens at a time of {classes} classes  "
            f"{source}"
        ).rstrip()


@dataclass(frozen=True)
class _Loss:
    """A cross entropy of a linear of x.

    members: the nodes to replace, in the order of the graph: the linear first, the loss last
    slices: indices of the rows of the logits, in their order
    converted: the logits are in another dtype than x
    """

    node: Node
    x: Node
    weight: Node
    bias: Node | None
    target: Node
    class_weight: Node | None
    reduction: str
    ignore_index: int
    label_smoothing: float
    members: tuple[Node, ...]
    slices: tuple[Any, ...]
    converted: bool

    @property
    def torch_can(self) -> bool:
        """Whether torch's operator can compute it."""
        return not self.converted and self.label_smoothing == 0


def _loss(node: Node) -> _Loss | None:
    """Read a node as a cross entropy of a linear.

    None if it is none that can be replaced.
    """
    options = _arguments(node)
    if options is None or not _is_supported(options):
        return None
    origin = _origin(options["input"])
    if origin is None:
        return None
    path, slices = origin
    linear = read(path[0])
    assert linear is not None
    x, weight, bias = linear.operands
    if not all(isinstance(size, int) for size in example_value(weight).shape):
        return None
    # Autocast converts operands inside the call, which the operator would not.
    if len({example_value(operand).dtype for operand in (x, weight, path[0])}) > 1:
        return None
    dtype, logits_dtype = example_value(x).dtype, example_value(options["input"]).dtype
    if logits_dtype not in (dtype, torch.promote_types(dtype, torch.float32)):
        return None
    # The classes are the last dim of every value on the path.
    widths = {example_value(value).shape[-1] for value in path if _has_static_width(value)}
    if len(widths) > 1 or not all(map(_has_static_width, path)):
        return None
    return _Loss(
        node=node,
        x=x,
        weight=weight,
        bias=bias,
        target=options["target"],
        class_weight=options["weight"],
        reduction=options["reduction"],
        ignore_index=options["ignore_index"],
        label_smoothing=options["label_smoothing"],
        members=(*path, node),
        slices=slices,
        converted=logits_dtype != dtype,
    )


def _has_static_width(node: Node) -> bool:
    return isinstance(example_value(node).shape[-1], int)


def _origin(logits: Node) -> tuple[tuple[Node, ...], tuple[Any, ...]] | None:
    """The nodes from a linear to logits, and their row slices.

    None if something else uses one of them, or one is neither a slice, a cast nor a reshape.
    """
    path, slices = [logits], list[Any]()
    while True:
        node = path[0]
        primitive = primitive_of(node)
        if node.op == "placeholder" or len(node.users) != 1:
            return None
        if primitive == "linear":
            return tuple(path), tuple(slices)
        if node.target is operator.getitem and _slices_rows(node.args[1], node.args[0]):
            slices.insert(0, node.args[1])
        elif node.target in _FLATTENING and slices:
            return None  # the slice is one of flattened rows, which x does not have
        elif node.target not in _FLATTENING | _NO_OPS and primitive != "to":
            return None
        source = node.args[0]
        assert isinstance(source, Node)
        path.insert(0, source)


def _arguments(node: Node) -> dict[str, Any] | None:
    """The arguments of a cross entropy by name; None for another call.

    By the names of F.cross_entropy.
    """

    # Functions with the signatures of torch's, for Python to bind the arguments.
    def functional(
        input: Any,
        target: Any,
        weight: Any = None,
        size_average: Any = None,
        ignore_index: Any = -100,
        reduce: Any = None,
        reduction: Any = "mean",
        label_smoothing: Any = 0.0,
    ) -> dict[str, Any]:
        return locals()

    def operator_of_aten(
        input: Any,
        target: Any,
        weight: Any = None,
        reduction: Any = 1,
        ignore_index: Any = -100,
        label_smoothing: Any = 0.0,
    ) -> dict[str, Any]:
        named = ("none", "mean", "sum")[reduction]
        return {**locals(), "reduction": named, "size_average": None, "reduce": None}

    if node.target is F.cross_entropy:
        return functional(*node.args, **node.kwargs)
    if node.target in (torch._C._nn.cross_entropy_loss, aten.cross_entropy_loss.default):
        return operator_of_aten(*node.args, **node.kwargs)
    return None


def _is_supported(options: dict[str, Any]) -> bool:
    """Whether targets are class indices (tokens,), and options are static."""
    logits, target = example_value(options["input"]), example_value(options["target"])
    if not isinstance(logits, Tensor) or not isinstance(target, Tensor):
        return False
    if logits.ndim != 2 or target.ndim != 1 or target.dtype != torch.int64:
        return False
    if options["size_average"] is not None or options["reduce"] is not None:
        return False
    is_number = isinstance(options["label_smoothing"], (int, float))
    return isinstance(options["ignore_index"], int) and is_number


def _slices_rows(index: Any, source: Any) -> bool:
    """Whether an index consists of slices, and takes the last dim whole."""
    value = example_value(source)
    if not isinstance(index, tuple) or not isinstance(value, Tensor):
        return False
    if not all(isinstance(item, slice | type(...)) for item in index):
        return False
    reaches_last_dim = ... in index or len(index) == value.ndim
    return not reaches_last_dim or index[-1] == slice(None)


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
    """Call torch's operator."""
    # Without allow_retain_graph the first backward overwrites saved tensors, unseen by the graph.
    options = torch.nn.LinearCrossEntropyOptions(
        batch_chunk_size=chunk_rows, chunking_method=None, allow_retain_graph=True
    )
    return F.linear_cross_entropy(
        x,
        weight,
        target,
        linear_bias=bias,
        weight=class_weight,
        reduction=reduction,
        ignore_index=ignore_index,
        options=options,
    )
