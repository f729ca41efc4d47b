"""Spilled activations: written in forward, fetched in backward.

forward     x = gelu(h)    handle = write(x)    y = mm(x, w)    written(handle, x)      x is freed
                                   |----- a thread -----|
backward                         g = ...    fetch(handle, next handle, after=g) -> x    mm(g, x)

The partitioner chooses the saved values, on a copy of the joint graph. What it would recompute from
them is recomputed from fetched values instead, so that only handles cross from forward to backward
when the graph is split for good.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import SymInt, Tensor
from torch._guards import detect_fake_mode
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from ... import arguments
from ...analysis.joint import Halves, base, split
from ...analysis.peak import mebibytes
from ...analysis.schemas import is_view
from ...analysis.sources import source_of
from ...protocol import Stage
from .operators import FETCH, HOST, WRITE, WRITTEN
from .stores import INTEGERS


@dataclass(frozen=True)
class Spill:
    """Stores saved activations outside memory between forward and backward.

    to: "disk" for files without a name; "host" for pinned host memory, of a GPU's tensors only
    directory: of the files, tempfile's by default; not in memory, as a tmpfs is
    least_bytes: of an activation to spill; dynamic sizes count as traced

    Does not spill parameters, inputs, results and views of them: the caller keeps these anyway. A
    step takes one backward: a second one, after retain_graph=True, raises RuntimeError. A full disk
    raises OSError in forward.
    """

    to: Literal["disk", "host"] = "disk"
    directory: str | None = None
    least_bytes: int = 2**20

    stage: ClassVar[Stage] = Stage.JOINT
    keeps_bits: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.to not in ("disk", "host"):
            raise ValueError(f"to must be 'disk' or 'host'; got {arguments.shown(self.to)}")
        if self.directory is not None:
            self._check_directory(self.directory)
        arguments.whole("least_bytes", self.least_bytes, 1)

    def _check_directory(self, directory: object) -> None:
        text = arguments.shown(directory)
        if not isinstance(directory, str):
            raise TypeError(
                f"directory must be a str, which the graph can contain; got {text}. "
                "Write str(...) around a path"
            )
        if self.to == "host":
            raise ValueError(
                f"directory is for to='disk'; got {text} with to='host'. Leave one of them out"
            )
        if not (os.path.isdir(directory) and os.access(directory, os.W_OK)):
            raise ValueError(
                f"directory must be one that can be written to; got {text}. Make it first"
            )

    def __call__(self, graph: Graph) -> Sequence[str]:
        # 1. The values that the partitioner saves, of those that may be spilled.
        halves = split(graph)
        if halves is None:
            return []
        spilled = [node for node in halves.saved if self._is_spilled(node, halves)]
        if not spilled:
            return []
        # 2. Writes in the forward, fetches in the backward.
        directory = self.directory or ""
        if self.to == "host":
            directory = HOST
        transfers = _Transfers(graph, halves)
        for node in spilled:
            transfers.write(node, directory)
        transfers.rewire()
        lines: list[str] = []
        for node in spilled:
            size = mebibytes(_size(node))
            line = f"{node.name} is spilled to {self.to}: {size}  {source_of(node)}"
            lines.append(line.rstrip())
        return lines

    def _is_spilled(self, node: Node, halves: Halves) -> bool:
        """Whether to spill a saved value: dense, large, not the caller's."""
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            return False
        if value.element_size() not in INTEGERS or base(node) in halves.owned_by_caller:
            return False
        if self.to == "host" and value.device.type == "cpu":
            return False
        if any(_hint(size) is None for size in (*value.shape, *value.stride())):
            return False
        return _size(node) >= self.least_bytes


class _Transfers:
    """Rewrites a joint graph.

    A node has the same name in it and in its halves.
    """

    def __init__(self, graph: Graph, halves: Halves) -> None:
        self.graph, self.halves = graph, halves
        self.by_name: dict[str, Node] = {node.name: node for node in graph.nodes}
        self.mode = detect_fake_mode([node.meta.get("val") for node in graph.nodes])
        # By name of a saved value: its handle, the node that was written, and its shape.
        self.written: dict[str, tuple[Node, Node, list[int | Node]]] = {}
        # Nodes of the backward half in the joint graph, fetched and recomputed values.
        self.replacements: dict[Node, Node] = {}
        self.last_fetch: Node | None = None
        self.first_of_backward = next(
            node
            for node in graph.nodes
            if node.name in halves.dependent and node.op != "placeholder"
        )
        # The latest value of backward so far: a fetch waits for it, else all could run first.
        self.after = self.by_name[halves.tangents[0].name]

    def write(self, saved: Node, directory: str) -> None:
        """Write a saved value.

        Writing begins once it is computed, and ends after forward's last use of it.

        directory: as in operators.write
        """
        value = self._move_to_forward(self.by_name[saved.name])
        last_use = self.halves.last_uses[base(saved)]
        last = self._move_to_forward(self.by_name[last_use.name])
        with self.graph.inserting_before(value.next):
            # Dims from the outermost in memory on, so that the file is written in one piece.
            rows = self._permuted(value, _order(value))
            shape = [self._length(rows, dim) for dim in range(value.meta["val"].dim())]
            handle = self._call(WRITE, rows, directory)
        with self.graph.inserting_before(max(handle, last).next):
            self.written[value.name] = self._call(WRITTEN, handle, value), rows, shape

    def _move_to_forward(self, node: Node) -> Node:
        """Move a node before the backward, if it was traced later."""
        if node > self.first_of_backward:
            for operand in node.all_input_nodes:
                self._move_to_forward(operand)
            self.first_of_backward.prepend(node)
        return node

    def rewire(self) -> None:
        """Replace operands of the joint graph's backward by those of its half.

        Fetches and recomputed values are inserted just before their first use.
        """
        dependent = self.halves.dependent
        nodes = [node for node in self.graph.nodes if node.name in dependent]
        for node in nodes:
            if node.op == "placeholder":
                continue
            half_node = dependent[node.name]
            # What this node fetches waits for the latest of its other operands.
            operands = [
                self.by_name[operand.name]
                for operand in half_node.all_input_nodes
                if operand.name in dependent
            ]
            tensors = [
                operand for operand in operands if isinstance(operand.meta.get("val"), Tensor)
            ]
            self.after = max(tensors, default=self.after)
            with self.graph.inserting_before(node):
                node.args = map_arg(half_node.args, self._joint_node)
                node.kwargs = map_arg(half_node.kwargs, self._joint_node)
        (output,) = self.graph.find_nodes(op="output")
        (half_output,) = self.halves.backward.find_nodes(op="output")
        with self.graph.inserting_before(output):
            gradients = map_arg(half_output.args[0], self._joint_node)
        output.args = ([*output.args[0][: self.halves.results], *gradients],)

    def _joint_node(self, node: Node) -> Node:
        """The joint graph's node for one of the backward half."""
        if node.name in self.halves.dependent:
            return self.by_name[node.name]
        if node not in self.replacements:
            if node.name in self.written:
                self.replacements[node] = self._fetch(node.name)
            else:
                self.replacements[node] = self._recompute(node)
        return self.replacements[node]

    def _recompute(self, node: Node) -> Node:
        """The forward node, or a copy if an input must be fetched."""
        forward_node = self.by_name.get(node.name)
        if forward_node is not None and all(
            self._joint_node(operand) is self.by_name.get(operand.name)
            for operand in node.all_input_nodes
        ):
            return forward_node
        copy: Node = self.graph.node_copy(node, self._joint_node)
        if is_view(node):
            # A fetched tensor is dense; in forward it may have been part of another.
            self._evaluate(copy)
        return copy

    def _fetch(self, name: str) -> Node:
        """Insert the fetch of a saved value, prefetched by the one before."""
        handle, rows, shape = self.written[name]
        value = rows.meta["val"]
        fetched = self._call(FETCH, handle, None, self.after, shape, value.dtype, value.device)
        if self.last_fetch is not None:
            self.last_fetch.update_arg(1, handle)
        self.last_fetch = fetched
        order = _order(self.by_name[name])
        return self._permuted(fetched, [order.index(dim) for dim in range(len(order))])

    def _length(self, rows: Node, dim: int) -> int | Node:
        """A size as an argument: a number, or a node if dynamic."""
        size = rows.meta["val"].shape[dim]
        if isinstance(size, SymInt):
            return self._call(torch.ops.aten.sym_size.int, rows, dim)
        return int(size)

    def _permuted(self, node: Node, order: list[int]) -> Node:
        """A permutation of a node's dims; the node itself if in order."""
        if order == sorted(order):
            return node
        return self._call(torch.ops.aten.permute.default, node, order)

    def _call(self, target: Any, *arguments: Any) -> Node:
        """Insert a call with its traced value."""
        node = self.graph.call_function(target, arguments)
        self._evaluate(node)
        return node

    def _evaluate(self, node: Node) -> None:
        """Trace a node's value from those of its operands."""
        assert callable(node.target)
        assert self.mode is not None
        with self.mode:
            args = map_arg(node.args, lambda operand: operand.meta["val"])
            node.meta["val"] = node.target(*args, **node.kwargs)


def _order(node: Node) -> list[int]:
    """A value's dims, from the outermost in memory to the innermost."""
    value = node.meta["val"]
    return sorted(range(value.dim()), key=lambda dim: -(_hint(value.stride(dim)) or 0))


def _size(node: Node) -> int:
    """Bytes of a value, dynamic sizes as traced."""
    value = node.meta["val"]
    elements = math.prod(_hint(size) or 0 for size in value.shape)
    return elements * int(value.element_size())


def _hint(size: int | SymInt) -> int | None:
    """A size as a number, dynamic ones as traced; None if data-dependent."""
    return size if isinstance(size, int) else size.node.hint
