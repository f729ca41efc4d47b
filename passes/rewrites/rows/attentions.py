"""Which attentions can be asked for some queries at a time, and what they then read of the keys."""

from __future__ import annotations

import ast
import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional as F

from ... import arguments
from .readers import value_of

aten = torch.ops.aten

_SCALED_DOT_PRODUCT = (aten.scaled_dot_product_attention.default, F.scaled_dot_product_attention)


@dataclass(frozen=True)
class Attention:
    """An operator of (query, key, value, ...), each (batch, heads, tokens, features), that works on queries in parts.

    Its result is their values, or a tuple that begins with them.

    read(query, key, value, ...) -> its other arguments by name, literals; None for a call that is not to be taken apart.
    reach(start, stop, tokens, **options) -> the half-open range of keys that the queries [start, stop) of `tokens` may see.
    part(query, key, value, start, first, **options) -> their result; the first query stands at `start`, the first key at `first`.
    flops(query, key, value, **options) -> floating-point operations of a dense kernel that would take as long, for an estimate.
    """

    name: str
    read: Callable[..., dict[str, Any] | None]
    reach: Callable[..., tuple[int, int]]
    part: Callable[..., Tensor]
    flops: Callable[..., float]


_ATTENTIONS: dict[Any, Attention] = {}


def all_pairs(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> float:
    """The flops of every query with every key."""
    return 2.0 * query[..., 0].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def attention(
    *targets: Any,
    read: Callable[..., dict[str, Any] | None],
    reach: Callable[..., tuple[int, int]],
    part: Callable[..., Tensor],
    flops: Callable[..., float] = all_pairs,
) -> Attention:
    """Lets stream_qkv take an attention apart. targets: what graphs call: an operator (torch.ops....), its other spellings.

    Do it where the operator is defined: a compiled graph asks for it by the first target's name. See Attention for the others.
    """
    if not targets:
        raise ValueError(
            "targets must be what graphs call, at least one; got none. Give an operator, as torch.ops.mine.attend.default"
        )
    for name, value in (("read", read), ("reach", reach), ("part", part), ("flops", flops)):
        arguments.function(name, value)
    made = Attention(str(targets[0]), read, reach, part, flops)
    packets = [each.overloadpacket for each in targets if isinstance(each, torch._ops.OpOverload)]
    _ATTENTIONS.update(dict.fromkeys((*targets, *packets, made.name), made))
    return made


@dataclass(frozen=True)
class Call:
    """An attention in a graph. result: the node whose value is (batch, heads, tokens, features); text: for `parse`."""

    result: Node
    operator: Node
    text: str
    heads: tuple[Node, Node, Node]


def call(result: Node) -> Call | None:
    """What makes a node's value, if it is an attention that is known: itself, or one whose first result it is, used alone."""
    node = result
    if node.target is operator.getitem and isinstance(of := node.args[0], Node) and node.args[1] == 0 and len(of.users) == 1:
        node = of
    found = _ATTENTIONS.get(node.target) if node.op == "call_function" else None
    if found is None or isinstance(value_of(node), Tensor) != (node is result):
        return None
    try:
        bound = inspect.signature(found.read).bind(*node.args, **node.kwargs)
    except TypeError:
        return None
    options = found.read(*bound.args, **bound.kwargs)
    if options is None or not all(isinstance(each, int | float | str | None) for each in options.values()):
        return None
    query, key, value, *_ = bound.args
    return Call(result, node, repr((found.name, options)), (query, key, value))


def parse(text: str) -> tuple[Attention, dict[str, Any]]:
    """What `call` wrote. Raises KeyError for an attention that nobody has registered in this process."""
    name, options = ast.literal_eval(text)
    if name not in _ATTENTIONS:
        raise KeyError(f"{name} is no attention that stream_qkv knows. Import the module that registers it")
    return _ATTENTIONS[name], options


def scaled_dot_product(node: Node) -> inspect.BoundArguments | None:
    """The arguments of torch's own attention, defaults among them; None of another node."""
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
    options = {"is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    return options if attn_mask is None and isinstance(dropout_p, int | float) and dropout_p == 0 else None


def _reach(start: int, stop: int, tokens: int, *, is_causal: bool, **_: Any) -> tuple[int, int]:
    return 0, stop if is_causal else tokens


def _part(
    query: Tensor, key: Tensor, value: Tensor, start: int, first: int, *, is_causal: bool, scale: float | None, enable_gqa: bool
) -> Tensor:
    """is_causal means that query and key 0 stand together; here the last of both do."""
    if not is_causal or start == first:
        return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)
    split = start - first
    if query.device.type == "cpu" and query.shape[-1] == value.shape[-1]:
        before = _with_lse(query, key[..., :split, :], value[..., :split, :], False, scale)
        return _merged(before, _with_lse(query, key[..., split:, :], value[..., split:, :], True, scale))
    seen = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril_(split)
    return F.scaled_dot_product_attention(query, key, value, seen, scale=scale, enable_gqa=enable_gqa)


def _with_lse(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float | None) -> tuple[Tensor, Tensor]:
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, is_causal, scale=scale)
    return out, lse


def _merged(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> Tensor:
    """Two parts of one softmax: each weighed by its share of the sum of exponentials."""
    share = torch.sigmoid(left[1] - right[1])[..., None]
    return torch.lerp(right[0].to(share.dtype), left[0].to(share.dtype), share).to(left[0].dtype)


attention(*_SCALED_DOT_PRODUCT, read=_read, reach=_reach, part=_part)
