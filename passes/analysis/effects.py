"""Effects of graph nodes' operators: writes, side effects, random numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

# The schemas of these namespaces are complete. Those of others (collectives, a user's operators)
# may leave out effects.
_COMPLETE_SCHEMAS = {"aten", "prims", "inductor_prims", "quantized_decomposed"}
_PLAIN_PYTHON = {"_operator", "math", "torch"}
_AUGMENTED = {
    *("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul"),
    *("iand", "ior", "ixor", "ilshift", "irshift"),
}


def has_effects(node: Node) -> bool:
    """Whether the order of a call matters: side effects, random numbers."""
    if isinstance(node.target, torch._ops.OpOverload):
        is_random = torch.Tag.nondeterministic_seeded in node.target.tags
        is_unknown = node.target.namespace not in _COMPLETE_SCHEMAS
        return is_random or is_unknown or node.is_impure()
    return getattr(node.target, "__module__", "") not in _PLAIN_PYTHON


def changes_operands(node: Node) -> bool:
    """Whether a call in an aten graph may write to its operands."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    return has_effects(node)


def is_elementwise(node: Node) -> bool:
    """Whether a call is elementwise and has no effects."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return torch.Tag.pointwise in node.target.tags and not has_effects(node)


def writes(node: Node) -> bool:
    """Whether a call in a Dynamo graph is in-place.

    The call is of a function, a method or an operator.
    """
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return bool(target._schema.is_mutable)
    if node.op not in ("call_function", "call_method"):
        return False
    # A method is called by its name.
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    if name == "setitem" or _is_augmented(target):
        return True
    if bool(node.kwargs.get("inplace")) or "out" in node.kwargs:
        return True
    # An in-place method ends in one underscore; operator.and_, or_ and not_ do too, to avoid
    # Python's keywords.
    from_operator = getattr(target, "__module__", "") == "_operator"
    return name.endswith("_") and not name.endswith("__") and not from_operator


def _is_augmented(target: Any) -> bool:
    """Whether a function is operator.iadd or its like."""
    return getattr(target, "__module__", "") == "_operator" and target.__name__ in _AUGMENTED
