"""Transformer blocks of a graph: one attention, and row-wise work from one value to another.

    x ──┬─ norm ─ linear ─ heads ─── query ─┐
        ├─ norm ─ linear ─ heads ─── key ───┼─ attention ─ joined ─ linear ─┬─ norm ─ MLP ─┬─ result
        ├─ norm ─ linear ─ heads ─── value ─┘                               │              │
        └────────────────────────────────────────────────────────────── add ┴───────── add ┘

Everything but the attention becomes recipes: query, key and value from x and from what has the
tokens as rows (a rotary embedding's angles); the result from those and the joined heads. Heads are
recognized by a view's strides, however they were packed and split.

Which dims are batch, heads, tokens and features follows from the attention's call. From there a
primitive keeps the dims of its operands, aligned from the last one on, a linear's weight has none
of them (readers.roles), and a view has those of its strides.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node

from . import attentions, growing
from .growing import is_contiguous, is_interrupted, is_rows, is_static, row_inputs, sizes, sizes_of
from .readers import example_value, is_along_rows, primitive_of, read, roles, tensor_of
from .recipes import Recipe, Step

aten = torch.ops.aten
_TRANSPOSES = {"transpose", "swapaxes", torch.transpose, aten.transpose.int}
_PERMUTES = {"permute", torch.permute, aten.permute.default}
_RESHAPES = {
    *("view", "reshape", "flatten", "contiguous", torch.reshape, torch.flatten),
    *(aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.contiguous.default),
}
_SPLITS = {
    *("chunk", "split", "unbind", "unflatten", "unsqueeze"),
    *(torch.chunk, torch.split, torch.functional.split, torch.unbind, torch.unflatten),
    *(aten.chunk.default, aten.split.Tensor, aten.unbind.int, aten.unflatten.int),
    *(aten.select.int, operator.getitem, aten.slice.Tensor),
}
_VIEWS = _TRANSPOSES | _PERMUTES | _RESHAPES | _SPLITS


@dataclass(frozen=True)
class Block:
    """Nodes of a graph that four recipes and an attention can replace.

    nodes: in the order of the graph; the value of the last is the result
    rows: inputs with the tokens as rows, those of (batch, tokens, features) first
    shared: inputs that all tokens share
    query_recipe, key_recipe, value_recipe: from rows and shared to heads
    result_recipe: from rows, the joined heads after them, and shared
    attention: text for attentions.parse
    row_bytes: the most that is live at one time of the values computed from one token
    """

    nodes: tuple[Node, ...]
    rows: tuple[Node, ...]
    shared: tuple[Node, ...]
    query_recipe: Recipe
    key_recipe: Recipe
    value_recipe: Recipe
    result_recipe: Recipe
    attention: str
    row_bytes: int


def find(graph: Graph) -> Iterator[Block]:
    """Yield the blocks of a graph, in its order; no node is in two.

    The graph may be changed at a block once it has been yielded.
    """
    nodes, claimed = list(graph.nodes), set[Node]()
    for node in nodes:
        call = attentions.call(node)
        if call is None or not _is_self_attention(call):
            continue
        batch, _, tokens, _ = sizes_of(node)
        block = _Search(nodes, call, batch, tokens, claimed).block()
        if block is not None:
            claimed.update(block.nodes)
            yield block


def _is_self_attention(call: attentions.Call) -> bool:
    """Whether query, key, value and result are (batch, heads, tokens, features), heads aside."""
    shapes = [sizes_of(node) for node in (call.result, *call.heads)]
    if not all(len(shape) == 4 for shape in shapes):
        return False
    return len({shape[::2] for shape in shapes}) == 1


@dataclass
class _Search:
    """The search for a block around one attention.

    batch, tokens: its sizes, as numbers or as sympy expressions
    claimed: nodes that belong to other blocks
    """

    nodes: list[Node]
    call: attentions.Call
    batch: Any
    tokens: Any
    claimed: set[Node]
    order: dict[Node, int] = field(init=False)

    def __post_init__(self) -> None:
        self.order = {node: number for number, node in enumerate(self.nodes)}

    def block(self) -> Block | None:
        # 1. From the attention forward, to its joined heads.
        joined = self._joined()
        # 2. From the attention back, to the linears that make query, key and value.
        linears: list[int] = []
        for head in self.call.heads:
            for node in self._views_of_rows(head):
                base = self._base(node)
                if base is not None:
                    linears.append(self.order[base[0]])
        if joined is None or not linears:
            return None
        # 3. The nodes from the first linear to the block's result, written as recipes.
        members = self._members(joined, min(linears))
        if not members or not is_contiguous(members[-1]) or is_interrupted(self.nodes, members):
            return None
        return self._written(members, joined)

    def _joined(self) -> list[Node] | None:
        """The nodes from the attention to its heads joined: (batch, tokens, heads * features)."""
        _, heads, _, features = sizes_of(self.call.result)
        shape = (self.batch, self.tokens, heads * features)
        chain = [self.call.result]
        while len(chain[-1].users) == 1 and sizes_of(chain[-1]) != shape:
            (user,) = chain[-1].users
            is_expected = (
                _swaps_tokens_and_heads(user) if len(chain) == 1 else user.target in _RESHAPES
            )
            if not is_expected:
                return None
            chain.append(user)
        return chain if len(chain) > 2 and self._is_rows(chain[-1]) else None

    def _views_of_rows(self, node: Node) -> list[Node]:
        """The views of rows that a query, key or value is computed from.

        The node itself, or the operands of a rotary embedding.
        """
        if self._base(node) is not None:
            return [node]
        call = read(node)
        views: dict[Node, None] = {}
        for operand in () if call is None else call.operands:
            if self._is_heads(operand):
                views.update(dict.fromkeys(self._views_of_rows(operand)))
        return list(views)

    def _base(self, node: Node) -> tuple[Node, int] | None:
        """The rows that a node views as heads, and its first feature."""
        base: Any = node
        while isinstance(base, Node) and base.target in _VIEWS:
            base = _viewed(base)
        # A view's strides identify its dims only if the rows are laid out as usual.
        if not self._is_rows(base) or not self._is_heads(node) or not is_contiguous(base):
            return None
        view, rows = example_value(node), example_value(base)
        if view.untyped_storage()._cdata != rows.untyped_storage()._cdata:
            return None
        features = sizes(rows.shape)[-1]
        _, heads, _, head_features = sizes(view.shape)
        (start,) = sizes([view.storage_offset() - rows.storage_offset()])
        strides = (self.tokens * features, head_features, features, 1)
        if not isinstance(start, int) or sizes(view.stride()) != strides:
            return None
        if start + heads * head_features > features:
            return None
        return base, start

    def _members(self, joined: Sequence[Node], first: int) -> list[Node]:
        """The nodes of the block, up to its last possible result.

        joined: the nodes from the attention to its joined heads
        first: the number of the block's first linear
        """
        inner = {*joined, self.call.operator}
        best: list[Node] = []
        for end in self.nodes[self.order[joined[-1]] + 1 :]:
            if attentions.call(end) is not None:
                break
            if not self._is_rows(end) or not self._works(end):
                continue
            members = self._grown_back(end, first, inner)
            inputs = self._inputs(members)
            is_narrow = _row_width(end) <= max(map(_row_width, inputs))
            takes_heads = any(map(self._is_heads, inputs))
            if self.call.operator in members and is_narrow and not takes_heads:
                best = members
        # Of the cheap nodes before the first linear, keep as many as make the inputs narrowest.
        before = [node for node in best if self.order[node] < first]
        cuts = [best[start:] for start in range(len(before) + 1)]
        return min(cuts, key=lambda part: sum(map(_row_width, self._inputs(part))))

    def _grown_back(self, end: Node, first: int, inner: set[Node]) -> list[Node]:
        """The nodes used for `end` only; before the first linear, only cheap ones."""

        def accepts(node: Node) -> bool:
            works = self._works(node)
            if works and primitive_of(node) != "linear":
                return True
            if self.order[node] < first:
                return False
            return works or node in inner or node.target in _VIEWS

        nodes = self.nodes[: self.order[end] + 1]
        return growing.grow_back(nodes, accepts, self.claimed, _shared_operands)

    def _works(self, node: Node) -> bool:
        """Whether a node is a primitive of rows or of heads.

        Its other operands have the tokens as rows, or are shared by all tokens and static.
        """
        operands = roles(node)
        if operands is None or not (self._is_rows(node) or self._is_heads(node)):
            return False
        is_same = self._is_rows if self._is_rows(node) else self._is_heads
        if not any(map(is_same, operands.rows)) or not all(map(is_static, operands.shared)):
            return False
        return all(is_same(row) or self._is_by_token(row) for row in operands.rows)

    def _inputs(self, members: Sequence[Node]) -> list[Node]:
        """The row operands from outside, those of (batch, tokens, features) first."""
        inputs = row_inputs(members, self._row_operands)
        return sorted(inputs, key=lambda node: not self._is_rows(node))

    def _row_operands(self, node: Node) -> Sequence[Node]:
        if node is self.call.operator:
            return self.call.heads
        if node is self.call.result:
            return ()
        if node.target in _VIEWS:
            viewed = _viewed(node)
            return (viewed,) if isinstance(viewed, Node) else ()
        return growing.row_operands(node)

    def _written(self, members: list[Node], joined: Sequence[Node]) -> Block | None:
        """Write members as recipes; None if that is not possible."""
        rows = self._inputs(members)
        if not rows or not self._is_rows(rows[0]):
            return None
        if not all(self._is_rows(node) or self._is_by_token(node) for node in rows):
            return None
        # 1. One recipe for each of query, key, value and result. They share their inputs.
        shared: list[Node] = []
        writers: list[_Writer] = []
        for target in (*self.call.heads, members[-1]):
            writer = _Writer(self, members, rows, shared, joined[-1])
            writers.append(writer)
            if writer.write(target) is None or not writer.steps:
                return None
        # 2. Each agrees with the trace.
        row_values = [example_value(node) for node in (*rows, joined[-1])]
        shared_values = [example_value(node) for node in shared]
        recipes = [Recipe(tuple(writer.steps)) for writer in writers]
        for writer, recipe in zip(writers, recipes, strict=True):
            if not growing.agrees(recipe, row_values, shared_values, writer.names):
                return None
        # 3. Keys and values are computed before; queries stay live while the result is computed.
        live = [recipe.live_bytes(row_values, shared_values) for recipe in recipes]
        return Block(
            nodes=tuple(members),
            rows=tuple(rows),
            shared=tuple(shared),
            query_recipe=recipes[0],
            key_recipe=recipes[1],
            value_recipe=recipes[2],
            result_recipe=recipes[3],
            attention=self.call.text,
            row_bytes=max(live[1], live[2], live[0] + live[3]),
        )

    def _is_rows(self, node: Any) -> bool:
        """Whether a node's value is (batch, tokens, features)."""
        return is_rows(node, (self.batch, self.tokens))

    def _is_heads(self, node: Any) -> bool:
        """Whether a node's value is (batch, heads, tokens, features)."""
        shape = sizes_of(node)
        if len(shape) != 4 or shape[::2] != (self.batch, self.tokens):
            return False
        return isinstance(shape[1], int) and isinstance(shape[3], int)

    def _is_by_token(self, node: Any) -> bool:
        """Whether a value has the tokens as rows: (1, ..., tokens, features), or (batch, 1, ...).

        It is the same for every batch entry and head, or for every head.
        """
        shape = sizes_of(node)
        if len(shape) < 2 or shape[-2] != self.tokens or not isinstance(shape[-1], int):
            return False
        if all(size == 1 for size in shape[:-2]):
            return True
        return len(shape) == 4 and shape[:2] == (self.batch, 1)


@dataclass
class _Writer:
    """Writes the steps of one recipe.

    joined: the node of the joined heads, an input of the result's recipe
    shared: inputs so far; extended
    names: of the recipe's values, by the nodes that they stand for
    """

    search: _Search
    members: list[Node]
    rows: list[Node]
    shared: list[Node]
    joined: Node
    steps: list[Step] = field(default_factory=list)
    names: dict[Node, str] = field(default_factory=dict)

    def write(self, node: Node) -> str | None:
        """Write the steps that lead to a value, and return its name; None if there are none."""
        if node in self.names:
            return self.names[node]
        if node in self.rows or node is self.joined:
            return f"x{[*self.rows, self.joined].index(node)}"
        if node not in self.members:
            return None
        base = self.search._base(node)
        if base is not None:
            return self._heads(node, *base)
        call = read(node)
        if call is None:
            return None
        operands: list[Any] = []
        for place, operand in enumerate(call.operands):
            operands.append(self._operand(call.primitive, place, operand))
            if operands[-1] is None and isinstance(operand, Node):
                return None
        if not call.primitive:  # its value is its operand's
            return str(operands[0])
        self.names[node] = self._step(call.primitive, operands, call.options)
        return self.names[node]

    def _operand(self, primitive: str, place: int, operand: Any) -> Any:
        """The name of an operand by its role; a number or None as it is."""
        if not isinstance(operand, Node):
            return operand
        source = tensor_of(operand)
        if is_along_rows(primitive, place, source):
            return self.write(source)
        return self._shared(source)

    def _shared(self, node: Node) -> str:
        if node not in self.shared:
            self.shared.append(node)
        return f"w{self.shared.index(node)}"

    def _heads(self, node: Node, base: Node, start: int) -> str | None:
        """Write heads as a view of rows; of a packed linear, only their part is computed.

        base: the rows
        start: where in the rows' features the heads begin
        """
        _, heads, _, features = sizes_of(node)
        call = read(base) if base in self.members else None
        if call is not None and call.primitive == "linear":
            primitive = "linear_part"
            operands = [
                self._operand("linear", place, operand)
                for place, operand in enumerate(call.operands)
            ]
        else:
            primitive, operands = "narrow", [self.write(base)]
        if operands[0] is None:
            return None
        part = self._step(primitive, operands, {"start": start, "length": heads * features})
        self.names[node] = self._step("split_heads", [part], {"heads": heads})
        return self.names[node]

    def _step(self, primitive: str, operands: list[Any], options: dict[str, Any]) -> str:
        """Append a step, and return the name of its result."""
        name = f"v{len(self.steps)}"
        self.steps.append(Step(name, primitive, tuple(operands), tuple(options.items())))
        return name


def _shared_operands(node: Node) -> Sequence[Node]:
    """The operands that all tokens share; a view has none."""
    return () if node.target in _VIEWS else growing.shared_operands(node)


def _swaps_tokens_and_heads(node: Node) -> bool:
    """Whether a call swaps dims 1 and 2 of 4."""
    dims: Any = node.args[1:]
    if len(dims) == 1 and isinstance(dims[0], (list, tuple)):
        dims = dims[0]
    if not all(isinstance(dim, int) for dim in dims):
        return False
    dims = [dim % 4 for dim in dims]
    if node.target in _TRANSPOSES:
        return sorted(dims) == [1, 2]
    return node.target in _PERMUTES and dims == [0, 2, 1, 3]


def _viewed(view: Node) -> Any:
    """The operand of a view, which may be a keyword argument."""
    return view.args[0] if view.args else view.kwargs.get("input")


def _row_width(node: Node) -> int:
    """Bytes of a row: the last dim of rows, of heads, and of values by token is their features."""
    return growing.row_width(node, row_dims=1)
