"""The protocol of lowerings: propose, forward, merge_into, backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from ..calls import Call
from ..partials import Saved
from ..plans import Problem, Proposal, Refusal


class Lowering(Protocol):
    """A way to compute programs.

    Add one by a file with its class and a line in `registry.LOWERINGS`.

    name: as users write it, and as `explain` prints it.
    keeps_hidden_out: NaN and infinity in hidden keys never reach a merged result; without this
        property, keys are cleaned before a merge.
    is_fused: one kernel computes all branches; where one can, `auto` weighs no gathered tiles.
    decides: where it can compute a problem, `auto` weighs no other lowering.
    """

    @property
    def name(self) -> str: ...

    @property
    def keeps_hidden_out(self) -> bool: ...

    @property
    def is_fused(self) -> bool: ...

    @property
    def decides(self) -> bool: ...

    def is_weighed(self, device: str) -> bool:
        """Whether `auto` considers it for tensors on a kind of device."""
        ...

    def propose(self, problem: Problem) -> Sequence[Proposal | Refusal]:
        """One answer for all branches, or one per branch.

        A refusal gives the reason and the alternative.
        """
        ...

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
        ...

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
        """Merge a partial softmax into out and lse, in place.

        A lowering that cannot refuses problems with `partial`.

        out: (B, Hq, N, Dv). lse: (B, Hq, N).
        """
        ...

    def backward(
        self, chosen: Sequence[Proposal], problem: Problem, call: Call, saved: Saved
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v in their dtypes.

        Gradients of a score_mod's operands are added to its sums.
        """
        ...
