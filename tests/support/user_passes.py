"""Passes of a user.

One rewrites, one sets options, one is not frozen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import Graph

from passes import Stage

aten = torch.ops.aten


class Twice(nn.Module):
    """A model with a product that Doubled rewrites."""

    def forward(self, x: Tensor) -> Tensor:
        return x.cos() * 2


@dataclass(frozen=True)
class Doubled:
    """A user's pass: x * 2 becomes x + x.

    The bits are the same.

    runs: the graphs that it was called with, as text
    """

    runs: ClassVar[list[str]] = []
    stage: ClassVar[Stage] = Stage.LOWERED
    keeps_bits: ClassVar[bool] = True

    def __call__(self, graph: Graph) -> Sequence[str]:
        lines: list[str] = []
        for node in graph.find_nodes(op="call_function", target=aten.mul.Tensor):
            if node.args[1] == 2:
                node.target, node.args = aten.add.Tensor, (node.args[0], node.args[0])
                lines.append(f"{node.name} is a sum")
        self.runs.append(str(graph))
        return lines


@dataclass
class Unfrozen:
    """A pass that is no frozen dataclass."""

    stage: ClassVar[Stage] = Stage.LOWERED
    keeps_bits: ClassVar[bool] = True

    def __call__(self, graph: Graph) -> Sequence[str]:
        return []


@dataclass(frozen=True)
class WithOptions:
    """A pass that sets options of inductor."""

    options: dict[str, Any]
    stage: ClassVar[Stage] = Stage.LOWERED
    keeps_bits: ClassVar[bool] = True

    def __call__(self, graph: Graph) -> Sequence[str]:
        return []
