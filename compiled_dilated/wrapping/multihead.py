"""Replacement of F.multi_head_attention_forward: torch's own code over this attention.

nn.MultiheadAttention and all layers of nn.Transformer call that function.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from operator import getitem
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from .calls import Attention
from .places import line_of
from .reading.expressions import Apply, Expression, Index, Number, constant
from .reading.reader import Reader
from .reading.scopes import Scope, example_of
from .reading.simplify import apply, conjunction, negated

MULTIHEAD = F.multi_head_attention_forward


def bound_arguments(node: Node) -> dict[str, Any]:
    """The arguments of a call by name, without weights as a result.

    Raises NotImplementedError where the weights are read.
    """
    bound = dict(inspect.signature(MULTIHEAD).bind(*node.args, **node.kwargs).arguments)
    _leave_out_weights(node, bound)
    return bound


def _leave_out_weights(node: Node, bound: dict[str, Any]) -> None:
    if not bound.get("need_weights", True):
        return
    for user in node.users:
        takes_output = user.target is getitem and user.args[1] != 1
        takes_unused_weights = user.target is getitem and not user.users
        if not takes_output and not takes_unused_weights:
            raise NotImplementedError(
                f"attention weights as a result are not made{line_of(node)}. "
                "Pass need_weights=False"
            )
    bound["need_weights"] = False
    # With weights is_causal is a hint; without, torch's code would use it in place of the mask.
    bound["is_causal"] = False


def read_masks(bound: dict[str, Any], reader: Reader, scope: Scope) -> Expression | None:
    """Remove the masks from a call's arguments, as one expression.

    None without masks, and if a mask does not cover all keys or torch ignores it.
    """
    mask, padding = bound.get("attn_mask"), bound.get("key_padding_mask")
    if mask is None and padding is None:
        return None
    # Torch appends keys that the masks do not cover.
    if bound["bias_k"] is not None or bound["add_zero_attn"] or bound.get("static_k") is not None:
        return None
    # Without padding torch uses is_causal in place of the mask.
    if bound.get("is_causal", False) and padding is None:
        return None
    dtype = example_of(bound["query"]).dtype
    parts = []
    if mask is not None:
        parts.append(reader.mask(mask, scope, _indices_of(mask, bound["num_heads"])))
    if padding is not None:
        parts.append(reader.mask(padding, scope, (Index("b"), Index("kv"))))
    bound |= {"attn_mask": None, "key_padding_mask": None, "is_causal": False}
    # Masks of bool are True where they hide.
    if all(part.dtype == torch.bool for part in parts):
        return conjunction([negated(part) for part in parts])
    biases = [_as_bias(part, dtype) for part in parts]
    return functools.reduce(lambda x, y: apply("add", (x, y), dtype), biases)


def _indices_of(mask: Node, heads: int) -> tuple[Expression, ...]:
    """The pair's indices along a mask.

    mask: (N, M), or (B * heads, N, M).
    """
    if example_of(mask).dim() == 2:
        return Index("q"), Index("kv")
    of_batch = Apply("mul", (Index("b"), constant(heads, torch.int64)), torch.int64)
    return Apply("add", (of_batch, Index("h")), torch.int64), Index("q"), Index("kv")


def _as_bias(mask: Expression, dtype: torch.dtype) -> Expression:
    """A mask as numbers that are added to scores."""
    if mask.dtype != torch.bool:
        return mask
    return apply("where", (mask, Number(-math.inf, dtype), Number(0.0, dtype)), dtype)


def multihead(attention: Attention) -> Callable[..., Any]:
    """F.multi_head_attention_forward with another scaled_dot_product_attention.

    A copy of torch's function with one global name replaced.
    """

    def multi_head_attention(*, captured: Sequence[Any] = (), **arguments: Any) -> Any:
        names = {
            **MULTIHEAD.__globals__,
            "scaled_dot_product_attention": functools.partial(attention, captured=captured),
            # For tensors of a trace the original would dispatch to itself.
            "has_torch_function": lambda tensors: False,
        }
        name, code = "multi_head_attention", MULTIHEAD.__code__
        copy = FunctionType(code, names, name, MULTIHEAD.__defaults__, MULTIHEAD.__closure__)
        copy.__kwdefaults__ = MULTIHEAD.__kwdefaults__
        return copy(**arguments)

    multi_head_attention.__name__ = f"multi_head_{attention.__name__}"
    return multi_head_attention
