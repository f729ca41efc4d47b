"""Lifetimes of a graph's storages: when each is allocated and freed.

One storage per allocation, whatever names and views it has.

    step  node               x   a   w
      0   x = placeholder    #
      1   a = mm(x, x)       #   #          # used or allocated here
      2   v = view(a)        |   #          | live: for the caller, or for a later step
      3   w = add(x, 1)      #   |   #
      4   b = add_(v, w)     |   #   #      in-place: b is another name of v, so of a
      5   output(b)          |   #
                        [0, 6) [1, 6) [3, 5)

A step is a node's place in the graph; its operands and its results are live together while it runs.
A kernel's workspace, allocated and freed within one step, appears in no graph and is not counted.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from .. import arguments
from .schemas import check_memory, viewed_operand
from .sources import source_of
from .values import attribute, number_of, symbols_of, value_of

IntArray = npt.NDArray[np.int64]

# Loops that keep and join pieces in ways that their subgraphs do not show.
_UNCOUNTED_LOOPS = {"associative_scan", "scan"}
# Their subgraphs compute single scores; the rest is the kernel's workspace.
_SCALAR_SUBGRAPHS = {"flex_attention", "flex_attention_backward"}


@dataclass(frozen=True)
class Storage:
    """One allocation of `size` bytes, live during the steps [lower, upper).

    name: the node that allocates it, or "node[1]" for a later one of its results
    aliases: the names of all nodes whose values are in it, in the order of the graph
    is_input: it exists before the first step (arguments, parameters, constants)
    is_output: the graph returns it or a view of it
    source: the line of the user's code that allocates it, or ""
    """

    name: str
    size: int
    lower: int
    upper: int
    aliases: tuple[str, ...]
    is_input: bool = False
    is_output: bool = False
    device: str = "cpu"
    source: str = ""


@dataclass(frozen=True)
class Lifetimes:
    """The steps and storages of a graph.

    steps: names of nodes
    storages: in the order of their allocation
    nested[step]: peak bytes of a subgraph beyond the operands and results of the node that runs it
    """

    steps: tuple[str, ...]
    storages: tuple[Storage, ...]
    nested: tuple[int, ...]

    @cached_property
    def bytes_at(self) -> IntArray:
        """Live bytes during each step, inputs included, (steps,)."""
        change = np.zeros(len(self.steps) + 1, dtype=np.int64)
        for storage in self.storages:
            change[storage.lower] += storage.size
            change[storage.upper] -= storage.size
        return np.cumsum(change)[:-1] + np.array(self.nested, dtype=np.int64)

    @property
    def input_bytes(self) -> int:
        """Live bytes before the first step."""
        return sum(storage.size for storage in self.storages if storage.is_input)


def lifetimes(
    graph: Graph | GraphModule,
    *,
    sizes: Mapping[str, int] | None = None,
    donated: Collection[str] = (),
) -> Lifetimes:
    """The storages of a graph, with their lifetimes.

    The nodes have meta["val"], as those of torch.export, make_fx and inductor do.

    An unused value is freed at its own step. Of a node's subgraphs (cond, ...) the one
    with the highest peak counts, once; a loop's counts together with what it carries.

    sizes: values of symbols, as in {"s77": 4096}; other symbols count as traced
    donated: placeholders that the graph may free at their last use (a backward's saved
        activations); the caller keeps all others to the end

    Raises ValueError with the node's name if a lifetime is unknown: no meta["val"], a size without
    a value, tensors without one plain storage, operations that replace storages, module and method
    calls, scans.
    """
    if isinstance(graph, GraphModule):
        graph = graph.graph
    if not isinstance(graph, Graph):
        raise TypeError(
            f"graph must be an fx Graph or GraphModule; got {type(graph).__name__}. "
            "Trace it: torch.export or make_fx"
        )
    sizes, freed = arguments.sizes(sizes), arguments.names("donated", donated)
    _check_placeholders(graph, freed)
    _check_symbols(graph, sizes)
    return _Walk(graph, sizes, freed).lifetimes()


def _check_placeholders(graph: Graph, names: Collection[str]) -> None:
    """Raise ValueError if a donated name is no placeholder of the graph."""
    placeholders = [node.name for node in graph.nodes if node.op == "placeholder"]
    for name in sorted(names):
        if name not in placeholders:
            raise ValueError(
                f"donated must name placeholders of the graph; got {name!r}. "
                f"It has {', '.join(placeholders)}"
            )


def _check_symbols(graph: Graph, sizes: Mapping[str, int]) -> None:
    """Raise ValueError if a name is no symbol of the graph."""
    if not sizes:
        return
    symbols = set[str]()
    for node in graph.nodes:
        symbols.update(str(symbol) for symbol in symbols_of(node))
    for name in sizes:
        if name not in symbols:
            raise ValueError(
                f"sizes must name symbols of the graph; got {name!r}. "
                f"It has {', '.join(sorted(symbols)) or 'none'}"
            )


@dataclass
class _Live:
    """A storage during the walk, which may still extend it.

    inputs: the names of the inputs that it is; empty for one allocated by the graph
    """

    name: str
    size: int
    lower: int
    upper: int
    device: str
    source: str
    inputs: set[str] = field(default_factory=set)
    aliases: dict[str, None] = field(default_factory=dict)


class _Walk:
    """One walk over the nodes of a graph, in order.

    numbers[node]: the node's value with the number of its storage in place of every tensor, so
    that getitem finds its own
    """

    def __init__(self, graph: Graph, sizes: Mapping[str, int], donated: frozenset[str]) -> None:
        self.nodes, self.sizes, self.donated = list(graph.nodes), sizes, donated
        self.storages: list[_Live] = []
        self.numbers: dict[Node, Any] = {}
        # Two inputs may share a storage (tied weights). Any other result shares one with an
        # operand or with nothing.
        self.input_numbers: dict[int, int] = {}

    def lifetimes(self) -> Lifetimes:
        nested, returned = [0] * len(self.nodes), set[int]()
        for step, node in enumerate(self.nodes):
            # 1. Operands live at least until this step.
            used = set[int]()
            for operand in node.all_input_nodes:
                used.update(_leaves(self.numbers[operand]))
            for number in used:
                self.storages[number].upper = step + 1
            if node.op == "output":
                returned = used
                continue
            # 2. Results are new storages, or aliases of old ones.
            first_new = len(self.storages)
            self.numbers[node] = self._number(step, node)
            for number in _leaves(self.numbers[node]):
                self.storages[number].aliases[node.name] = None
            # 3. What subgraphs allocate beyond both.
            allocated = sum(storage.size for storage in self.storages[first_new:])
            nested[step] = self._nested(node, allocated)
        storages = tuple(
            self._finished(storage, number in returned)
            for number, storage in enumerate(self.storages)
        )
        return Lifetimes(tuple(node.name for node in self.nodes), storages, tuple(nested))

    def _finished(self, live: _Live, is_output: bool) -> Storage:
        # The caller keeps a storage to the end unless every input that it is was donated.
        is_input = bool(live.inputs)
        caller_keeps = is_input and not live.inputs <= self.donated
        return Storage(
            live.name,
            live.size,
            live.lower,
            len(self.nodes) if caller_keeps else live.upper,
            tuple(live.aliases),
            is_input,
            is_output,
            live.device,
            live.source,
        )

    def _number(self, step: int, node: Node) -> Any:
        """A node's value with storage numbers in place of tensors.

        Adds the storages that are new.
        """
        check_memory(node)
        # An item has the storage that its list or tuple has at that place.
        if node.target is operator.getitem:
            numbers = self.numbers[_node(node.args[0])]
            if not isinstance(numbers, int):
                return numbers[node.args[1]]
        value = value_of(node)
        if isinstance(value, torch.nn.Module):
            return None
        # An input may share a storage with an earlier input, a result with an operand.
        existing = self.input_numbers
        if node.op == "call_function":
            existing = self._operands(node)
        leaves, tree = pytree.tree_flatten(value)
        leaf_numbers = [
            self._leaf_number(step, node, result, leaf, existing)
            for result, leaf in enumerate(leaves)
        ]
        return pytree.tree_unflatten(leaf_numbers, tree)

    def _leaf_number(
        self, step: int, node: Node, result: int, leaf: Any, existing: dict[int, int]
    ) -> int | None:
        """The storage number of one result; None if it is no tensor.

        result: its place among the node's results
        existing: numbers of inputs or operands by the identity of their fake storages; extended
        """
        if not isinstance(leaf, Tensor):
            return None
        key = _identity(leaf, node)
        # A storage that is none of the operands' is new, unless the schema declares a view.
        if key not in existing:
            number = self._viewed(node, result)
            if number is None:
                number = len(self.storages)
                self.storages.append(self._allocated(step, node, result, leaf))
            existing[key] = number
        if node.op != "call_function":
            self.storages[existing[key]].inputs.add(node.name)
        return existing[key]

    def _allocated(self, step: int, node: Node, result: int, tensor: Tensor) -> _Live:
        """The storage that a node allocates for one of its results.

        result: its place among the node's results
        """
        name = f"{node.name}[{result}]" if result else node.name
        # Inputs exist before the first step.
        lower = step if node.op == "call_function" else 0
        size = number_of(tensor.untyped_storage().nbytes(), node, self.sizes)
        return _Live(name, size, lower, step + 1, str(tensor.device), source_of(node))

    def _operands(self, node: Node) -> dict[int, int]:
        """Storage numbers of a node's operands, by their fake storages' identities."""
        numbers: dict[int, int] = {}
        for operand in node.all_input_nodes:
            value = value_of(operand)
            if isinstance(value, torch.nn.Module):
                continue
            leaves = pytree.tree_leaves(value)
            leaf_numbers = pytree.tree_leaves(self.numbers[operand], _is_none)
            for leaf, number in zip(leaves, leaf_numbers, strict=True):
                if isinstance(leaf, Tensor):
                    numbers[_identity(leaf, operand)] = number
        return numbers

    def _viewed(self, node: Node, result: int) -> int | None:
        """The storage that a result views by its schema, or None."""
        operand = viewed_operand(node, result)
        if operand is None:
            return None
        # A list of tensors has no single storage.
        numbers = self.numbers[operand]
        return numbers if isinstance(numbers, int) else None

    def _nested(self, node: Node, allocated: int) -> int:
        """Peak bytes of a node's subgraphs beyond its operands and results.

        allocated: bytes of the node's results
        """
        is_higher_order = isinstance(node.target, torch._ops.HigherOrderOperator)
        name = getattr(node.target, "_name", "") if is_higher_order else ""
        if name in _SCALAR_SUBGRAPHS:
            return 0
        if name in _UNCOUNTED_LOOPS:
            raise ValueError(
                f"{node.name} is a {name}, and what it keeps between iterations is unknown. "
                "Unroll it, or use while_loop"
            )
        most = 0
        for operand in node.all_input_nodes:
            if operand.op != "get_attr":
                continue
            module = attribute(operand)
            if isinstance(module, GraphModule):
                inner = _Walk(module.graph, self.sizes, frozenset()).lifetimes()
                most = max(most, int(inner.bytes_at.max(initial=0)) - inner.input_bytes)
        if name == "while_loop":
            return most  # the last iteration's carry is still live, as large as the results
        if name == "map_impl":
            return max(most, allocated)  # the pieces are live until they are stacked
        return max(0, most - allocated)


def _identity(tensor: Tensor, node: Node) -> int:
    """The identity of a fake tensor's storage."""
    is_plain = type(tensor) in (Tensor, torch.nn.Parameter) or isinstance(tensor, FakeTensor)
    is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    if not is_plain or tensor.layout != torch.strided or is_wrapped:
        raise ValueError(
            f"{node.name} is a {type(tensor).__name__} of layout {tensor.layout}, not one strided "
            "storage of its own. Trace down to core operators on dense tensors: "
            "run_decompositions() of an exported program does"
        )
    return int(tensor.untyped_storage()._cdata)


def _leaves(numbers: Any) -> list[int]:
    """The storage numbers in a node's value."""
    return [number for number in pytree.tree_leaves(numbers) if number is not None]


def _is_none(value: Any) -> bool:
    return value is None


def _node(argument: Any) -> Node:
    assert isinstance(argument, Node)
    return argument
