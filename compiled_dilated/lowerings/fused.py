"""Lowerings that compute whole programs in kernels of their own.

`auto` weighs them on a GPU only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from ..calls import Call
from ..partials import Saved, merge_
from ..plans import Problem, Proposal, Refusal
from . import hidden


@dataclass(frozen=True)
class Fused:
    """A lowering by its functions; see `protocol.Lowering`.

    name: as users write it.
    propose_program: one answer for a problem; its work is an argument of the next two functions.
    run_forward: (work, problem, call, q, k, v) to out and lse.
    run_backward: (work, problem, call, saved) to the gradients of q, k and v.
    keeps_hidden_out: whether both functions keep NaN in hidden keys out of their results.
    """

    name: str
    propose_program: Callable[[Problem], Proposal | Refusal]
    run_forward: Callable[[Any, Problem, Call, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    run_backward: Callable[[Any, Problem, Call, Saved], tuple[Tensor, Tensor, Tensor]]
    keeps_hidden_out: bool = False
    is_fused = True
    decides = False

    def is_weighed(self, device: str) -> bool:
        """Whether the device is a GPU."""
        return device != "cpu"

    def propose(self, problem: Problem) -> list[Proposal | Refusal]:
        """The whole program as one proposal."""
        return [self.propose_program(problem)]

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
        run = partial(self.run_forward, chosen[0].work[0], problem)
        if self.keeps_hidden_out:
            return run(call, q, k, v)
        return hidden.forward(run, call, q, k, v)

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
        """Merge the program's result into out and lse, in place.

        out: (B, Hq, N, Dv). lse: (B, Hq, N).
        """
        merge_(out, lse, *self.run_forward(chosen[0].work[0], problem, call, q, k, v))

    def backward(
        self,
        chosen: Sequence[Proposal],
        problem: Problem,
        call: Call,
        saved: Saved,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v.

        Gradients of a score_mod's operands are added to its sums.
        """
        run = partial(self.run_backward, chosen[0].work[0], problem)
        if self.keeps_hidden_out:
            return run(call, saved)
        return hidden.backward(run, call, saved)
