"""The peak of a graph once inductor has compiled it, in bytes.

liveness counts a graph node by node. Inductor fuses nodes, so that many never become buffers,
orders the rest anew and reuses dead buffers. No model of that stays right for long, so inductor
itself generates its program here. The program then runs on tensors without data: kernels do
nothing, and each allocation and release is counted as it happens.

    graph --inductor--> program:  buf0 = empty_strided_cpu((64, 256), (256, 1))    + 64 KiB
                                  extern_kernels.mm(x, w, out=buf0)
                                  buf1 = buf0; del buf0  # reuse
                                  kernel_0(buf1)                                    does nothing
                                  return (buf1,)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from .. import arguments
from .inductor_program import copied, written
from .meter import Meter
from .values import number_of, value_of
from .workspaces import workspace

__all__ = ["Footprint", "copied", "donated", "in_compilation", "of_graph", "of_step", "workspace"]


@dataclass(frozen=True)
class Footprint:
    """The memory of a compiled program in bytes.

    peak_bytes: the most at one time, inputs included
    input_bytes: of the inputs, before the program starts
    """

    peak_bytes: int
    input_bytes: int

    @property
    def added_bytes(self) -> int:
        """The peak beyond the inputs.

        Negative if the program frees inputs and allocates little.
        """
        return self.peak_bytes - self.input_bytes


def of_graph(
    module: GraphModule,
    *,
    sizes: Mapping[str, int] | None = None,
    donated: Collection[str] = (),
    inference: bool = True,
) -> Footprint:
    """The footprint of one aten graph: inference, forward or backward.

    The graph may be from before or after inductor's own passes, and is not changed. The current
    options of torch._inductor.config apply.

    sizes: values of symbols, as in {"s77": 4096}; other symbols count as traced
    donated: placeholders that the program may free, as a backward its saved activations

    Raises ValueError if a node has no meta["val"], a size has no value, or sizes or branches
    depend on the data.
    """
    arguments.kind("module", module, GraphModule, "Trace the model: torch.export or make_fx")
    sizes, donated = arguments.sizes(sizes), arguments.names("donated", donated)
    program = _Program(module, inference=inference, donated=donated)
    with FakeTensorMode(allow_non_fake_inputs=True), Meter() as meter:
        factory = _Inputs(sizes)
        inputs = list(map(factory.make, program.placeholders))
        # The factory refers to every input, donated ones too.
        del factory
        input_bytes = meter.live_bytes
        # A comprehension: a loop's variable would keep the last input alive.
        owned_by_caller = [
            value for name, value in zip(program.names, inputs, strict=True) if name not in donated
        ]
        owned_by_caller.append(program.run(inputs))
    return Footprint(meter.peak_bytes, input_bytes)


def of_step(
    forward: GraphModule, backward: GraphModule, *, sizes: Mapping[str, int] | None = None
) -> Footprint:
    """The footprint of a training step: forward, saved values and backward.

    The backward's placeholders have the names of the forward's outputs and inputs, as
    AOTAutograd's partitioners leave them; the others are gradients of the outputs. The caller
    keeps the forward's inputs, and those outputs that the backward does not take.
    """
    for name, module in (("forward", forward), ("backward", backward)):
        hint = "Give the two halves of a step from a partitioner"
        arguments.kind(name, module, GraphModule, hint)
    sizes = arguments.sizes(sizes)
    first = _Program(forward, inference=False)
    second = _Program(backward, inference=False, donated=_donated(forward, backward))
    with FakeTensorMode(allow_non_fake_inputs=True), Meter() as meter:
        factory = _Inputs(sizes)
        inputs = list(map(factory.make, first.placeholders))
        input_bytes = meter.live_bytes
        values = dict(zip(first.names, inputs, strict=True))
        owned_by_caller = list(inputs)
        # 1. The forward: its results stay with the caller, saved values with the backward.
        outputs = first.run(inputs)
        values.update(zip(first.outputs, outputs, strict=True))
        owned_by_caller += [
            value
            for name, value in zip(first.outputs, outputs, strict=True)
            if name not in second.donated
        ]
        del outputs
        # 2. The backward: no reference but its own may keep a donated input alive.
        for node in second.placeholders:
            if node.name not in values:
                values[node.name] = factory.make(node)
        inputs = [values[name] for name in second.names]
        values.clear()
        del factory
        owned_by_caller.append(second.run(inputs))
    return Footprint(meter.peak_bytes, input_bytes)


def donated(graph: Graph) -> list[str]:
    """The placeholders that the backward now being compiled may free.

    Empty for any other graph.
    """
    placeholders = [node.name for node in graph.nodes if node.op == "placeholder"]
    context = torch._guards.TracingContext.try_get()
    if context is None or context.fw_metadata is None:
        return []
    # Only a backward takes tangents, which AOTAutograd's partitioners recognize by name too.
    if not any("tangents" in name for name in placeholders):
        return []
    return [placeholders[place] for place in context.fw_metadata.bw_donated_idxs or ()]


def in_compilation(module: GraphModule) -> int:
    """The peak of the graph that torch.compile is lowering now, in bytes.

    For passes of Stage.LOWERED.

    Raises ValueError as of_graph does.
    """
    from torch._inductor import config

    freed = donated(module.graph)
    # Inductor has reordered for locality before this stage; again, it would undo a trial order.
    with config.patch(reorder_for_locality=False):
        return of_graph(module, donated=freed, inference=not freed).peak_bytes


class _Program:
    """Inductor's program for a graph.

    names: of the placeholders, in order
    outputs: of the nodes returned, in order; "" for a result that is no node
    donated: names of the placeholders that it frees
    """

    def __init__(
        self, module: GraphModule, *, inference: bool, donated: Collection[str] = ()
    ) -> None:
        self.placeholders = module.graph.find_nodes(op="placeholder")
        self.names = [node.name for node in self.placeholders]
        self.outputs = list(map(_name_of, _results(module)))
        self.donated = frozenset(donated)
        if unknown := self.donated - set(self.names):
            raise ValueError(
                f"donated must name placeholders of the graph; got {sorted(unknown)}. "
                f"It has {', '.join(self.names)}"
            )
        places = [place for place, name in enumerate(self.names) if name in self.donated]
        values = list(map(value_of, self.placeholders))
        self._call = written(copied(module), values, inference, places)

    def run(self, inputs: list[Any]) -> Sequence[Any]:
        """Run the program.

        inputs: the program takes them over, and leaves the list empty
        """
        try:
            results: Sequence[Any] = self._call(inputs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise ValueError(
                f"the sizes or branches of the graph depend on its data ({error}), "
                "so its peak is unknown"
            ) from error
        return results


class _Inputs:
    """Tensors without data for placeholders.

    Those that share a storage in the trace share one here.
    """

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self.sizes = sizes
        self.storages: dict[int, Tensor] = {}

    def make(self, node: Node) -> Any:
        """Make a placeholder's value: a tensor, or a number for a symbol."""
        value = value_of(node)
        if isinstance(value, torch.SymInt):
            return number_of(value, node, self.sizes)
        if not isinstance(value, Tensor):
            return value
        # One storage for all views of it in the trace.
        storage = value.untyped_storage()
        if storage._cdata not in self.storages:
            elements = number_of(storage.nbytes() // value.element_size(), node, self.sizes)
            self.storages[storage._cdata] = torch.empty(
                elements, dtype=value.dtype, device=value.device
            )
        return torch.as_strided(
            self.storages[storage._cdata].view(value.dtype),
            [number_of(size, node, self.sizes) for size in value.shape],
            [number_of(stride, node, self.sizes) for stride in value.stride()],
            number_of(value.storage_offset(), node, self.sizes),
        )


def _results(module: GraphModule) -> list[Any]:
    """A graph's results, flattened; None for a gradient that is not needed."""
    (results,) = module.graph.find_nodes(op="output")[0].args
    return pytree.tree_leaves(results, lambda value: value is None)


def _donated(forward: GraphModule, backward: GraphModule) -> list[str]:
    """The placeholders that the backward may free.

    They are saved by the forward, and no result of the step.
    """
    placeholders = backward.graph.find_nodes(op="placeholder")
    outputs = [node for node in _results(forward) if isinstance(node, Node)]
    # A value returned twice is both a result and saved: the caller has it too.
    times_returned = Counter(node.name for node in outputs)
    saved = {node.name for node in placeholders if times_returned[node.name] == 1}
    # Storages that are referred to from outside of the backward, by any view.
    shared = list(forward.graph.find_nodes(op="placeholder"))
    shared += [node for node in outputs if node.name not in saved]
    shared += [node for node in _results(backward) if isinstance(node, Node)]
    shared_storages = {None, *map(_storage, shared)}
    names: list[str] = []
    for node in placeholders:
        if node.name in saved and _storage(node) not in shared_storages:
            names.append(node.name)
    return names


def _storage(node: Node) -> int | None:
    """The identity of a value's storage; None if it is no tensor."""
    value = value_of(node)
    if not isinstance(value, Tensor):
        return None
    storage: int = value.untyped_storage()._cdata
    return storage


def _name_of(result: Any) -> str:
    """The name of a returned node, "" for any other result."""
    if isinstance(result, Node):
        return result.name
    return ""
