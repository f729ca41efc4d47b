"""The structure of a call's mask: masks, data, conditions and a bias.

    (kv <= q) & seen[b, kv]  ->  causal() & padding(), with data ~seen[b, kv] for every key

Nothing is left out: conditions that are no mask hide pairs one by one, numbers are added to scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ... import masks
from ...masks import Mask
from ...masks.traced import MOST_PAIRS_WITHOUT_WITHIN
from ..reading.expressions import TRUE, Expression, evaluate, indices_of, slots_of
from ..reading.simplify import conjunction
from .biases import conjuncts, split
from .comparisons import DataTensors, mask_of
from .spans import merged


@dataclass
class Structure:
    """The structure of a mask.

    masks: a pair is seen if all of them allow it.
    data: by name of a data tensor, its entry for "b" and "kv".
    pairs: the condition that is left, evaluated per pair.
    bias: added to scores, if any.
    """

    masks: list[Mask] = field(default_factory=list)
    data: dict[str, Expression] = field(default_factory=dict)
    pairs: Expression = TRUE
    bias: Expression | None = None

    def __str__(self) -> str:
        parts = [repr(mask) for mask in self.masks]
        if self.pairs != TRUE:
            parts.append("a mask")
        seen = " & ".join(parts or ["full()"])
        if self.bias is None:
            return seen
        return f"{seen} + a bias"


def structure_of(
    mask: Expression, q_len: Any, kv_len: Any, taken: tuple[str, ...] = ()
) -> Structure:
    """The structure of a mask of bool or of numbers.

    mask: of bool, True where a pair is seen; of numbers, added to scores.
    q_len, kv_len: of the call, in tokens; symbolic if they vary.
    taken: names of other data of the call.
    """
    square = bool(statically_known_true(q_len == kv_len))
    condition: Expression = mask
    bias: Expression | None = None
    if mask.dtype != torch.bool:
        condition, bias = split(mask, square)
    joint: list[Mask] = []
    per_pair: list[Expression] = []
    data = DataTensors(square, taken)
    for part in conjuncts(condition):
        # Tensors of a part that turns out to be no mask are dropped with the copy.
        attempt = data.copy()
        part_mask = mask_of(part, attempt)
        if part_mask is None:
            per_pair.append(part)
        else:
            joint.append(part_mask)
            data = attempt
    # Masks of positions first, data behind them.
    joint = sorted(merged(joint), key=lambda mask: bool(mask.names))
    are_fixed = isinstance(q_len, int) and isinstance(kv_len, int)
    if are_fixed and q_len * kv_len <= MOST_PAIRS_WITHOUT_WITHIN:
        joint, per_pair = _with_arithmetic(joint, per_pair)
    return Structure(joint, data.entries, conjunction(per_pair), bias)


def _with_arithmetic(
    joint: list[Mask], conditions: Sequence[Expression]
) -> tuple[list[Mask], list[Expression]]:
    """Masks and conditions, with those of positions alone as one mask.

    Tiles in which these conditions allow no pair are then left out.
    """
    arithmetic: list[Expression] = []
    of_call: list[Expression] = []
    for condition in conditions:
        if slots_of(condition) or "b" in indices_of(condition):
            of_call.append(condition)
        else:
            arithmetic.append(condition)
    if not arithmetic:
        return joint, of_call
    within = masks.conjunction(tuple(joint))
    return [masks.from_mod(MaskOfCall(conjunction(arithmetic)), within)], of_call


@dataclass(frozen=True)
class MaskOfCall:
    """A condition as a mask_mod."""

    condition: Expression

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        indices = {"b": b, "h": h, "q": q_idx, "kv": kv_idx}
        seen: Tensor = evaluate(self.condition, indices, ())
        return seen
