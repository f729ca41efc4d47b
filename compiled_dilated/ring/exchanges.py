"""Exchanges: messages between two processes, in both directions at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist

# Functions of this module have the default group as a default argument, read at import time.
# torch.compile imports it: after init_process_group() it would keep that group's threads past
# destroy_process_group(), and they abort a process that exits. So import it here, before.
import torch.distributed.nn.functional
from torch import Tensor

from .steps import Message
from .workers import KeysAndValues, Worker


class Exchange:
    """Messages in flight in both directions; `wait` returns the received ones.

    outgoing: contiguous tensors for the rank `target`.
    incoming: buffers for the messages of the rank `source`.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        outgoing: Sequence[Tensor],
        target: int,
        incoming: Sequence[Tensor],
        source: int,
    ) -> None:
        # Buffers must live until their messages have arrived.
        self.incoming, self._outgoing = list(incoming), list(outgoing)
        self.source, self.target = source, target
        sends = [dist.P2POp(dist.isend, x, group=group, group_peer=target) for x in outgoing]
        receives = [dist.P2POp(dist.irecv, x, group=group, group_peer=source) for x in incoming]
        self._works: list[dist.Work] = []
        with transport_errors(f"could not reach rank {source} or rank {target}"):
            if sends or receives:
                self._works = dist.batch_isend_irecv(sends + receives)

    def wait(self) -> list[Tensor]:
        """The received messages; also waits until all outgoing ones are sent."""
        peers = f"receive from rank {self.source} or send to rank {self.target}"
        with transport_errors(f"could not {peers}"):
            for work in self._works:
                work.wait()
        self._outgoing = []
        return self.incoming


@contextmanager
def transport_errors(failure: str) -> Iterator[None]:
    """Turn failures of the transport into one clear error.

    failure: what this rank did, as the predicate of a sentence.
    """
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"the ring broke: this rank {failure} ({str(error).splitlines()[0]}). "
            "A rank has died or does not respond; start all ranks again "
            "(torchrun --max-restarts does), or set a longer timeout"
        ) from error


def packed(k: Tensor, v: Tensor) -> Tensor:
    """Keys and values concatenated into one message."""
    return torch.cat([k, v], dim=3)


def unpacked(x: Tensor, head_dim: int) -> KeysAndValues:
    """Keys and values of a message, as views."""
    return x[..., :head_dim], x[..., head_dim:]


def buffer(message: Message, worker: Worker, dtype: torch.dtype | None = None) -> Tensor:
    """Buffer for an incoming message, (B, heads, rows, D + Dv)."""
    width = worker.k.shape[3] + worker.v.shape[3]
    shape = (worker.k.shape[0], message.kv_heads.count, len(message.rows), width)
    return worker.k.new_empty(shape, dtype=dtype)
