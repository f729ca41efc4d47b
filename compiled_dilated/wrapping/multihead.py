"""Calls of F.multi_head_attention_forward, to which nn.MultiheadAttention comes down: the same code over our attention."""

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
from .expressions import Apply, Expression, Index, Number, apply, constant, negated
from .places import line_of
from .reading import Reader, Scope, example_of

MULTIHEAD = F.multi_head_attention_forward


def bound_arguments(node: Node) -> dict[str, Any]:
    """The arguments of a call by name, weights left out where nobody reads them.

    Raises NotImplementedError where somebody does.
    """
    bound = dict(inspect.signature(MULTIHEAD).bind(*node.args, **node.kwargs).arguments)
    _leave_out_weights(node, bound)
    return bound


def read_masks(bound: dict[str, Any], reader: Reader, scope: Scope) -> Expression | None:
    """What the masks of a call say together; None where it has none, or where it makes keys that no mask speaks of.

    Masks that are read are left out of the arguments.
    """
    mask, padding = bound.get("attn_mask"), bound.get("key_padding_mask")
    more_keys = bound["bias_k"] is not None or bound["add_zero_attn"]
    # Torch takes the word of is_causal where there is no padding.
    told_causal = bound.get("is_causal", False) and padding is None
    if (
        more_keys
        or told_causal
        or bound.get("static_k") is not None
        or (mask is None and padding is None)
    ):
        return None
    dtype = example_of(bound["query"]).dtype
    parts = []
    if mask is not None:
        parts.append(reader.mask(mask, scope, _indices_of(mask, bound["num_heads"])))
    if padding is not None:
        parts.append(reader.mask(padding, scope, (Index("b"), Index("kv"))))
    bound |= {"attn_mask": None, "key_padding_mask": None, "is_causal": False}
    if all(part.dtype == torch.bool for part in parts):
        return functools.reduce(lambda x, y: apply("and", (x, y), torch.bool), map(negated, parts))
    return functools.reduce(
        lambda x, y: apply("add", (x, y), dtype), (_added(part, dtype) for part in parts)
    )


def _indices_of(mask: Node, heads: int) -> tuple[Expression, ...]:
    """The indices along a mask (N, M), or (B * heads, N, M)."""
    if example_of(mask).dim() == 2:
        return Index("q"), Index("kv")
    of_batch = Apply("mul", (Index("b"), constant(heads, torch.int64)), torch.int64)
    return Apply("add", (of_batch, Index("h")), torch.int64), Index("q"), Index("kv")


def _added(mask: Expression, dtype: torch.dtype) -> Expression:
    """A mask as numbers that are added to scores: one of bool is True where it hides."""
    if mask.dtype != torch.bool:
        return mask
    return apply("where", (mask, Number(-math.inf, dtype), Number(0.0, dtype)), dtype)


def multihead(attention: Attention) -> Callable[..., Any]:
    """F.multi_head_attention_forward over another scaled_dot_product_attention: the same code with one name changed."""

    def multi_head_attention(*, captured: Sequence[Any] = (), **arguments: Any) -> Any:
        names = {
            **MULTIHEAD.__globals__,
            "scaled_dot_product_attention": functools.partial(attention, captured=captured),
            # Tensors of a trace would send the call on to the original.
            "has_torch_function": lambda tensors: False,
        }
        copy = FunctionType(
            MULTIHEAD.__code__,
            names,
            "multi_head_attention",
            MULTIHEAD.__defaults__,
            MULTIHEAD.__closure__,
        )
        copy.__kwdefaults__ = MULTIHEAD.__kwdefaults__
        return copy(**arguments)

    multi_head_attention.__name__ = f"multi_head_{attention.__name__}"
    return multi_head_attention


def _leave_out_weights(node: Node, bound: dict[str, Any]) -> None:
    """Ask for no weights where nobody reads them; raise NotImplementedError where somebody does."""
    if not bound.get("need_weights", True):
        return
    for user in node.users:
        is_item = user.target is getitem and user.args[1] == 1
        if is_item and user.users:
            raise NotImplementedError(
                f"attention weights as a result are not made{line_of(node)}. Pass need_weights=False"
            )
        if user.op == "output" or (user.target is not getitem):
            raise NotImplementedError(
                f"attention weights as a result are not made{line_of(node)}. Pass need_weights=False"
            )
    bound["need_weights"] = False
    # A hint so far: without weights torch's code would take it for the mask.
    bound["is_causal"] = False
