"""The lowerings that run batches of dense tiles."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..calls import Call
from ..partials import Saved, empty_out, is_by_token, lse_dtype
from ..plans import Problem, Proposal, Refusal
from . import hidden
from .tiling import batches, costs
from .tiling.batches import Batch, Sums


@dataclass(frozen=True)
class Batched:
    """A lowering given by its `propose`; see `protocol.Lowering`.

    name: as users write it.
    propose: a function of the problem; the work of its proposals is batches.
    automatic: whether `auto` weighs it.
    """

    name: str
    propose: Callable[[Problem], Sequence[Proposal | Refusal]]
    automatic: bool = True
    keeps_hidden_out = False
    is_fused = False
    decides = False

    def is_weighed(self, device: str) -> bool:
        """On every device."""
        return self.automatic

    def forward(
        self,
        chosen: Sequence[Proposal],
        problem: Problem,
        call: Call,
        q: Tensor,
        k: Tensor,
        v: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """out (B, Hq, N, Dv) and lse (B, Hq, N).

        out is in the dtype of q.
        """
        return hidden.forward(partial(self._forward, chosen, problem), call, q, k, v)

    def _forward(
        self,
        chosen: Sequence[Proposal],
        problem: Problem,
        call: Call,
        q: Tensor,
        k: Tensor,
        v: Tensor,
    ) -> tuple[Tensor, Tensor]:
        out = empty_out(q, v, is_by_token(q)).zero_()
        lse = q.new_full(q.shape[:3], -math.inf, dtype=lse_dtype(q.dtype))
        self.merge_into(chosen, problem, call, q, k, v, out, lse)
        return out, lse

    def merge_into(
        self,
        chosen: Sequence[Proposal],
        problem: Problem,
        call: Call,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
    ) -> None:
        """Merge the results of all batches into out and lse, in place.

        out: (B, Hq, N, Dv). lse: (B, Hq, N).
        """
        for batch in _batches(chosen):
            for piece, entries in costs.pieces(batch, problem, backward=False):
                batches.forward(piece, call, entries, q, k, v, out, lse)

    def backward(
        self, chosen: Sequence[Proposal], problem: Problem, call: Call, saved: Saved
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v.

        Gradients of a score_mod's operands are added to its sums.
        """
        return hidden.backward(partial(self._backward, chosen, problem), call, saved)

    def _backward(
        self, chosen: Sequence[Proposal], problem: Problem, call: Call, saved: Saved
    ) -> tuple[Tensor, Tensor, Tensor]:
        inputs = (saved.q, saved.k, saved.v)
        sums = [torch.zeros(x.shape, dtype=lse_dtype(x.dtype), device=x.device) for x in inputs]
        for batch in _batches(chosen):
            for piece, entries in costs.pieces(batch, problem, backward=True):
                batches.backward(piece, call, entries, saved, Sums(*sums))
        # Popped: each sum is freed as soon as it is rounded.
        grad_q, grad_k, grad_v = (sums.pop(0).to(x.dtype) for x in inputs)
        return grad_q, grad_k, grad_v


def _batches(chosen: Sequence[Proposal]) -> Iterator[Batch]:
    for proposal in chosen:
        yield from proposal.work
