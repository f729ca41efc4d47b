"""Saved activations leave memory when forward has last used them, and come back when backward first needs them.

forward     x = gelu(h)    handle = write(x)    y = mm(x, w)    written(handle, x)      x is freed here, as without us
                                   |----- a thread -----|
backward                                  g = ...    fetch(handle, next handle, after=g) -> x    mm(g, x)

Which values are saved is the partitioner's choice, made on a copy of the joint graph. What it would recompute from them is then
recomputed from what was fetched, so that nothing but handles is left to cross when the graph is split for good.
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
from ...analysis.joint import Halves, base, is_view, split
from ...analysis.liveness import source_of
from ...analysis.peak import mebibytes
from ...protocol import Stage
from .operators import FETCH, HOST, WRITE, WRITTEN
from .stores import INTEGERS


@dataclass(frozen=True)
class Spill:
    """Saved activations of `least_bytes` or more wait outside memory between forward and backward.

    to: "disk": files without a name in `directory` (tempfile's default), which should not be in memory itself as a tmpfs is.
    "host": pinned host memory, for tensors of a GPU alone; those of a CPU stay. Not spilled are parameters, inputs and forward's
    results, and views of them: the caller holds them anyway. A dynamic size counts as it was traced with.

    A step takes one backward: a second one, after retain_graph=True, raises RuntimeError. A full disk raises OSError in forward.
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
        got = arguments.shown(directory)
        if not isinstance(directory, str):
            raise TypeError(f"directory must be a str, which stands in the graph; got {got}. Write str(...) around a path")
        if self.to == "host":
            raise ValueError(f"directory is for to='disk'; got {got} with to='host'. Leave one of them out")
        if not (os.path.isdir(directory) and os.access(directory, os.W_OK)):
            raise ValueError(f"directory must be one that can be written to; got {got}. Make it first")

    def __call__(self, graph: Graph) -> Sequence[str]:
        halves = split(graph)
        if halves is None or not (chosen := [node for node in halves.saved if self._worth(node, halves)]):
            return []
        moves = _Moves(graph, halves)
        for node in chosen:
            moves.write(node, HOST if self.to == "host" else self.directory or "")
        moves.rewire()
        return [f"{node.name} waits on {self.to}: {mebibytes(_size(node))}  {source_of(node)}".rstrip() for node in chosen]

    def _worth(self, node: Node, halves: Halves) -> bool:
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.element_size() not in INTEGERS:
            return False
        if base(node) in halves.held or (self.to == "host" and value.device.type == "cpu"):
            return False
        known = all(_hint(each) is not None for each in (*value.shape, *value.stride()))
        return known and _size(node) >= self.least_bytes


class _Moves:
    """A joint graph while its saved values are being moved. A node has one name in it and in its halves."""

    def __init__(self, graph: Graph, halves: Halves) -> None:
        self.graph, self.halves = graph, halves
        self.named: dict[str, Node] = {node.name: node for node in graph.nodes}
        self.mode = detect_fake_mode([node.meta.get("val") for node in graph.nodes])
        # By name: the handle of what was written, what was written row by row, and its shape.
        self.written: dict[str, tuple[Node, Node, list[int | Node]]] = {}
        self.brought: dict[Node, Node] = {}
        self.last_fetch: Node | None = None
        self.first = next(node for node in graph.nodes if node.name in halves.dependent and node.op != "placeholder")
        # Of backward, what was computed last: a fetch waits for it, else all fetches could run first.
        self.after = self.named[halves.tangents[0].name]

    def write(self, saved: Node, place: str) -> None:
        """Begins where the value is made; waits where forward last reads its memory, so that it lives no longer for it."""
        value, last = (self._early(self.named[node.name]) for node in (saved, self.halves.last_uses[base(saved)]))
        with self.graph.inserting_before(value.next):
            rows = self._permuted(value, _order(value))
            shape = [self._length(rows, dim) for dim in range(value.meta["val"].dim())]
            begun = self._call(WRITE, rows, place)
        with self.graph.inserting_before(max(begun, last).next):
            self.written[value.name] = self._call(WRITTEN, begun, value), rows, shape

    def _early(self, node: Node) -> Node:
        """The node itself, moved in front of backward where the trace has it later: what is saved is then written before that."""
        if node > self.first:
            for each in node.all_input_nodes:
                self._early(each)
            self.first.prepend(node)
        return node

    def rewire(self) -> None:
        """Backward as its half has it: what it recomputes and fetches stands just before it is needed."""
        dependent = self.halves.dependent
        for node in [node for node in self.graph.nodes if node.name in dependent and node.op != "placeholder"]:
            like = dependent[node.name]
            operands = [self.named[each.name] for each in like.all_input_nodes if each.name in dependent]
            self.after = max((each for each in operands if isinstance(each.meta.get("val"), Tensor)), default=self.after)
            with self.graph.inserting_before(node):
                node.args, node.kwargs = map_arg(like.args, self._bring), map_arg(like.kwargs, self._bring)
        (output,), (like,) = self.graph.find_nodes(op="output"), self.halves.backward.find_nodes(op="output")
        with self.graph.inserting_before(output):
            gradients = map_arg(like.args[0], self._bring)
        output.args = ([*output.args[0][: self.halves.results], *gradients],)

    def _bring(self, node: Node) -> Node:
        """What a node of the backward half is in the joint graph, made at the insertion point where it is not there yet."""
        if node.name in self.halves.dependent:
            return self.named[node.name]
        if node not in self.brought:
            self.brought[node] = self._fetch(node.name) if node.name in self.written else self._again(node)
        return self.brought[node]

    def _again(self, node: Node) -> Node:
        """The node of forward itself, or where it would be recomputed from what is fetched, another like it."""
        known = self.named.get(node.name)
        if known is not None and all(self._bring(each) is self.named.get(each.name) for each in node.all_input_nodes):
            return known
        again: Node = self.graph.node_copy(node, self._bring)
        if is_view(node):  # what is fetched is dense, whatever its like in forward was a part of
            self._evaluate(again)
        return again

    def _fetch(self, name: str) -> Node:
        handle, rows, shape = self.written[name]
        value = rows.meta["val"]
        made = self._call(FETCH, handle, None, self.after, shape, value.dtype, value.device)
        if self.last_fetch is not None:
            self.last_fetch.update_arg(1, handle)
        self.last_fetch = made
        order = _order(self.named[name])
        return self._permuted(made, [order.index(dim) for dim in range(len(order))])

    def _length(self, rows: Node, dim: int) -> int | Node:
        """A size as an argument: where it is dynamic, the node that holds it."""
        size = rows.meta["val"].shape[dim]
        return self._call(torch.ops.aten.sym_size.int, rows, dim) if isinstance(size, SymInt) else size

    def _permuted(self, node: Node, order: list[int]) -> Node:
        return node if order == sorted(order) else self._call(torch.ops.aten.permute.default, node, order)

    def _call(self, target: Any, *arguments: Any) -> Node:
        node = self.graph.call_function(target, arguments)
        self._evaluate(node)
        return node

    def _evaluate(self, node: Node) -> None:
        assert callable(node.target)
        assert self.mode is not None
        with self.mode:
            node.meta["val"] = node.target(*map_arg(node.args, lambda x: x.meta["val"]), **node.kwargs)


def _order(node: Node) -> list[int]:
    """The dimensions from the outermost in memory to the innermost."""
    return sorted(range(node.meta["val"].dim()), key=lambda dim: -(_hint(node.meta["val"].stride(dim)) or 0))


def _size(node: Node) -> int:
    value = node.meta["val"]
    return math.prod(_hint(each) or 0 for each in value.shape) * int(value.element_size())


def _hint(size: int | SymInt) -> int | None:
    """A dynamic size as it was traced; None where it depends on data."""
    return size if isinstance(size, int) else size.node.hint
