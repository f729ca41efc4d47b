"""What is known of the operators that nodes call."""

from __future__ import annotations

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
