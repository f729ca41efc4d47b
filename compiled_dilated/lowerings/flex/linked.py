"""The mask of all branches of a program, and its block masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...block_masks import BlockMaskPart, build, widen
from ...masks import Mask, Or, full
from ...masks.core import Data, Positions
from ...orders import Order
from ...plans import Problem
from ...programs import Branch, Program
from ...regions import PARTIAL, Regions, Verdicts

TILE = 128


@dataclass(frozen=True, repr=False)
class Linked(Mask):
    """Pairs that any branch of a program links, for `heads` query heads."""

    program: Program
    heads: int

    def at_head(self, head: int, heads: int) -> Mask:
        assert heads == self.heads
        masks = self.program.masks_at(head, heads)
        if not masks:
            return ~full()
        if len(masks) == 1:
            return masks[0]
        return Or(tuple(dict.fromkeys(masks)))

    def for_heads(self, heads: int) -> Mask:
        assert heads == self.heads
        return self._map(lambda mask: mask.for_heads(heads))

    def on(self, device: Any) -> Mask:
        return self._map(lambda mask: mask.on(device))

    def _map(self, change: Callable[[Mask], Mask]) -> Mask:
        branches = [replace(branch, mask=change(branch.mask)) for branch in self.program.branches]
        return replace(self, program=Program(tuple(branches)))

    def count(
        self, b: Positions, h: Positions, q: Positions, kv: Positions, data: Data | None = None
    ) -> Any:
        """Number of branches that link the pair."""
        return sum(
            self._allows(branch, b, h, q, kv, data).to(torch.int32)
            for branch in self.program.branches
        )

    def allows(
        self, b: Positions, h: Positions, q: Positions, kv: Positions, data: Data | None = None
    ) -> Any:
        out = self._allows(self.program.branches[0], b, h, q, kv, data)
        for branch in self.program.branches[1:]:
            out = out | self._allows(branch, b, h, q, kv, data)
        return out

    def _allows(
        self, branch: Branch, b: Positions, h: Positions, q: Positions, kv: Positions,
        data: Data | None,
    ) -> Any:  # fmt: skip
        heads = branch.head_range(self.heads)
        allowed = branch.mask.allows(b, h, q, kv, data)
        if len(heads) == self.heads:
            return allowed
        return allowed & (h >= heads.start) & (h < heads.stop)

    def classify(self, q: Regions, kv: Regions) -> Verdicts:
        # PARTIAL is always right: block masks are built head by head, from `at_head`.
        return np.full(len(q), PARTIAL)

    @property
    def parts(self) -> tuple[Mask, ...]:
        return tuple(branch.mask for branch in self.program.branches)

    @property
    def period(self) -> int | None:
        return None


@dataclass(frozen=True, eq=False)
class Work:
    """The mask of all branches and the order to compute in.

    block_masks: per device, built at the first call there; empty for masks that read data.
    """

    linked: Linked
    order: Order
    block_masks: dict[torch.device, tuple[BlockMaskPart, ...]] = field(
        default_factory=dict, repr=False
    )

    def parts(
        self, problem: Problem, device: torch.device, data: Mapping[str, Tensor]
    ) -> tuple[BlockMaskPart, ...]:
        """Block masks of a call; cached for masks that read no data."""
        if device in self.block_masks:
            return self.block_masks[device]
        parts = build(
            self.linked, problem.q_len, problem.kv_len, device, problem.heads, TILE, self.order,
            problem.q_offset, data,
        )  # fmt: skip
        if problem.device == "cpu":
            # Inductor's CPU kernel asserts that lists are as wide as all key tiles.
            parts = tuple(replace(part, block_mask=widen(part.block_mask)) for part in parts)
        if not self.linked.per_call:
            self.block_masks[device] = parts
        return parts
