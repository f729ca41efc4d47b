"""The gradients of steps: which values a backward reads, and what each step adds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .primitives import Reads
from .steps import Step


@dataclass(frozen=True)
class Plan:
    """The plan of a backward, as names of values.

    needed: values that need a gradient
    read: values that some step's backward reads
    recomputed: values that the forward computes again, to have those
    """

    needed: frozenset[str]
    read: frozenset[str]
    recomputed: frozenset[str]


@lru_cache
def plan(steps: tuple[Step, ...], needed: frozenset[str]) -> Plan:
    """Plan a backward. needed: names of the operands that need a gradient."""
    for step in steps:
        if not needed.isdisjoint(step.names):
            needed |= {step.result}
    read: set[str] = set()
    for step in steps:
        if step.result in needed:
            read.update(_read_by_backward(step, needed))
    recomputed = set(read)
    for step in reversed(steps):
        if step.result in recomputed:
            recomputed.update(step.names)
    return Plan(needed, frozenset(read), frozenset(recomputed))


def _read_by_backward(step: Step, needed: frozenset[str]) -> list[str]:
    """The values that a step's backward reads."""
    if step.primitive == "linear":
        x, weight = step.names[:2]
        return [weight, x] if weight in needed else [weight]
    reads = step.definition.reads
    if reads is Reads.OPERANDS:
        return step.names
    return [step.result] if reads is Reads.RESULT else []


def gradients(
    step: Step,
    grad: Tensor,
    values: Mapping[str, Tensor],
    needed: frozenset[str],
    sums: Mapping[str, Tensor],
) -> list[tuple[str, Tensor]]:
    """What one step adds to gradients: named tensors for rows, in-place in `sums` for shared."""
    if step.primitive == "linear":
        return _linear_gradients(step, grad, values, needed, sums)
    backward = step.definition.backward
    assert backward is not None
    pieces = backward(grad, values[step.result], *step.arguments(values), **dict(step.options))
    of_rows: list[tuple[str, Tensor]] = []
    for name, piece in zip(step.operands, pieces, strict=False):  # a number has no gradient
        if not isinstance(name, str) or name not in needed or piece is None:
            continue
        if name in sums:
            sums[name].add_(_sum_over_rows(piece, sums[name]))
        else:
            of_rows.append((name, _reduce_like(piece, values[name])))
    return of_rows


def _linear_gradients(
    step: Step,
    grad: Tensor,
    values: Mapping[str, Tensor],
    needed: frozenset[str],
    sums: Mapping[str, Tensor],
) -> list[tuple[str, Tensor]]:
    """As `gradients`; products are added to the sums without a tensor of their own."""
    x, weight, *bias = step.names
    if weight in sums:
        add_product(sums[weight], grad.t(), values[x])
    if bias and bias[0] in sums:
        sums[bias[0]].add_(grad.sum(0, dtype=sums[bias[0]].dtype))
    return [(x, grad @ values[weight])] if x in needed else []


def zero_sum(weight: Tensor) -> Tensor:
    """Zeros like a weight, in float32 at least, to sum its gradients."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return torch.zeros(weight.shape, dtype=dtype, device=weight.device)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, in-place if dtypes allow."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)


def _sum_over_rows(piece: Tensor, total: Tensor) -> Tensor:
    """The gradient of a shared operand of (features,) or ()."""
    has_features = piece.shape[-1:] == total.shape
    return piece.sum(0, dtype=total.dtype) if has_features else piece.sum(dtype=total.dtype)


def _reduce_like(piece: Tensor, value: Tensor) -> Tensor:
    """The gradient of a value that was broadcast over features, or converted."""
    if value.shape[-1] == 1 and piece.shape[-1] != 1:
        piece = piece.sum(-1, keepdim=True)
    return piece.to(value.dtype)
