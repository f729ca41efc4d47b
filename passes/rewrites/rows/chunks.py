"""What passes that work in chunks of rows have in common: how many rows a chunk has, and one node in the place of many."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from ... import arguments
from ...allocators import give_back_freed_memory
from ...analysis.liveness import source_of
from ...protocol import Stage


@dataclass(frozen=True)
class InChunks:
    """A pass over the graph as captured that is told rows of a chunk, or the bytes that they may take, or neither.

    Raises TypeError or ValueError where one of them is no int of at least 1, or both are given.
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
        """A product of fewer rows, and a softmax or a sum in parts, may add up in another order."""
        return False

    def rows_of(self, row_bytes: int, otherwise_bytes: int) -> int:
        """Rows of a chunk, at least one. otherwise_bytes: what they may take where nobody says."""
        return self.rows or max(1, (self.chunk_bytes or otherwise_bytes) // row_bytes)


def parts(rows: int, chunk_rows: int, device: torch.device) -> Iterator[slice]:
    """The chunks of so many rows; the last may be shorter.

    After them, on a CPU, what was freed leaves the process: values of a chunk are small enough for glibc to keep what they took,
    and whole activations too large to use it.
    """
    for start in range(0, rows, chunk_rows):
        yield slice(start, min(start + chunk_rows, rows))
    if rows > chunk_rows and device.type == "cpu":
        give_back_freed_memory()


def put(graph: Graph, node: Node, nodes: Sequence[Node], result: Node) -> str:
    """Puts `node` in the place of `nodes`, which come in the order of the graph and of which others use `result` alone.

    Returns the line of source that made the result.
    """
    node.meta.update(result.meta)
    result.replace_all_uses_with(node)
    for each in reversed(nodes):
        graph.erase_node(each)
    return source_of(node)
