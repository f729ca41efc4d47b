"""Traced values of graph nodes, and their sizes as numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree


def value_of(node: Node) -> Any:
    """The traced value of a node in an aten graph.

    Fake tensors, symbols, numbers, or lists of them; None for a node that returns nothing.

    Raises ValueError if it was not traced.
    """
    if node.op == "get_attr":
        return node.meta.get("val", attribute(node))
    if "val" in node.meta:
        return node.meta["val"]
    if isinstance(node.target, torch._ops.OpOverload) and not node.target._schema.returns:
        return None
    raise ValueError(
        f'{node.name} ({node.op} {node.target}) has no meta["val"], so its size is unknown. Trace '
        "with torch.export or make_fx, or run torch.fx.passes.fake_tensor_prop.FakeTensorProp on "
        "the graph"
    )


def number_of(size: int | SymInt, node: Node, sizes: Mapping[str, int]) -> int:
    """A size as a number.

    sizes: values of symbols by name; others have the hints of the trace
    node: the node that has the size, for the error
    """
    if isinstance(size, int):
        return size
    # Sizes of the call first, then the hints of the trace.
    symbolic = size.node
    values = {symbol: sizes.get(str(symbol)) for symbol in symbolic.expr.free_symbols}
    for symbol, value in values.items():
        if value is not None:
            continue
        hint = symbolic.shape_env.backed_var_to_val.get(symbol)
        if hint is None:
            raise ValueError(
                f"{node.name} takes {symbolic.expr} bytes, and nothing says what {symbol} is. "
                f"Pass sizes={{{str(symbol)!r}: ...}}"
            )
        values[symbol] = int(hint)
    return int(symbolic.expr.subs(values).doit())


def attribute(node: Node) -> Any:
    """The value that a get_attr node reads from its graph's module."""
    value: Any = node.graph.owning_module
    for name in str(node.target).split("."):
        if not hasattr(value, name):
            raise ValueError(
                f"{node.name} reads {node.target!r}, which the graph's module does not have. "
                "Pass the GraphModule itself"
            )
        value = getattr(value, name)
    return value


def symbols_of(node: Node) -> set[Any]:
    """The symbols of the sizes of a node's value."""
    # Imports sympy, which a graph with symbols has imported already.
    from torch.fx.experimental.symbolic_shapes import free_symbols

    symbols = set[Any]()
    for leaf in pytree.tree_leaves(node.meta.get("val")):
        if isinstance(leaf, Tensor | SymInt):
            symbols.update(free_symbols(leaf))
    return symbols
