"""The table of rules, by function and method of torch."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from .creation import arange, full, ones, tensor, zeros
from .elementwise import binary, clamp, div, masked_fill, rsub, tril, triu, unary, where
from .reader import Rule
from .views import (
    converted,
    copied,
    embedding,
    expand,
    getitem,
    permute,
    reshape,
    squeeze,
    t,
    transpose,
    unsqueeze,
)

# Rules, and the names that they read: in torch, torch.nn.functional and operator, and of methods,
# in place (name_) too.
_TABLE: tuple[tuple[Rule, str], ...] = (
    (arange, "arange"),
    (ones, "ones ones_like new_ones"),
    (zeros, "zeros zeros_like new_zeros"),
    (full, "full full_like new_full"),
    (tensor, "tensor scalar_tensor"),
    # Views and copies.
    (copied, "contiguous clone detach"),
    (converted, "to long int bool float double half bfloat16 type type_as"),
    (expand, "expand expand_as broadcast_to"),
    (unsqueeze, "unsqueeze"),
    (squeeze, "squeeze"),
    (transpose, "transpose swapaxes swapdims"),
    (t, "t"),
    (permute, "permute"),
    (reshape, "view reshape"),
    (getitem, "getitem"),
    (embedding, "embedding"),
    # Of two tensors or numbers.
    (binary("add"), "add iadd"),
    (binary("sub"), "sub subtract isub"),
    (binary("mul"), "mul multiply imul"),
    (binary("truediv"), "truediv true_divide itruediv"),
    (binary("floordiv"), "floordiv floor_divide ifloordiv"),
    (binary("mod"), "mod remainder"),
    (binary("minimum"), "minimum min"),
    (binary("maximum"), "maximum max"),
    (binary("pow"), "pow"),
    (binary("and"), "logical_and bitwise_and and_ __and__ iand"),
    (binary("or"), "logical_or bitwise_or or_ __or__ ior"),
    (binary("xor"), "logical_xor bitwise_xor xor __xor__"),
    (binary("eq"), "eq"),
    (binary("ne"), "ne not_equal"),
    (binary("lt"), "lt less"),
    (binary("le"), "le less_equal"),
    (binary("gt"), "gt greater"),
    (binary("ge"), "ge greater_equal"),
    (rsub, "rsub"),
    (div, "div divide"),
    # Of one tensor.
    (unary("neg"), "neg negative"),
    (unary("abs"), "abs absolute"),
    (unary("not"), "logical_not bitwise_not invert inv"),
    *((unary(name), name) for name in ("log", "exp", "sqrt", "square", "sign")),
    *((unary(name), name) for name in ("floor", "ceil", "tanh")),
    # Choices.
    (clamp, "clamp clip"),
    (where, "where"),
    (masked_fill, "masked_fill"),
    (tril, "tril"),
    (triu, "triu"),
)


def _by_target() -> dict[Any, Rule]:
    """The table by function and by name of a method."""
    rules: dict[Any, Rule] = {}
    for rule, names in _TABLE:
        for name in names.split():
            rules |= {name: rule, f"{name}_": rule}
            for space in (torch, torch.Tensor, F, operator):
                if hasattr(space, name):
                    rules[getattr(space, name)] = rule
    return rules


# By the target of a node: a function, or the name of a method.
RULES: Mapping[Any, Rule] = _by_target()
