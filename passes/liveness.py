"""Which memory an fx graph holds at which step: one storage per allocation, whatever names and views it has.

    step  node               x   a   w
      0   x = placeholder    #
      1   a = mm(x, x)       #   #          # used or made here
      2   v = view(a)        |   #          | kept: by the caller, or for a later step
      3   w = add(x, 1)      #   |   #
      4   b = add_(v, w)     |   #   #      in place: b is another name of v, so of a
      5   output(b)          |   #
                        [0, 6) [1, 6) [3, 5)

A step is a node's place in the graph; its operands and its results live together while it runs. What a kernel allocates and frees
within one step (workspace) stands in no graph, so it is not counted.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import SymInt, Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from . import arguments

IntArray = npt.NDArray[np.int64]

# They change what memory a tensor has, behind the back of every other name of it.
_REPLACE_STORAGE = {"aten::set_", "aten::resize_", "aten::resize_as_", "inductor::resize_storage_bytes_"}
# A view by construction, though its schema denies it.
_UNDECLARED_VIEWS = {"aten::_unsafe_view"}
# Loops whose pieces are kept and joined in ways that their subgraphs do not tell.
_UNCOUNTED_LOOPS = {"associative_scan", "scan"}
# Their subgraphs speak of one score at a time; what their kernels hold meanwhile is workspace.
_OF_SCALARS = {"flex_attention", "flex_attention_backward"}
# Operands of operands that are asked where a node comes from.
_MOST_ASKED = 32
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)\n +(.*)')


@dataclass(frozen=True)
class Storage:
    """One allocation of `size` bytes, live during the steps [lower, upper).

    name: what made it: a node, or "node[1]" for a later one of its results. aliases: all nodes whose values lie in it, in the
    order of the graph. is_input: it is there before the first step (arguments, parameters, constants). is_output: the graph
    returns it or a view of it. source: the line of the user's code that made it, or "".
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
    """The steps of a graph by name, and its storages in the order in which they are made.

    nested[step]: bytes that a subgraph holds at its own peak beyond the operands and results of the node that runs it.
    """

    steps: tuple[str, ...]
    storages: tuple[Storage, ...]
    nested: tuple[int, ...]

    @cached_property
    def bytes_at(self) -> IntArray:
        """What lives during each step, inputs included, (steps,)."""
        change = np.zeros(len(self.steps) + 1, dtype=np.int64)
        for storage in self.storages:
            change[storage.lower] += storage.size
            change[storage.upper] -= storage.size
        return np.cumsum(change)[:-1] + np.array(self.nested, dtype=np.int64)

    @property
    def input_bytes(self) -> int:
        """What lives before the first step."""
        return sum(storage.size for storage in self.storages if storage.is_input)


def lifetimes(graph: Graph | GraphModule, *, sizes: Mapping[str, int] | None = None, donated: Collection[str] = ()) -> Lifetimes:
    """The storages of a graph whose nodes carry meta["val"], as those of torch.export, make_fx and inductor do.

    sizes: values of symbols, as in {"s77": 4096}; other symbols count as the sizes that the graph was traced with. donated:
    placeholders that the graph alone holds, which die at their last use (the saved activations of a backward); the caller holds
    all others to the end. A value that nobody uses dies where it is made. Of a node's subgraphs (cond, ...) the one that needs
    most counts, once; of a loop, together with what it keeps from turn to turn.

    Raises ValueError with the node's name where it cannot tell: no meta["val"], a size without a value, tensors without one plain
    storage, operations that replace storages, module and method calls, scans.
    """
    graph = graph.graph if isinstance(graph, GraphModule) else graph
    if not isinstance(graph, Graph):
        raise TypeError(
            f"graph must be an fx Graph or GraphModule; got {type(graph).__name__}. Trace it: torch.export or make_fx"
        )
    sizes, freed = arguments.sizes(sizes), arguments.names("donated", donated)
    placeholders = [node.name for node in graph.nodes if node.op == "placeholder"]
    for name in sorted(freed):
        if name not in placeholders:
            raise ValueError(f"donated must name placeholders of the graph; got {name!r}. It has {', '.join(placeholders)}")
    if sizes:
        symbols = {str(symbol) for node in graph.nodes for symbol in _symbols(node)}
        for name in sizes:
            if name not in symbols:
                raise ValueError(
                    f"sizes must name symbols of the graph; got {name!r}. It has {', '.join(sorted(symbols)) or 'none'}"
                )
    return _Walk(graph, sizes, freed).lifetimes()


def _symbols(node: Node) -> Collection[Any]:
    """The symbols of the sizes of a node's value."""
    # It brings sympy, which a graph with symbols has brought already.
    from torch.fx.experimental.symbolic_shapes import free_symbols

    leaves = pytree.tree_leaves(node.meta.get("val"))
    return {symbol for leaf in leaves if isinstance(leaf, Tensor | SymInt) for symbol in free_symbols(leaf)}


def value_of(node: Node) -> Any:
    """A node's value as traced: fake tensors, symbols, numbers, and lists of them. None of nodes that return nothing."""
    if node.op == "get_attr":
        return node.meta.get("val", attribute(node))
    if "val" in node.meta:
        return node.meta["val"]
    if isinstance(node.target, torch._ops.OpOverload) and not node.target._schema.returns:
        return None
    raise ValueError(
        f'{node.name} ({node.op} {node.target}) has no meta["val"], so its size is unknown. '
        "Trace with torch.export or make_fx, or run torch.fx.passes.fake_tensor_prop.FakeTensorProp on the graph"
    )


def number_of(size: int | torch.SymInt, node: Node, sizes: Mapping[str, int]) -> int:
    """A size with the values of its symbols: those given, else the hints of the trace. node: whose size it is, for the error."""
    if isinstance(size, int):
        return size
    symbolic = size.node
    values = {symbol: sizes.get(str(symbol)) for symbol in symbolic.expr.free_symbols}
    for symbol in [symbol for symbol, value in values.items() if value is None]:
        hint = symbolic.shape_env.backed_var_to_val.get(symbol)
        if hint is None:
            raise ValueError(
                f"{node.name} takes {symbolic.expr} bytes, and nothing says what {symbol} is. Pass sizes={{{str(symbol)!r}: ...}}"
            )
        values[symbol] = int(hint)
    return int(symbolic.expr.subs(values).doit())


def attribute(node: Node) -> Any:
    """What a get_attr node reads from the module that owns its graph."""
    found: Any = node.graph.owning_module
    for name in str(node.target).split("."):
        if not hasattr(found, name):
            raise ValueError(
                f"{node.name} reads {node.target!r}, which the graph's module does not have. Pass the GraphModule itself"
            )
        found = getattr(found, name)
    return found


@dataclass
class _Met:
    """A storage while the walk may still prolong it. owners: the inputs that are it."""

    name: str
    size: int
    lower: int
    upper: int
    device: str
    source: str
    owners: set[str] = field(default_factory=set)
    aliases: dict[str, None] = field(default_factory=dict)


class _Walk:
    """One pass over the nodes of a graph.

    `places[node]` is the node's value with the number of its storage in place of every tensor, so that getitem finds its own.
    """

    def __init__(self, graph: Graph, sizes: Mapping[str, int], donated: frozenset[str]) -> None:
        self.nodes, self.sizes, self.donated = list(graph.nodes), sizes, donated
        self.met: list[_Met] = []
        self.places: dict[Node, Any] = {}
        # Two inputs may be one storage (tied weights). Every other result shares one with an operand, or with nobody.
        self.inputs: dict[int, int] = {}

    def lifetimes(self) -> Lifetimes:
        nested, returned = [0] * len(self.nodes), set[int]()
        for step, node in enumerate(self.nodes):
            used = {number for each in node.all_input_nodes for number in _numbers(self.places[each])}
            for number in used:
                self.met[number].upper = step + 1
            if node.op == "output":
                returned = used
                continue
            first = len(self.met)
            self.places[node] = self._places(step, node)
            for number in _numbers(self.places[node]):
                self.met[number].aliases[node.name] = None
            nested[step] = self._nested(node, sum(each.size for each in self.met[first:]))
        storages = tuple(self._storage(each, number in returned) for number, each in enumerate(self.met))
        return Lifetimes(tuple(node.name for node in self.nodes), storages, tuple(nested))

    def _storage(self, met: _Met, is_output: bool) -> Storage:
        kept = bool(met.owners) and not met.owners <= self.donated
        upper = len(self.nodes) if kept else met.upper
        return Storage(
            met.name, met.size, met.lower, upper, tuple(met.aliases), bool(met.owners), is_output, met.device, met.source
        )

    def _places(self, step: int, node: Node) -> Any:
        if node.op not in ("placeholder", "get_attr", "call_function"):
            raise ValueError(
                f"{node.name} is a {node.op} of {node.target}, and what that allocates stands in no schema. "
                "Trace down to operators: torch.export or make_fx"
            )
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.name in _REPLACE_STORAGE:
            raise ValueError(
                f"{node.name} ({node.target}) replaces a tensor's storage, which has no fixed lifetime. Leave it out"
            )
        if node.target is operator.getitem:
            whole = self.places[_node(node.args[0])]
            if not isinstance(whole, int):
                return whole[node.args[1]]
        value = value_of(node)
        if isinstance(value, torch.nn.Module):
            return None
        is_input = node.op != "call_function"
        known = self.inputs if is_input else self._operands(node)
        leaves, tree = pytree.tree_flatten(value)
        numbers: list[int | None] = []
        for number, leaf in enumerate(leaves):
            if not isinstance(leaf, Tensor):
                numbers.append(None)
                continue
            key = _identity(leaf, node)
            if key not in known:
                name = f"{node.name}[{number}]" if number else node.name
                viewed = self._viewed(node, number)
                known[key] = len(self.met) if viewed is None else viewed
                if viewed is None:
                    self.met.append(
                        _Met(name, self._bytes(leaf, node), 0 if is_input else step, step + 1, str(leaf.device), source_of(node))
                    )
            if is_input:
                self.met[known[key]].owners.add(node.name)
            numbers.append(known[key])
        return pytree.tree_unflatten(numbers, tree)

    def _operands(self, node: Node) -> dict[int, int]:
        """The storages of a node's operands by the identity of their fake storages."""
        return {
            _identity(leaf, each): number
            for each in node.all_input_nodes
            if not isinstance(value := value_of(each), torch.nn.Module)
            for leaf, number in zip(pytree.tree_leaves(value), pytree.tree_leaves(self.places[each], _is_none), strict=True)
            if isinstance(leaf, Tensor)
        }

    def _viewed(self, node: Node, number: int) -> int | None:
        """The operand's storage in which result `number` lies by the operator's schema, whatever its metadata says.

        A pass that adds nodes may have given them fakes of their own. Composite operators (reshape, contiguous) view or copy as
        the case may be: their schema decides nothing.
        """
        op = node.target
        if not isinstance(op, torch._ops.OpOverload) or not op._schema.returns:
            return None
        returns, arguments = op._schema.returns, op._schema.arguments
        shared = returns[number if len(returns) > 1 else 0].alias_info
        if op._schema.name in _UNDECLARED_VIEWS:
            return _only(self.places[_node(node.args[0])])
        if shared is None or not (shared.is_write or not _is_composite(op)):
            return None
        for position, argument in enumerate(arguments):
            alias = argument.alias_info
            # The schema of an operator that returns a list of views says so at its argument alone: Tensor(a -> *).
            if alias is not None and (alias.before_set & shared.before_set or (not shared.before_set and "*" in alias.after_set)):
                given = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
                if isinstance(given, Node):
                    return _only(self.places[given])
        return None

    def _bytes(self, tensor: Tensor, node: Node) -> int:
        return number_of(tensor.untyped_storage().nbytes(), node, self.sizes)

    def _nested(self, node: Node, made: int) -> int:
        """What the node's subgraphs hold beyond its operands and the `made` bytes of its results."""
        name = getattr(node.target, "_name", "") if isinstance(node.target, torch._ops.HigherOrderOperator) else ""
        if name in _OF_SCALARS:
            return 0
        if name in _UNCOUNTED_LOOPS:
            raise ValueError(
                f"{node.name} is a {name}, and what it holds from turn to turn is not known. Unroll it, or use while_loop"
            )
        most = 0
        for each in node.all_input_nodes:
            if each.op == "get_attr" and isinstance(module := attribute(each), GraphModule):
                inner = _Walk(module.graph, self.sizes, frozenset()).lifetimes()
                most = max(most, int(inner.bytes_at.max(initial=0)) - inner.input_bytes)
        if name == "while_loop":
            return most  # what the turn before has made is still there, as large as the results
        if name == "map_impl":
            return max(most, made)  # the pieces are there until they are stacked
        return max(0, most - made)


def source_of(node: Node) -> str:
    """The line of the traced program that a node comes from, as "file.py:12 in forward: return self.mlp(x)".

    The innermost that is not torch's own. Of what torch.nn computes by itself the module: "activation.py:1250 in
    MultiheadAttention of encoder.layers.0.self_attn". A node that has neither (sums of gradients) comes from its operands.
    """
    waiting, seen = [node], set[Node]()
    while waiting and len(seen) < _MOST_ASKED:
        each = waiting.pop(0)
        seen.add(each)
        found = _line_of(each) or _module_of(each)
        if found:
            return found
        waiting += [operand for operand in each.all_input_nodes if operand not in seen]
    return ""


def _line_of(node: Node) -> str:
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    own = [frame for frame in frames if "/torch/" not in frame[0] and not frame[0].startswith("<")] or frames
    if not own:
        return ""
    file, line, function, code = own[-1]
    return f"{file.rpartition('/')[2]}:{line} in {function}: {code.strip()}"


def _module_of(node: Node) -> str:
    """The module that a node was traced in, with the line of its forward: Dynamo keeps no lines of torch's own modules."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")
    if not stack:
        return ""
    written, kind = list(stack.values())[-1]
    # As L['self']._modules['layers']._modules['0'], or L['self'].layers[0].
    path = ".".join(word for word in re.findall(r"\w+", written)[2:] if word != "_modules")
    code = getattr(getattr(kind, "forward", None), "__code__", None)
    if code is None:
        return ""
    of = f" of {path}" if path else ""
    return f"{code.co_filename.rpartition('/')[2]}:{code.co_firstlineno} in {kind.__name__}{of}"


def _identity(tensor: Tensor, node: Node) -> int:
    """Which storage a fake tensor has."""
    plain = type(tensor) in (Tensor, torch.nn.Parameter) or isinstance(tensor, FakeTensor)
    if not plain or tensor.layout != torch.strided or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        raise ValueError(
            f"{node.name} is a {type(tensor).__name__} of layout {tensor.layout}, not one strided storage of its own. "
            "Trace down to core operators on dense tensors: run_decompositions() of an exported program does"
        )
    return int(tensor.untyped_storage()._cdata)


def _numbers(place: Any) -> list[int]:
    return [leaf for leaf in pytree.tree_leaves(place) if leaf is not None]


def _only(place: Any) -> int | None:
    return place if isinstance(place, int) else None


def _is_none(place: Any) -> bool:
    return place is None


def _is_composite(op: torch._ops.OpOverload) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeImplicitAutograd")


def _node(argument: Any) -> Node:
    assert isinstance(argument, Node)
    return argument
