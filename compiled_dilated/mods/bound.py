"""A score_mod bound to one call: operands, values by tile, gradients."""

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
    """A score_mod with the operands of one call.

    learned: numbers of the operands that get gradients.
    sums: per learned operand the sum of its gradients, in its shape, float32 or float64.
    places: from indices (b, h, q, kv) of a part of the sequence to those of the full sequence.
    """

    graph: Graph
    operands: tuple[Tensor, ...]
    learned: tuple[int, ...] = ()
    sums: tuple[Tensor, ...] = ()
    places: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] | None = None

    def on(self, *indices: Tensor) -> TileMod:
        """The mod on a tile.

        indices: b, h, q and kv of the tile's scores.
        """
        if self.places is not None:
            indices = self.places(*indices)
        return TileMod(self, indices)


@dataclass(frozen=True)
class TileMod:
    """A score_mod on one tile: scores (G, Hq, T, S) -> scores."""

    mod: Mod
    indices: tuple[Tensor, ...]

    def __call__(self, scores: Tensor) -> Tensor:
        return self.mod.graph.score(self.mod.operands, scores, *self.indices)

    def pull(self, scores: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The new scores and their vjp.

        The vjp maps the gradient of the new scores to that of `scores`. It adds the gradients of
        the learned operands to the mod's sums.
        """
        mod = self.mod
        learned = tuple(mod.operands[number] for number in mod.learned)

        # vjp differentiates by all arguments: the scores and the learned operands.
        def modify(scores: Tensor, *learned: Tensor) -> Tensor:
            operands = list(mod.operands)
            for number, operand in zip(mod.learned, learned, strict=True):
                operands[number] = operand
            return mod.graph.score(operands, scores, *self.indices)

        result: Any = torch.func.vjp(modify, scores, *learned)
        modified, vjp = result

        # The sums collect the gradients of all tiles of the call.
        def back(grad: Tensor) -> Tensor:
            grad_scores, *grads = vjp(grad)
            for total, part in zip(mod.sums, grads, strict=True):
                total.add_(part)
            return grad_scores  # type: ignore[no-any-return]

        return modified, back


# dtype and shape of an operand: the key by which plans and caches compare it.
Kind = tuple[str, tuple[int, ...]]


def kind_of(x: Tensor) -> Kind:
    """The dtype and shape of an operand."""
    return str(x.dtype).removeprefix("torch."), tuple(x.shape)


def sums_dtype(operands: Sequence[Tensor], learned: Sequence[int]) -> torch.dtype:
    """The dtype of the learned operands' gradient sums."""
    if any(operands[number].dtype == torch.float64 for number in learned):
        return torch.float64
    return torch.float32


def zero_sums(operands: Sequence[Tensor], learned: Sequence[int]) -> tuple[Tensor, ...]:
    """Gradient sums of the learned operands, zero."""
    dtype = sums_dtype(operands, learned)
    sums = []
    for number in learned:
        operand = operands[number]
        sums.append(torch.zeros(operand.shape, dtype=dtype, device=operand.device))
    return tuple(sums)


def flat(sums: Sequence[Tensor], like: Tensor) -> Tensor:
    """Concatenate the sums to one vector, the result of an operator.

    like: a tensor on the result's device, used only where there are no sums.
    """
    if not sums:
        return like.new_empty(0, dtype=sums_dtype((), ()))
    return torch.cat([total.reshape(-1) for total in sums])


def unflat(vector: Tensor, operands: Sequence[Tensor], learned: Sequence[int]) -> list[Tensor]:
    """Split a vector of `flat` into the gradients of learned operands."""
    if not learned:
        return []
    sizes = [math.prod(operands[number].shape) for number in learned]
    gradients = []
    for part, number in zip(vector.split(sizes), learned, strict=True):
        operand = operands[number]
        gradients.append(part.reshape(operand.shape).to(operand.dtype))
    return gradients
