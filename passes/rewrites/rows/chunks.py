"""Chunks of rows, and replacing nodes: what passes in chunks share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from ... import arguments
from ...allocators import give_back_freed_memory
from ...analysis.sources import source_of
from ...protocol import Stage


@dataclass(frozen=True)
class InChunks:
    """A pass that replaces nodes by an operator in chunks of rows.

    rows: rows of a chunk
    chunk_bytes: instead, bytes of a chunk; it has as many rows as fit, at least one

    Raises TypeError or ValueError if one of them is no int of at least 1, or both are given.
    """

    rows: int | None = None
    chunk_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.rows is not None and self.chunk_bytes is not None:
            raise ValueError(f"rows or chunk_bytes, not both; got {self}")
        for name, value in (("rows", self.rows), ("chunk_bytes", self.chunk_bytes)):
            if value is not None:
                arguments.whole(name, value, 1)

    @property
    def stage(self) -> Stage:
        return Stage.DYNAMO

    @property
    def keeps_bits(self) -> bool:
        """False: products and sums in parts may add in another order."""
        return False

    def rows_of(self, row_bytes: int, default_bytes: int) -> int:
        """Rows of a chunk, at least one.

        row_bytes: bytes of one row
        default_bytes: bytes of a chunk if neither option is given
        """
        if self.rows is not None:
            return self.rows
        return max(1, (self.chunk_bytes or default_bytes) // row_bytes)


def chunks(rows: int, chunk_rows: int, device: torch.device) -> Iterator[slice]:
    """Yield slices of `chunk_rows` rows; the last may be shorter.

    After several chunks on a CPU, freed memory goes back to the system: glibc keeps blocks of the
    size of a chunk, and cannot use them for whole activations.
    """
    for start in range(0, rows, chunk_rows):
        yield slice(start, min(start + chunk_rows, rows))
    if rows > chunk_rows and device.type == "cpu":
        give_back_freed_memory()


def replace(graph: Graph, node: Node, members: Sequence[Node], result: Node) -> str:
    """Replace `members` by `node`, and return the source line that made `result`.

    members: in the order of the graph
    result: the only one of them that other nodes use
    """
    node.meta.update(result.meta)
    result.replace_all_uses_with(node)
    for member in reversed(members):
        graph.erase_node(member)
    return source_of(node)
