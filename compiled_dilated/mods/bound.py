"""A score_mod of one call: its graph and operands, tile by tile, and the sums of the operands' gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .graphs import Graph


@dataclass(frozen=True)
class Mod:
    """A score_mod of one call: its graph and operands, and where the gradients of those that learn are summed.

    learned: numbers of the operands that get gradients. sums: one for each of them, in its shape, float32 or float64.
    places: from the indices of a part (b, h, q, kv) to those of the whole, where a part is computed.
    """

    graph: Graph
    operands: tuple[Tensor, ...]
    learned: tuple[int, ...] = ()
    sums: tuple[Tensor, ...] = ()
    places: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] | None = None

    def on(self, *indices: Tensor) -> TileMod:
        """The mod of a tile's scores."""
        if self.places is not None:
            indices = self.places(*indices)
        return TileMod(self, indices)


@dataclass(frozen=True)
class TileMod:
    """A score_mod of one tile: score (G, Hq, T, S) -> score."""

    mod: Mod
    indices: tuple[Tensor, ...]

    def __call__(self, scores: Tensor) -> Tensor:
        return self.mod.graph.score(self.mod.operands, scores, *self.indices)

    def pull(self, scores: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The new scores, and the function from their gradient to that of `scores`, which also adds to the mod's sums."""
        mod = self.mod
        learned = tuple(mod.operands[number] for number in mod.learned)

        def of(scores: Tensor, *learned: Tensor) -> Tensor:
            operands = list(mod.operands)
            for number, operand in zip(mod.learned, learned, strict=True):
                operands[number] = operand
            return mod.graph.score(operands, scores, *self.indices)

        result: Any = torch.func.vjp(of, scores, *learned)
        modified, vjp = result

        def back(grad: Tensor) -> Tensor:
            grad_scores, *grads = vjp(grad)
            for total, part in zip(mod.sums, grads, strict=True):
                total.add_(part)
            return grad_scores  # type: ignore[no-any-return]

        return modified, back


# dtype and shape of a tensor, as plans and caches compare operands.
Kind = tuple[str, tuple[int, ...]]


def kind_of(x: Tensor) -> Kind:
    """The dtype and shape of an operand."""
    return str(x.dtype).removeprefix("torch."), tuple(x.shape)


def sums_dtype(operands: Sequence[Tensor], learned: Sequence[int]) -> torch.dtype:
    """The dtype that gradients of the learned operands are summed in."""
    wide = any(operands[number].dtype == torch.float64 for number in learned)
    return torch.float64 if wide else torch.float32


def zero_sums(operands: Sequence[Tensor], learned: Sequence[int]) -> tuple[Tensor, ...]:
    """Sums of gradients that have not begun."""
    dtype = sums_dtype(operands, learned)
    return tuple(torch.zeros(operands[number].shape, dtype=dtype, device=operands[number].device) for number in learned)


def flat(sums: Sequence[Tensor], like: Tensor) -> Tensor:
    """The sums as one vector, the form in which an operator returns any number of them. like: on the device of an empty one."""
    return torch.cat([total.reshape(-1) for total in sums]) if sums else like.new_empty(0, dtype=sums_dtype((), ()))


def unflat(vector: Tensor, operands: Sequence[Tensor], learned: Sequence[int]) -> list[Tensor]:
    """The gradients in that vector, in the shapes and dtypes of their operands."""
    sizes = [math.prod(operands[number].shape) for number in learned]
    parts = vector.split(sizes) if sizes else ()
    return [part.reshape(operands[n].shape).to(operands[n].dtype) for part, n in zip(parts, learned, strict=True)]
