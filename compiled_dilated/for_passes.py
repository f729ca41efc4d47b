"""The attention operator's cost, workspace and computation by rows, for the passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from passes.analysis import costs
from passes.analysis.costs import Work
from passes.analysis.workspaces import workspace
from passes.rewrites.rows.attentions import attention

from . import autograd, execution, rates
from .orders import identity
from .plans import Cost
from .programs import PerLength
from .rules import Rule, read_rule


def register() -> None:
    """Register the attention operator's cost, workspace and rows with passes. Idempotent."""
    forward = torch.ops.compiled_dilated.attend.default
    backward = torch.ops.compiled_dilated.attend_backward.default

    def forward_work(*call: Any, out: Any, **named: Any) -> Work:
        return Work(_cost_of_call(forward, call, named).dense_flops)

    def backward_work(*call: Any, out: Any, **named: Any) -> Work:
        return Work(rates.BACKWARD * _cost_of_call(backward, call, named).dense_flops)

    attention(forward, read=_read, reach=_reach, part=_part, flops=_flops)
    workspace(forward, lambda *call, **named: _cost_of_call(forward, call, named).peak_bytes)
    costs.register(forward, forward_work)
    workspace(backward, lambda *call, **named: _cost_of_call(backward, call, named).backward_bytes)
    costs.register(backward, backward_work)


def _cost_of_call(op: torch._ops.OpOverload, call: Sequence[Any], named: dict[str, Any]) -> Cost:
    """The cost of a call of the operator or of its backward."""
    arguments = dict(named)
    for parameter, value in zip(op._schema.arguments, call, strict=False):
        arguments.setdefault(parameter.name, value)
    rule = read_rule(arguments["rule"], arguments["operands"])
    q, k, v = arguments["q"], arguments["k"], arguments["v"]
    return _cost(q, k, v, rule, arguments["q_offset"], arguments.get("training", True))


def _cost(q: Tensor, k: Tensor, v: Tensor, rule: Rule, q_offset: int, training: bool) -> Cost:
    """The cost of the plan; zero for a ring."""
    if rule.ring is not None or not (q.numel() and k.numel() and v.numel()):
        return Cost(0, 0, 0, 0, 0, 0.0)
    return execution.plan_of(rule, q, k, v, q_offset, training).cost


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
    """Options of a call by rows; None if it needs all queries.

    Orders, rings, functions, data, long lists, an explicit lowering or an offset need all.
    """
    if data or operands:
        return None
    parsed = read_rule(rule, None)
    program = parsed.program
    if parsed.ring is not None or parsed.score_mod is not None or isinstance(program, PerLength):
        return None
    # Rows of an order are not consecutive queries.
    if any(branch.order != identity() for branch in program.branches):
        return None
    if parsed.lowering != "auto" or not isinstance(q_offset, int) or q_offset != 0:
        return None
    return {"rule": rule, "scale": scale}


def _reach(start: int, stop: int, tokens: int, **_: Any) -> tuple[int, int]:
    """Keys that rows start .. stop read: all of them."""
    return 0, tokens


def _flops(q: Tensor, k: Tensor, v: Tensor, *, rule: str, scale: float) -> float:
    return _cost(q, k, v, read_rule(rule, None), 0, training=False).dense_flops


def _part(
    q: Tensor, k: Tensor, v: Tensor, start: int, first: int, *, rule: str, scale: float
) -> Tensor:
    assert first == 0  # masks count keys from the first
    return autograd.part(q, k, v, start, rule, scale)
