"""What a ring really did: counted by the transports while they do it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass
class Ledger:
    """What was really done, by all ranks together, and the most that one rank held in shards and messages."""

    steps: int = 0
    messages: int = 0
    received_bytes: int = 0
    most_held_bytes: int = 0

    def note(self, received: Sequence[tuple[Tensor, Tensor]], shards: Sequence[Tensor | None]) -> None:
        """A step of a rank that holds `shards`."""
        held = sum(x.nbytes for pair in received for x in pair)
        self.steps += 1
        self.messages += len(received)
        self.received_bytes += held
        self.most_held_bytes = max(self.most_held_bytes, held + sum(x.nbytes for x in shards if x is not None))
