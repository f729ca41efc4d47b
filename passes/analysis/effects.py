"""What is known of the operators that nodes call."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

# What operators of other namespaces do (collectives, a user's own), their schemas do not tell whole.
_TOLD = {"aten", "prims", "inductor_prims", "quantized_decomposed"}
_PLAIN_PYTHON = {"_operator", "math", "torch"}


def has_effects(node: Node) -> bool:
    """Whether a call may do more than return its results, or draws random numbers: it must keep its turn among such calls."""
    if isinstance(node.target, torch._ops.OpOverload):
        draws = torch.Tag.nondeterministic_seeded in node.target.tags
        return draws or node.target.namespace not in _TOLD or node.is_impure()
    return getattr(node.target, "__module__", "") not in _PLAIN_PYTHON


def changes_operands(node: Node) -> bool:
    """Whether a call may write to its operands."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    return has_effects(node)


def is_elementwise(node: Node) -> bool:
    """Whether each element of a call's result depends on the elements at its place alone, and on nothing else."""
    known = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags
    return known and not has_effects(node)


def writes(node: Node) -> bool:
    """Whether a call, by any of the names that Dynamo records, changes an operand in place."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return bool(target._schema.is_mutable)
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    # operator.and_, or_ and not_ have to be called something.
    in_place = name.endswith("_") and not name.endswith("__") and getattr(target, "__module__", "") != "_operator"
    return node.op in ("call_function", "call_method") and (
        in_place or name == "setitem" or _is_augmented(target) or bool(node.kwargs.get("inplace")) or "out" in node.kwargs
    )


def _is_augmented(target: Any) -> bool:
    """operator.iadd and its like."""
    return getattr(target, "__module__", "") == "_operator" and target.__name__ in {
        "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor", "ilshift", "irshift",
    }  # fmt: skip
