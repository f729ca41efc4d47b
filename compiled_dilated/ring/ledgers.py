"""Counters of an executed ring, incremented by the transports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass
class Ledger:
    """Totals over all ranks, and the largest memory of one rank.

    most_held_bytes: largest sum of the shards and messages of one rank at one time.
    """

    steps: int = 0
    messages: int = 0
    received_bytes: int = 0
    most_held_bytes: int = 0

    def note(
        self, received: Sequence[tuple[Tensor, Tensor]], shards: Sequence[Tensor | None]
    ) -> None:
        """Count a step of a rank.

        received: keys and values per message.
        shards: all other tensors of the rank; None for absent ones.
        """
        received_bytes = sum(k.nbytes + v.nbytes for k, v in received)
        shard_bytes = sum(x.nbytes for x in shards if x is not None)
        self.steps += 1
        self.messages += len(received)
        self.received_bytes += received_bytes
        self.most_held_bytes = max(self.most_held_bytes, received_bytes + shard_bytes)
