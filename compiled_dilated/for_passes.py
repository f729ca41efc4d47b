"""What passes/ is told of attention by a program: what it holds, how long it takes, and how to ask for some of its queries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from passes.analysis import costs
from passes.analysis.costs import Work
from passes.analysis.workspaces import workspace
from passes.rewrites.rows.attentions import attention

from . import autograd, operators
from .orders import identity
from .plans import Cost
from .programs import PerLength
from .rules import Rule, read_rule

# A backward's products, as a share of the forward's: five against two.
_BACKWARD_WORK = 2.5


def tell() -> None:
    """Once in a process; a compiled graph asks for it by the operator's name."""
    forward, backward = torch.ops.compiled_dilated.attend.default, torch.ops.compiled_dilated.attend_backward.default
    attention(forward, read=_read, reach=lambda start, stop, tokens, **_: (0, tokens), part=_part, flops=_flops)
    workspace(forward, lambda *call, **named: _called(forward, call, named).peak_bytes)
    costs.register(forward, lambda *call, out, **named: Work(_called(forward, call, named).dense_flops))
    workspace(backward, lambda *call, **named: _called(backward, call, named).backward_bytes)
    costs.register(backward, lambda *call, out, **named: Work(_BACKWARD_WORK * _called(backward, call, named).dense_flops))


def _called(op: torch._ops.OpOverload, call: Sequence[Any], named: dict[str, Any]) -> Cost:
    """Of a call of the operator or of its gradient, whose plan is one for training."""
    given = dict(zip((each.name for each in op._schema.arguments), call, strict=False)) | named
    rule = read_rule(given["rule"], given["operands"])
    return _cost(given["q"], given["k"], given["v"], rule, given["q_offset"], given.get("training", True))


def _cost(q: Tensor, k: Tensor, v: Tensor, rule: Rule, q_offset: int, training: bool) -> Cost:
    """Of the plan; nothing of a ring, whose ranks plan each step for themselves."""
    if rule.ring is not None or not (q.numel() and k.numel() and v.numel()):
        return Cost(0, 0, 0, 0, 0, 0.0)
    return operators.plan_of(rule, q, k, v, q_offset, training).cost


def _read(
    q: Any,
    k: Any,
    v: Any,
    data: Sequence[Any] | None,
    operands: Sequence[Any] | None,
    rule: str,
    scale: float,
    q_offset: Any,
    training: bool,
    by_token: bool,
) -> dict[str, Any] | None:
    """The call's options; None of what needs all queries.

    That are orders, rings, functions, data, long lists, a lowering or an offset by hand.
    """
    if data or operands:
        return None
    meaning = read_rule(rule, None)
    if meaning.ring is not None or meaning.score_mod is not None or isinstance(meaning.program, PerLength):
        return None
    ordered = any(branch.order != identity() for branch in meaning.program.branches)
    by_hand = meaning.lowering != "auto" or not isinstance(q_offset, int) or q_offset != 0
    return None if ordered or by_hand else {"rule": rule, "scale": scale}


def _flops(q: Tensor, k: Tensor, v: Tensor, *, rule: str, scale: float) -> float:
    return _cost(q, k, v, read_rule(rule, None), 0, training=False).dense_flops


def _part(q: Tensor, k: Tensor, v: Tensor, start: int, first: int, *, rule: str, scale: float) -> Tensor:
    assert first == 0  # masks count keys from the first
    return autograd.part(q, k, v, start, rule, scale)
