"""Memory by operators' schemas: which results are views, and of which operand."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

# These change which memory a tensor has, for every other name of it too.
_REPLACE_STORAGE = {
    *("aten::set_", "aten::resize_", "aten::resize_as_", "inductor::resize_storage_bytes_"),
}
# A view, though its schema has no alias.
_UNDECLARED_VIEWS = {"aten::_unsafe_view"}


def check_memory(node: Node) -> None:
    """Raise ValueError for a node whose storages no schema describes."""
    if node.op not in ("placeholder", "get_attr", "call_function"):
        raise ValueError(
            f"{node.name} is a {node.op} of {node.target}, and what that allocates is in no "
            "schema. Trace down to operators: torch.export or make_fx"
        )
    if not isinstance(node.target, torch._ops.OpOverload):
        return
    if node.target._schema.name in _REPLACE_STORAGE:
        raise ValueError(
            f"{node.name} ({node.target}) replaces a tensor's storage, which has no fixed "
            "lifetime. Leave it out"
        )


def viewed_operand(node: Node, result: int) -> Node | None:
    """The operand that a result views; None if its memory is new.

    A pass that adds nodes may give them fake tensors with storages of their own, so metadata
    does not decide. Composite operators (reshape, contiguous) view or copy: their schema does
    not decide either.

    result: its place among the node's results
    """
    op = node.target
    if not isinstance(op, torch._ops.OpOverload) or not op._schema.returns:
        return None
    if op._schema.name in _UNDECLARED_VIEWS:
        source = node.args[0]
        assert isinstance(source, Node)
        return source
    # A list of results is a single return of the schema.
    returns = op._schema.returns
    if len(returns) == 1:
        result = 0
    # The result's alias set names the argument that it views or overwrites.
    alias = returns[result].alias_info
    if alias is None or (_is_composite(op) and not alias.is_write):
        return None
    for place, argument in enumerate(op._schema.arguments):
        if not _may_alias(argument.alias_info, alias):
            continue
        operand = node.kwargs.get(argument.name)
        if place < len(node.args):
            operand = node.args[place]
        if isinstance(operand, Node):
            return operand
    return None


def is_view(node: Node) -> bool:
    """Whether a node views its first operand, by its operator's schema."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    returns = node.target._schema.returns
    if not returns or returns[0].alias_info is None:
        return False
    return not returns[0].alias_info.is_write


def _may_alias(argument: Any, result: Any) -> bool:
    """Whether a result's alias annotation refers to an argument's."""
    if argument is None:
        return False
    if argument.before_set & result.before_set:
        return True
    # For a list of views the schema annotates the argument only: Tensor(a -> *).
    return not result.before_set and "*" in argument.after_set


def _is_composite(op: torch._ops.OpOverload) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeImplicitAutograd")
