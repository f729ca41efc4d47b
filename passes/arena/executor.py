"""A graph that runs in one arena, allocated once: what a served model needs is one number, known before it runs.

arena   |<------------------ height ------------------>|
mm      [ a          ]                                     mm.out(x, w, out=a)
gelu                  [ b          ]                       gelu.out(a, out=b)
conv    [ c    ]      :            :                       c.copy_(conv(b, k)), for conv has no out-variant of its own
view                  [ b          ]                       run as it is: it lies where its base lies
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.node import map_arg
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils import _pytree as pytree

from .. import arguments
from ..analysis.inductor_program import copied_graph
from ..analysis.liveness import attribute, lifetimes, value_of
from .placements import Buffer, Placement
from .solver import solve

# What torch's own allocators give, so that kernels take the same paths as in eager mode.
_ALIGNMENT = 64
# Their result is their first operand laid out anew: it is copied straight to its place.
_COPIES = {torch.ops.aten.clone.default, torch.ops.aten._to_copy.default}

Action = Callable[..., Any]


class Executor:
    """Runs an inference graph with every intermediate and result in one arena, allocated here and kept.

    Results are those of the graph run eagerly, bit for bit. They lie in the arena: the next call overwrites them, so clone what
    must outlive it. Operators with an out-variant of their own kernel write there directly; the others (`copied` names them)
    compute as usual and are copied, so that during such a node its result is there twice. What kernels allocate for themselves
    comes on top.

    graph_module: operators alone (torch.export or make_fx; decomposed to core operators more of them have out-variants), forward
    only, on one device. example_inputs: what the graph takes; later calls must bring the same shapes, strides, dtypes and
    devices. seconds: for the placement. Raises ValueError where lifetimes are not known (see liveness.lifetimes).
    """

    def __init__(self, graph_module: GraphModule, example_inputs: Sequence[Any], *, seconds: float = 10) -> None:
        arguments.rate("seconds", seconds, zero=True)
        self._module = _static(graph_module, example_inputs)
        self._examples = tuple(self._module.graph.process_inputs(*example_inputs))
        storages = [each for each in lifetimes(self._module).storages if not each.is_input]
        self.buffers = tuple(Buffer(each.lower, each.upper, each.size) for each in storages)
        self.placement: Placement = solve(self.buffers, seconds=seconds, alignment=_ALIGNMENT)
        devices = sorted({each.device for each in storages})
        if len(devices) > 1:
            raise ValueError(f"graph_module must make tensors on one device; got {', '.join(devices)}. Make an executor for each")
        self.arena = torch.empty(self.height, dtype=torch.uint8, device=devices[0] if devices else "cpu")
        self._offsets = {each.name: offset for each, offset in zip(storages, self.placement.offsets, strict=True)}
        self._copied: list[str] = []
        self._actions = {node: self._action(node) for node in self._module.graph.nodes if node.op == "call_function"}

    @property
    def height(self) -> int:
        """Bytes of the arena."""
        return self.placement.height

    @property
    def copied(self) -> tuple[str, ...]:
        """The nodes that compute into memory of their own and are copied."""
        return tuple(self._copied)

    def __repr__(self) -> str:
        return f"Executor({self.placement}, {len(self._copied)} of {len(self._actions)} nodes copied)"

    @torch.no_grad()
    def __call__(self, *inputs: Any) -> Any:
        graph = self._module.graph
        given = tuple(graph.process_inputs(*inputs))
        values: dict[Node, Any] = {}
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        _check(placeholders, given, self._examples)
        values.update(zip(placeholders, given, strict=True))
        for node in graph.nodes:
            if node.op == "get_attr":
                values[node] = attribute(node)
            elif node.op == "call_function":
                values[node] = self._actions[node](*map_arg(node.args, values.get), **map_arg(node.kwargs, values.get))
            elif node.op == "output":
                return graph.process_outputs(map_arg(node.args[0], values.get))
        raise AssertionError("a graph ends with its output")

    def _action(self, node: Node) -> Action:
        """What computes a node's value from the values of its operands."""
        target: Action = node.target  # type: ignore[assignment]
        leaves, tree = pytree.tree_flatten(value_of(node))
        places = self._places(node, leaves)
        own = [place for place in places if place is not None]
        if not own:
            return target  # a view, an operation in place, a number
        if target in _COPIES:
            return lambda source, **_: own[0].copy_(source)
        if len(own) == len(places) and (variant := _out_variant(target, self.arena.device)):
            write, outs = variant[0], dict(zip(variant[1], own, strict=True))
            return lambda *args, **kwargs: write(*args, **kwargs, **outs)
        self._copied.append(node.name)

        def copy(*args: Any, **kwargs: Any) -> Any:
            made = zip(pytree.tree_leaves(target(*args, **kwargs)), places, strict=True)
            return pytree.tree_unflatten([leaf if place is None else place.copy_(leaf) for leaf, place in made], tree)

        return copy

    def _places(self, node: Node, leaves: Sequence[Any]) -> list[Tensor | None]:
        """Where in the arena each result of a node lies; None of what lies in an operand or is no tensor."""
        offsets: dict[int, int] = {}
        for number, leaf in enumerate(leaves):
            name = f"{node.name}[{number}]" if number else node.name
            if isinstance(leaf, Tensor) and name in self._offsets:
                offsets[leaf.untyped_storage()._cdata] = self._offsets[name]
        return [
            _laid(self.arena, offsets[leaf.untyped_storage()._cdata], leaf)
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata in offsets
            else None
            for leaf in leaves
        ]


def _laid(arena: Tensor, offset: int, like: Tensor) -> Tensor:
    """The bytes of the arena from `offset` on as a tensor of the same shape, strides and dtype."""
    start = offset // like.element_size() + int(like.storage_offset())
    empty = torch.empty(0, dtype=like.dtype, device=arena.device)
    return empty.set_(arena.untyped_storage(), start, like.shape, like.stride())


def _out_variant(op: Any, device: torch.device) -> tuple[Action, tuple[str, ...]] | None:
    """The overload of an operator that writes its results where it is told, and the names of the arguments that tell it.

    Only one with a kernel for the device: those that torch generates compute elsewhere and copy.
    """
    if not isinstance(op, torch._ops.OpOverload):
        return None
    wanted = [(argument.name, str(argument.type)) for argument in op._schema.arguments]
    for name in op.overloadpacket.overloads():
        variant = getattr(op.overloadpacket, name)
        arguments = variant._schema.arguments
        outs = tuple(argument.name for argument in arguments if argument.is_out)
        same = [(argument.name, str(argument.type)) for argument in arguments if not argument.is_out] == wanted
        if outs and same and len(outs) == len(op._schema.returns) and _has_kernel(variant, device):
            return variant, outs
    return None


def _has_kernel(op: torch._ops.OpOverload, device: torch.device) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), device.type.upper())


def _static(graph_module: GraphModule, example_inputs: Sequence[Any]) -> GraphModule:
    """The same graph with values as of the examples, in place of those that it was traced with."""
    if not isinstance(graph_module, GraphModule):
        raise TypeError(
            f"graph_module must be an fx GraphModule; got {type(graph_module).__name__}. Trace the model: torch.export or make_fx"
        )
    arguments.inputs("example_inputs", example_inputs)
    graph = copied_graph(graph_module.graph)
    module = GraphModule(graph_module, graph)
    inputs = graph.process_inputs(*example_inputs)
    expected = sum(node.op == "placeholder" for node in graph.nodes)
    if len(inputs) != expected:
        raise ValueError(f"example_inputs must be the graph's {expected} inputs; got {len(inputs)}")
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node, value in zip(placeholders, inputs, strict=True):
        if isinstance(node.meta.get("val"), Tensor) and not isinstance(value, Tensor):
            raise TypeError(f"input {node.name} must be a tensor; got {type(value).__name__} {arguments.shown(value)}")
    for node in graph.nodes:
        if _is_sized_by_data(node):
            raise ValueError(
                f"{node.name} ({node.target}) makes as much as its data say, so no arena can be laid out for it. "
                "Leave it out of the graph"
            )
    # Loops need an environment for symbols even where every shape is fixed.
    mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True, allow_non_fake_inputs=True)
    FakeTensorProp(module, mode).propagate(*inputs)
    return module


def _is_sized_by_data(node: Node) -> bool:
    """Whether a result has as many elements as the values of its operands say; of indices, those that are masks do that."""
    if not isinstance(node.target, torch._ops.OpOverload) or torch.Tag.dynamic_output_shape not in node.target.tags:
        return False
    if node.target is not torch.ops.aten.index.Tensor:
        return True
    values = [each.meta.get("val") for each in pytree.tree_leaves(node.args[1]) if isinstance(each, Node)]
    return any(value is None or value.dtype in (torch.bool, torch.uint8) for value in values)


def _check(placeholders: Sequence[Node], given: Sequence[Any], examples: Sequence[Any]) -> None:
    if len(given) != len(placeholders):
        raise ValueError(f"the graph takes {len(placeholders)} inputs; got {len(given)}")
    for node, value, example in zip(placeholders, given, examples, strict=True):
        if _told(value) != _told(example):
            raise ValueError(
                f"input {node.name} must be as in the example, {_told(example)}; got {_told(value)}. "
                "The arena is laid out for the example: make another Executor"
            )


def _told(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    return f"{value.dtype} {tuple(value.shape)} with strides {value.stride()} on {value.device}"
