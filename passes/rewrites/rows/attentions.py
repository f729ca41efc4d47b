"""Attention operators that stream_qkv can call for some queries at a time."""

from __future__ import annotations

import ast
import inspect
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional as F

from ... import arguments
from .calls import example_value

aten = torch.ops.aten

_SCALED_DOT_PRODUCT = (
    aten.scaled_dot_product_attention.default,
    F.scaled_dot_product_attention,
)


@dataclass(frozen=True)
class Attention:
    """An operator of (query, key, value, ...), each (batch, heads, tokens, features).

    Its result is the values, or a tuple that begins with them. Its functions:

    read(query, key, value, ...) -> the other arguments by name, literals; None for a call that
        must not be split
    reach(start, stop, tokens, **options) -> the range [first, last) of keys that the queries
        [start, stop) of `tokens` may see
    part(query, key, value, start, first, **options) -> the result for some queries; `start` is the
        position of the first query, `first` that of the first key
    flops(query, key, value, **options) -> flops of a dense kernel that would take as long
    """

    name: str
    read: Callable[..., dict[str, Any] | None]
    reach: Callable[..., tuple[int, int]]
    part: Callable[..., Tensor]
    flops: Callable[..., float]


def all_pairs(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> float:
    """The flops of every query with every key."""
    pairs = query[..., 0].numel() * key.shape[-2]
    return 2.0 * pairs * (query.shape[-1] + value.shape[-1])


def attention(
    *targets: Any,
    read: Callable[..., dict[str, Any] | None],
    reach: Callable[..., tuple[int, int]],
    part: Callable[..., Tensor],
    flops: Callable[..., float] = all_pairs,
) -> Attention:
    """Register an attention for stream_qkv, where the operator is defined.

    A compiled graph looks it up by the name of the first target.

    targets: what graphs call: an operator (torch.ops....), then its other spellings
    read, reach, part, flops: see Attention
    """
    if not targets:
        raise ValueError(
            "targets must be what graphs call, at least one; got none. "
            "Give an operator, as torch.ops.example.attend.default"
        )
    for name, value in (("read", read), ("reach", reach), ("part", part), ("flops", flops)):
        arguments.function(name, value)
    registered = Attention(str(targets[0]), read, reach, part, flops)
    _ATTENTIONS.update(_by_target(registered, targets))
    return registered


def _by_target(attention: Attention, targets: Sequence[Any]) -> dict[Any, Attention]:
    """An attention by what graphs call, and by its name.

    An operator is called by its overload or, in Dynamo's graphs, by its packet.
    """
    packets = [
        target.overloadpacket for target in targets if isinstance(target, torch._ops.OpOverload)
    ]
    return dict.fromkeys((*targets, *packets, attention.name), attention)


@dataclass(frozen=True)
class Call:
    """A call of a registered attention in a graph.

    result: the node whose value is (batch, heads, tokens, features)
    operator: the call itself, if its result is a tuple; else `result`
    text: the attention and its options, for `parse`
    heads: query, key, value
    """

    result: Node
    operator: Node
    text: str
    heads: tuple[Node, Node, Node]


def call(result: Node) -> Call | None:
    """Read a node as the result of a registered attention, or None.

    That is the call itself, or the first item of its tuple, if nothing uses the other items.
    """
    node = result
    if node.target is operator.getitem and node.args[1] == 0:
        source = node.args[0]
        if isinstance(source, Node) and len(source.users) == 1:
            node = source
    if node.op != "call_function" or node.target not in _ATTENTIONS:
        return None
    # Either the call's value is a tensor, or `result` is the first item of its tuple.
    attention = _ATTENTIONS[node.target]
    if isinstance(example_value(node), Tensor) != (node is result):
        return None
    # Its options, if all of them can be written as text.
    try:
        bound = inspect.signature(attention.read).bind(*node.args, **node.kwargs)
    except TypeError:
        return None
    options = attention.read(*bound.args, **bound.kwargs)
    if options is None:
        return None
    if not all(isinstance(option, int | float | str | None) for option in options.values()):
        return None
    query, key, value, *_ = bound.args
    return Call(result, node, repr((attention.name, options)), (query, key, value))


def parse(text: str) -> tuple[Attention, dict[str, Any]]:
    """Parse Call.text.

    Raises KeyError for an attention that is not registered in this process.
    """
    name, options = ast.literal_eval(text)
    if name not in _ATTENTIONS:
        raise KeyError(
            f"{name} is no attention registered for stream_qkv. Import the module that registers it"
        )
    return _ATTENTIONS[name], options


def scaled_dot_product(node: Node) -> inspect.BoundArguments | None:
    """The arguments of torch's own attention, defaults included; None for another node."""
    if node.target not in _SCALED_DOT_PRODUCT:
        return None
    bound = inspect.signature(_read).bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    return bound


def _read(
    query: Node,
    key: Node,
    value: Node,
    attn_mask: Any = None,
    dropout_p: Any = 0.0,
    is_causal: Any = False,
    *,
    scale: Any = None,
    enable_gqa: Any = False,
) -> dict[str, Any] | None:
    """SDPA's options; None with a mask or dropout."""
    if attn_mask is not None or not isinstance(dropout_p, int | float) or dropout_p != 0:
        return None
    return {"is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}


def _reach(start: int, stop: int, tokens: int, *, is_causal: bool, **_: Any) -> tuple[int, int]:
    last = stop if is_causal else tokens
    return 0, last


def _part(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    start: int,
    first: int,
    *,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """SDPA for queries from position `start` on and keys from `first` on.

    SDPA aligns causal masks at the top left; here the last query and key are aligned.
    """
    sdpa = F.scaled_dot_product_attention
    if not is_causal or start == first:
        return sdpa(query, key, value, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)
    split = start - first
    # All queries see the keys before `split`. From there on the mask is aligned at the top left,
    # so the flash kernel needs no mask tensor for either part.
    if query.device.type == "cpu" and query.shape[-1] == value.shape[-1]:
        before = _with_lse(query, key[..., :split, :], value[..., :split, :], False, scale)
        after = _with_lse(query, key[..., split:, :], value[..., split:, :], True, scale)
        return _merged(before, after)
    shape = (query.shape[-2], key.shape[-2])
    mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril_(split)
    return sdpa(query, key, value, mask, scale=scale, enable_gqa=enable_gqa)


def _with_lse(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    kernel = aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = kernel(query, key, value, 0.0, is_causal, scale=scale)
    return out, lse


def _merged(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> Tensor:
    """Merge two parts (out, lse) of one softmax without empty rows."""
    share = torch.sigmoid(left[1] - right[1])[..., None]
    out = torch.lerp(right[0].to(share.dtype), left[0].to(share.dtype), share)
    return out.to(left[0].dtype)


# The attentions by what graphs call. `attention` adds to them.
_ATTENTIONS: dict[Any, Attention] = _by_target(
    Attention(str(_SCALED_DOT_PRODUCT[0]), _read, _reach, _part, all_pairs), _SCALED_DOT_PRODUCT
)
