"""The bytes that a graph holds at its peak once inductor has compiled it, before anything runs.

liveness counts a graph node by node. Inductor fuses nodes, so that many never become buffers, orders what is left anew, and
reuses dead buffers. No model of that stays right for long, so inductor itself writes its program here, and the program runs on
tensors without data: kernels do nothing, buffers have sizes alone, and each allocation and release is counted as Python makes it.

    graph --inductor--> program:  buf0 = empty_strided_cpu((64, 256), (256, 1))    held + 64 KiB
                                  extern_kernels.mm(x, w, out=buf0)
                                  buf1 = buf0; del buf0  # reuse
                                  kernel_0(buf1)                                    not compiled, not called
                                  return (buf1,)
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensor, FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .. import arguments
from .inductor_program import copied, written
from .liveness import number_of, value_of
from .workspaces import workspace, workspace_bytes

__all__ = ["Footprint", "copied", "donated", "in_compilation", "of_graph", "of_step", "workspace"]


@dataclass(frozen=True)
class Footprint:
    """What a compiled program holds, in bytes. input_bytes: what is there before it starts and is not counted in added_bytes."""

    peak_bytes: int
    input_bytes: int

    @property
    def added_bytes(self) -> int:
        """What the program needs beyond its inputs; less than 0 where it frees donated inputs and makes little."""
        return self.peak_bytes - self.input_bytes


def of_graph(
    module: GraphModule, *, sizes: Mapping[str, int] | None = None, donated: Collection[str] = (), inference: bool = True
) -> Footprint:
    """The footprint of one graph of aten operators: an inference, a forward or a backward, before or after inductor's own passes.

    sizes: values of symbols, as in {"s77": 4096}; other symbols count as the sizes that the graph was traced with. donated:
    placeholders that the program alone holds, as the saved activations of a backward. The module is left as it is. The options of
    torch._inductor.config count as they are.

    Raises ValueError where a node has no meta["val"], a size has no value, or sizes or branches depend on the data.
    """
    arguments.kind("module", module, GraphModule, "Trace the model: torch.export or make_fx")
    sizes, donated = arguments.sizes(sizes), arguments.names("donated", donated)
    program = _Program(module, inference=inference, donated=donated)
    with _Meter() as meter:
        inputs = _Inputs(sizes)
        given = [inputs.make(node) for node in program.placeholders]
        del inputs  # it holds what is donated
        before = meter.held
        kept = [value for name, value in zip(program.names, given, strict=True) if name not in donated]
        kept.append(program.run(given))
    return Footprint(meter.peak, before)


def of_step(forward: GraphModule, backward: GraphModule, *, sizes: Mapping[str, int] | None = None) -> Footprint:
    """The footprint of a training step: a forward, what it saves, and the backward that takes it up.

    The placeholders of the backward bear the names of the forward's outputs and inputs, as AOTAutograd's partitioners leave them;
    others are gradients of the outputs. The caller holds the forward's inputs and those outputs that the backward does not take.
    """
    for name, module in (("forward", forward), ("backward", backward)):
        arguments.kind(name, module, GraphModule, "Give the two halves of a step, as a partitioner makes them")
    sizes = arguments.sizes(sizes)
    first = _Program(forward, inference=False)
    second = _Program(backward, inference=False, donated=_donated(forward, backward))
    with _Meter() as meter:
        inputs = _Inputs(sizes)
        known = dict(zip(first.names, (inputs.make(node) for node in first.placeholders), strict=True))
        before, own = meter.held, list(known.values())
        outputs = first.run(list(known.values()))
        known.update(zip(first.outputs, outputs, strict=True))
        own += [value for name, value in zip(first.outputs, outputs, strict=True) if name not in second.donated]
        del outputs
        given = [known[node.name] if node.name in known else inputs.make(node) for node in second.placeholders]
        known.clear()
        del inputs
        own.append(second.run(given))
    return Footprint(meter.peak, before)


def donated(graph: Graph) -> list[str]:
    """The placeholders of a backward that torch.compile, which is at it now, lets the program free; none of another graph."""
    placeholders = [node.name for node in graph.nodes if node.op == "placeholder"]
    context = torch._guards.TracingContext.try_get()
    # Only a backward takes tangents: AOTAutograd names them so, and its partitioners know them by that name too.
    if context is None or context.fw_metadata is None or not any("tangents" in name for name in placeholders):
        return []
    return [placeholders[place] for place in context.fw_metadata.bw_donated_idxs or ()]


def in_compilation(module: GraphModule) -> int:
    """The peak of a graph that torch.compile is lowering now, for passes at that stage. Raises ValueError as of_graph does."""
    from torch._inductor import config

    freed = donated(module.graph)
    with config.patch(reorder_for_locality=False):  # it has been before this stage, and would undo an order that is tried
        return of_graph(module, donated=freed, inference=not freed).peak_bytes


class _Program:
    """What inductor makes of a graph. names, outputs: of the placeholders and results in order, "" where a result is no node."""

    def __init__(self, module: GraphModule, *, inference: bool, donated: Collection[str] = ()) -> None:
        self.placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
        self.names = [node.name for node in self.placeholders]
        self.outputs = [node.name if isinstance(node, Node) else "" for node in _results(module)]
        self.donated = frozenset(donated)
        if unknown := self.donated - set(self.names):
            raise ValueError(
                f"donated must name placeholders of the graph; got {sorted(unknown)}. It has {', '.join(self.names)}"
            )
        places = [place for place, name in enumerate(self.names) if name in self.donated]
        self._call = written(copied(module), [value_of(node) for node in self.placeholders], inference, places)

    def run(self, inputs: list[Any]) -> Sequence[Any]:
        """Takes the inputs over: the list is empty afterwards."""
        try:
            results: Sequence[Any] = self._call(inputs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise ValueError(
                f"the sizes or branches of the graph depend on its data ({error}), so its peak is unknown"
            ) from error
        return results


class _Inputs:
    """Tensors without data for placeholders. Those that are one storage in the trace are one here."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self.sizes, self.storages = sizes, dict[int, Tensor]()

    def make(self, node: Node) -> Any:
        value = value_of(node)
        if isinstance(value, torch.SymInt):
            return number_of(value, node, self.sizes)
        if not isinstance(value, Tensor):
            return value
        size, stride, offset, total = (
            pytree.tree_map(lambda each: number_of(each, node, self.sizes), each)
            for each in (
                list(value.shape),
                list(value.stride()),
                value.storage_offset(),
                value.untyped_storage().nbytes() // value.element_size(),
            )
        )
        key = value.untyped_storage()._cdata
        if key not in self.storages:
            self.storages[key] = torch.empty(total, dtype=value.dtype, device=value.device)
        return torch.as_strided(self.storages[key].view(value.dtype), size, stride, offset)


class _Meter(TorchDispatchMode):
    """Counts the bytes of all storages that are made under it as long as they live. Tensors made under it have no data."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held = self.peak = 0
        self._seen: set[int] = set()
        self._fake = ExitStack()

    def __enter__(self) -> _Meter:
        self._fake.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        self._fake.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, FakeTensor):
                self._see(leaf)
        self.peak = max(self.peak, self.held + workspace_bytes(func, args, kwargs or {}))
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._forget, key, size).atexit = False

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.held -= size


def _results(module: GraphModule) -> list[Any]:
    (results,) = module.graph.find_nodes(op="output")[0].args
    return pytree.tree_leaves(results, _is_none)


def _donated(forward: GraphModule, backward: GraphModule) -> list[str]:
    """Placeholders of the backward that nobody else holds: made by the forward, and neither result of the step."""
    outputs, names = [node for node in _results(forward) if isinstance(node, Node)], Counter[str]()
    placeholders = [node for node in backward.graph.nodes if node.op == "placeholder"]
    names.update(node.name for node in outputs)
    saved = {node.name for node in placeholders} & {name for name, times in names.items() if times == 1}
    others = [node for node in forward.graph.nodes if node.op == "placeholder"]
    others += [node for node in outputs if node.name not in saved]
    others += [node for node in _results(backward) if isinstance(node, Node)]
    held = {_storage(node) for node in others}
    return [node.name for node in placeholders if node.name in saved and _storage(node) not in held | {None}]


def _storage(node: Node) -> int | None:
    value = value_of(node)
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None


def _is_none(value: Any) -> bool:
    return value is None
