"""A graph executed in one arena of a size computed before.

arena   |<------------------ height ------------------>|
mm      [ a          ]                                     mm.out(x, w, out=a)
gelu                  [ b          ]                       gelu.out(a, out=b)
conv    [ c    ]      :            :                       c.copy_(conv(b, k)): no out-variant
view                  [ b          ]                       as it is, in the memory of its base
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
from ..analysis.liveness import lifetimes
from ..analysis.values import attribute, value_of
from .placements import Buffer, Placement
from .solver import solve

# As torch's own allocators align, so that kernels take the same paths as in eager mode.
_ALIGNMENT = 64
# Copies of their first operand, which can go straight into the arena.
_COPIES = {torch.ops.aten.clone.default, torch.ops.aten._to_copy.default}

Action = Callable[..., Any]


class Executor:
    """Runs an inference graph with every intermediate and result in one arena.

    Results are those of the graph run eagerly, bit for bit. The next call overwrites them, so clone
    what must outlive it. Operators with an out-variant that has a kernel write to the arena; the
    others (see `copied`) compute as usual and are copied, so during such a node its result exists
    twice. Workspaces of kernels come on top.

    graph_module: of operators (torch.export or make_fx), forward only, on one device; decomposed to
        core operators, more of them have out-variants
    example_inputs: the graph's inputs; later calls take the same shapes, strides, dtypes, devices
    seconds: for the placement

    Raises ValueError if lifetimes are unknown (see liveness.lifetimes).
    """

    def __init__(
        self, graph_module: GraphModule, example_inputs: Sequence[Any], *, seconds: float = 10
    ) -> None:
        arguments.rate("seconds", seconds, zero=True)
        self._module = _static(graph_module, example_inputs)
        self._examples = tuple(self._module.graph.process_inputs(*example_inputs))
        # 1. A placement of all storages that the graph allocates.
        storages = [storage for storage in lifetimes(self._module).storages if not storage.is_input]
        self.buffers = tuple(
            Buffer(storage.lower, storage.upper, storage.size) for storage in storages
        )
        self.placement: Placement = solve(self.buffers, seconds=seconds, alignment=_ALIGNMENT)
        # 2. The arena.
        devices = sorted({storage.device for storage in storages})
        if len(devices) > 1:
            raise ValueError(
                f"graph_module must make tensors on one device; got {', '.join(devices)}. "
                "Create an executor for each"
            )
        device = devices[0] if devices else "cpu"
        self.arena = torch.empty(self.height, dtype=torch.uint8, device=device)
        # 3. An action for each call, that writes there.
        self._offsets: dict[str, int] = {}
        for storage, offset in zip(storages, self.placement.offsets, strict=True):
            self._offsets[storage.name] = offset
        self._copied: list[str] = []
        self._actions: dict[Node, Action] = {}
        for node in self._module.graph.nodes:
            if node.op == "call_function":
                self._actions[node] = self._action(node)

    @property
    def height(self) -> int:
        """Bytes of the arena."""
        return self.placement.height

    @property
    def copied(self) -> tuple[str, ...]:
        """The names of nodes that compute into other memory and are copied."""
        return tuple(self._copied)

    def __repr__(self) -> str:
        return (
            f"Executor({self.placement}, {len(self._copied)} of {len(self._actions)} nodes copied)"
        )

    @torch.no_grad()
    def __call__(self, *inputs: Any) -> Any:
        graph = self._module.graph
        flat_inputs = tuple(graph.process_inputs(*inputs))
        placeholders = graph.find_nodes(op="placeholder")
        _check(placeholders, flat_inputs, self._examples)
        values: dict[Node, Any] = dict(zip(placeholders, flat_inputs, strict=True))
        for node in graph.nodes:
            if node.op == "get_attr":
                values[node] = attribute(node)
            elif node.op == "call_function":
                args, kwargs = map_arg((node.args, node.kwargs), values.get)
                values[node] = self._actions[node](*args, **kwargs)
            elif node.op == "output":
                return graph.process_outputs(map_arg(node.args[0], values.get))
        raise AssertionError("a graph ends with its output")

    def _action(self, node: Node) -> Action:
        """The function that computes a node's value from those of its operands."""
        target: Action = node.target  # type: ignore[assignment]
        leaves, tree = pytree.tree_flatten(value_of(node))
        places = self._places(node, leaves)
        allocated = [place for place in places if place is not None]
        if not allocated:
            return target  # a view, an in-place operator, a number
        if target in _COPIES:
            return lambda source, **_: allocated[0].copy_(source)
        variant = _out_variant(target, self.arena.device)
        if variant is not None and len(allocated) == len(places):
            write, names = variant
            outs = dict(zip(names, allocated, strict=True))
            return lambda *args, **kwargs: write(*args, **kwargs, **outs)
        self._copied.append(node.name)

        def copy(*args: Any, **kwargs: Any) -> Any:
            computed = pytree.tree_leaves(target(*args, **kwargs))
            results: list[Any] = []
            for leaf, place in zip(computed, places, strict=True):
                results.append(leaf if place is None else place.copy_(leaf))
            return pytree.tree_unflatten(results, tree)

        return copy

    def _places(self, node: Node, leaves: Sequence[Any]) -> list[Tensor | None]:
        """The arena's tensor for each result of a node.

        None for a view, or for what is no tensor.
        """
        # Results may share a storage, which has the name of the first of them.
        offsets: dict[int, int] = {}
        for number, leaf in enumerate(leaves):
            name = f"{node.name}[{number}]" if number else node.name
            if isinstance(leaf, Tensor) and name in self._offsets:
                offsets[leaf.untyped_storage()._cdata] = self._offsets[name]
        places: list[Tensor | None] = []
        for leaf in leaves:
            place: Tensor | None = None
            if isinstance(leaf, Tensor):
                offset = offsets.get(leaf.untyped_storage()._cdata)
                if offset is not None:
                    place = _tensor_at(self.arena, offset, leaf)
            places.append(place)
        return places


def _tensor_at(arena: Tensor, offset: int, like: Tensor) -> Tensor:
    """A tensor like another one, in the arena from `offset` on."""
    start = offset // like.element_size() + int(like.storage_offset())
    empty = torch.empty(0, dtype=like.dtype, device=arena.device)
    return empty.set_(arena.untyped_storage(), start, like.shape, like.stride())


def _out_variant(op: Any, device: torch.device) -> tuple[Action, tuple[str, ...]] | None:
    """The out-variant of an operator, and the names of its out arguments.

    Only one with a kernel for the device: those that torch generates compute elsewhere and copy.
    None if there is none.
    """
    if not isinstance(op, torch._ops.OpOverload):
        return None
    # It takes the operator's arguments, and one out argument for each result.
    expected = [(argument.name, str(argument.type)) for argument in op._schema.arguments]
    for name in op.overloadpacket.overloads():
        variant = getattr(op.overloadpacket, name)
        outs: list[str] = []
        operands: list[tuple[str, str]] = []
        for argument in variant._schema.arguments:
            if argument.is_out:
                outs.append(argument.name)
            else:
                operands.append((argument.name, str(argument.type)))
        is_match = operands == expected and len(outs) == len(op._schema.returns)
        if outs and is_match and _has_kernel(variant, device):
            return variant, tuple(outs)
    return None


def _has_kernel(op: torch._ops.OpOverload, device: torch.device) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), device.type.upper())


def _static(graph_module: GraphModule, example_inputs: Sequence[Any]) -> GraphModule:
    """Copy a graph, traced again with example inputs."""
    if not isinstance(graph_module, GraphModule):
        raise TypeError(
            f"graph_module must be an fx GraphModule; got {type(graph_module).__name__}. "
            "Trace the model: torch.export or make_fx"
        )
    arguments.inputs("example_inputs", example_inputs)
    graph = copied_graph(graph_module.graph)
    module = GraphModule(graph_module, graph)
    inputs = graph.process_inputs(*example_inputs)
    placeholders = graph.find_nodes(op="placeholder")
    if len(inputs) != len(placeholders):
        raise ValueError(
            f"example_inputs must be the graph's {len(placeholders)} inputs; got {len(inputs)}"
        )
    for node, value in zip(placeholders, inputs, strict=True):
        if isinstance(node.meta.get("val"), Tensor) and not isinstance(value, Tensor):
            raise TypeError(
                f"input {node.name} must be a tensor; "
                f"got {type(value).__name__} {arguments.shown(value)}"
            )
    for node in graph.nodes:
        if _is_sized_by_data(node):
            raise ValueError(
                f"{node.name} ({node.target}) makes as much as its data say, so no arena can be "
                "laid out for it. Leave it out of the graph"
            )
    # Loops need an environment for symbols even if every shape is static.
    mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True, allow_non_fake_inputs=True)
    FakeTensorProp(module, mode).propagate(*inputs)
    return module


def _is_sized_by_data(node: Node) -> bool:
    """Whether the number of elements of a result depends on data.

    Of indexing only the result of a mask is sized by data.
    """
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    if torch.Tag.dynamic_output_shape not in node.target.tags:
        return False
    if node.target is not torch.ops.aten.index.Tensor:
        return True
    # An index by numbers has their count, an index by a mask as many as are True.
    for index in pytree.tree_leaves(node.args[1]):
        if not isinstance(index, Node):
            continue
        value = index.meta.get("val")
        if value is None or value.dtype in (torch.bool, torch.uint8):
            return True
    return False


def _check(placeholders: Sequence[Node], inputs: Sequence[Any], examples: Sequence[Any]) -> None:
    """Raise ValueError unless the inputs are like the examples."""
    if len(inputs) != len(placeholders):
        raise ValueError(f"the graph takes {len(placeholders)} inputs; got {len(inputs)}")
    for node, value, example in zip(placeholders, inputs, examples, strict=True):
        expected, actual = _kind(example), _kind(value)
        if actual != expected:
            raise ValueError(
                f"input {node.name} must be as in the example, {expected}; got {actual}. "
                "The arena is laid out for the example: create another Executor"
            )


def _kind(value: Any) -> str:
    """A tensor without its data, or another value, as text."""
    if not isinstance(value, Tensor):
        return repr(value)
    return f"{value.dtype} {tuple(value.shape)} with strides {value.stride()} on {value.device}"
