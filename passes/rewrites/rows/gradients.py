"""Gradients of steps: the values that a backward reads, and its sums."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
    """Plan a backward.

    needed: names of the operands that need a gradient
    """
    # 1. What depends on a needed operand needs a gradient too, if the result's gets there.
    dependent = set(needed)
    for step in steps:
        if step.is_differentiable and not dependent.isdisjoint(step.names):
            dependent.add(step.result)
    reached = {steps[-1].result}
    for step in reversed(steps):
        if step.result in reached and step.result in dependent:
            reached.update(step.names)
    needed = frozenset(dependent & reached)
    # 2. What the backward of those reads, and what that is computed from.
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
        if weight in needed:
            return [weight, x]
        return [weight]
    reads = step.definition.reads
    if reads is Reads.OPERANDS:
        return step.names
    if reads is Reads.RESULT:
        return [step.result]
    return []


def gradients(
    step: Step,
    grad: Tensor,
    values: Mapping[str, Tensor],
    needed: frozenset[str],
    sums: Mapping[str, Tensor],
) -> list[tuple[str, Tensor]]:
    """A step's contributions to gradients.

    Returns those of rows, by name; those of shared operands are added to `sums` in-place.
    """
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
    """A linear's contributions to gradients, as in `gradients`.

    Products are added to the sums without a tensor of their own.
    """
    x, weight, *bias = step.names
    if weight in sums:
        add_product(sums[weight], grad.t(), values[x])
    if bias and bias[0] in sums:
        sums[bias[0]].add_(grad.sum(0, dtype=sums[bias[0]].dtype))
    if x not in needed:
        return []
    return [(x, grad @ values[weight])]


def aligned(grads: Iterable[Tensor], needs_grad: Sequence[bool]) -> list[Tensor | None]:
    """A gradient or None for each operand.

    grads: of the operands that need one, in order
    """
    computed = iter(grads)
    result: list[Tensor | None] = []
    for is_needed in needs_grad:
        result.append(next(computed) if is_needed else None)
    return result


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
    if piece.shape[-1:] == total.shape:
        return piece.sum(0, dtype=total.dtype)
    return piece.sum(dtype=total.dtype)


def _reduce_like(piece: Tensor, value: Tensor) -> Tensor:
    """The gradient of a value that was broadcast over features, or converted."""
    if value.shape[-1] == 1 and piece.shape[-1] != 1:
        piece = piece.sum(-1, keepdim=True)
    return piece.to(value.dtype)
