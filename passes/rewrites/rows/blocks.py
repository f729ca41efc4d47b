"""Where a graph is a transformer block: one attention, and around it work on rows from one value to another.

    x ──┬─ norm ─ linear ─ heads ─── query ─┐
        ├─ norm ─ linear ─ heads ─── key ───┼─ attention ─ joined ─ linear ─┬─ norm ─ MLP ─┬─ result
        ├─ norm ─ linear ─ heads ─── value ─┘                               │              │
        └────────────────────────────────────────────────────────────── add ┴───────── add ┘

Everything but the attention is a recipe: query, key and value of x, and of what lies along the tokens (a rotary embedding's
angles); the result of those and the joined heads. Heads are read off a view's strides, however they were packed and split.

Which dims are batch, heads, tokens and features follows from the attention's call. From there a primitive keeps the dims of its
operands, aligned from the last one on, a linear's weight has none of them (readers.roles), and a view has those of its strides.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from . import attentions
from .readers import is_along_rows, primitive_of, read, roles, tensor_of, value_of
from .recipes import Recipe, Step
from .regions import is_contiguous, is_fixed, mixed_up, sizes, width

aten = torch.ops.aten
_TRANSPOSES = {"transpose", "swapaxes", torch.transpose, aten.transpose.int}
_PERMUTES = {"permute", torch.permute, aten.permute.default}
_RESHAPES = {
    *("view", "reshape", "flatten", "contiguous", torch.reshape, torch.flatten),
    *(aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.contiguous.default),
}
_SPLITS = {
    *("chunk", "split", "unbind", "unflatten", "unsqueeze", torch.chunk, torch.split, torch.functional.split, torch.unbind),
    *(torch.unflatten, aten.chunk.default, aten.split.Tensor, aten.unbind.int, aten.unflatten.int, aten.select.int),
    *(operator.getitem, aten.slice.Tensor),
}
_VIEWS = _TRANSPOSES | _PERMUTES | _RESHAPES | _SPLITS


@dataclass(frozen=True)
class Block:
    """nodes: in the order of the graph; the last one's value is the result.

    rows: its operands that lie along the tokens, those of (batch, tokens, features) first. query, key, value: of rows and
    shared; result: of rows, the joined heads after them, and shared. attention: for attentions.parse. row_bytes: what values
    that are made of one row take, the most that is held at once.
    """

    nodes: tuple[Node, ...]
    rows: tuple[Node, ...]
    shared: tuple[Node, ...]
    query: Recipe
    key: Recipe
    value: Recipe
    result: Recipe
    attention: str
    row_bytes: int


def find(graph: Graph) -> Iterator[Block]:
    """The blocks of a graph, in its order; no node is in two. The graph may be changed at a block once it has been yielded."""
    nodes, claimed = list(graph.nodes), set[Node]()
    for node in nodes:
        if (call := attentions.call(node)) is None or not _is_called_with_heads(call):
            continue
        batch, _, tokens, _ = sizes(value_of(node).shape)
        if (block := _Search(nodes, call, batch, tokens, claimed).block()) is not None:
            claimed.update(block.nodes)
            yield block


def _is_called_with_heads(call: attentions.Call) -> bool:
    """Self-attention: all of (batch, some heads, tokens, features)."""
    values = [value_of(each) for each in (call.result, *call.heads)]
    if not all(isinstance(value, Tensor) and value.ndim == 4 for value in values):
        return False
    return len({sizes(value.shape)[::2] for value in values}) == 1


@dataclass
class _Search:
    """Around one attention, with its sizes as numbers or the expressions of symbols."""

    nodes: list[Node]
    call: attentions.Call
    batch: Any
    tokens: Any
    claimed: set[Node]
    order: dict[Node, int] = field(init=False)

    def __post_init__(self) -> None:
        self.order = {node: number for number, node in enumerate(self.nodes)}

    def block(self) -> Block | None:
        joined = self._joined()
        bases = [self._base(node) for each in self.call.heads for node in self._made_from(each)]
        linears = [self.order[base[0]] for base in bases if base is not None]
        if joined is None or not linears:
            return None
        members = self._members(joined, min(linears))
        if not members or not is_contiguous(members[-1]) or mixed_up(self.nodes, members):
            return None
        return self._written(members, joined)

    def _joined(self) -> list[Node] | None:
        """The nodes from the attention to (batch, tokens, heads * features)."""
        _, heads, _, features = sizes(value_of(self.call.result).shape)
        chain = [self.call.result]
        while len(chain[-1].users) == 1 and sizes(value_of(chain[-1]).shape) != (self.batch, self.tokens, heads * features):
            (user,) = chain[-1].users
            if not (_swaps_tokens_and_heads(user) if len(chain) == 1 else user.target in _RESHAPES):
                return None
            chain.append(user)
        return chain if len(chain) > 2 and self._is_rows(chain[-1]) else None

    def _made_from(self, node: Node) -> list[Node]:
        """Of a query or its like the heads that are views of rows: itself, or what a rotary embedding makes it of."""
        if self._base(node) is not None:
            return [node]
        found = read(node)
        operands = [] if found is None else [each for each in found.operands if self._is_heads(each)]
        return list(dict.fromkeys(base for each in operands for base in self._made_from(each)))

    def _base(self, node: Node) -> tuple[Node, int] | None:
        """The rows that a node views as heads, and the first of its features among theirs."""
        base: Any = node
        while isinstance(base, Node) and base.target in _VIEWS:
            base = _viewed(base)
        # Strides tell the dims of a view apart only if those of the rows are the usual ones.
        if not self._is_rows(base) or not self._is_heads(node) or not is_contiguous(base):
            return None
        view, whole = value_of(node), value_of(base)
        if view.untyped_storage()._cdata != whole.untyped_storage()._cdata:
            return None
        features, (_, heads, _, head_features) = sizes(whole.shape)[-1], sizes(view.shape)
        (start,) = sizes([view.storage_offset() - whole.storage_offset()])
        strides = (self.tokens * features, head_features, features, 1)
        if not isinstance(start, int) or sizes(view.stride()) != strides or start + heads * head_features > features:
            return None
        return base, start

    def _members(self, joined: Sequence[Node], first: int) -> list[Node]:
        """The block up to the last of its values that all of it leads to; `first`: where its first linear stands."""
        best: list[Node] = []
        for end in self.nodes[self.order[joined[-1]] + 1 :]:
            if attentions.call(end) is not None:
                break
            if not self._is_rows(end) or not self._works(end):
                continue
            members = self._grown_back(end, first, {*joined, self.call.operator})
            given = self._given(members)
            if self.call.operator in members and _width(end) <= max(map(_width, given)) and not any(map(self._is_heads, given)):
                best = members
        outside = [node for node in best if self.order[node] < first]
        cuts = [best[start:] for start in range(len(outside) + 1)]
        return min(cuts, key=lambda part: sum(map(_width, self._given(part))))

    def _grown_back(self, end: Node, first: int, joined: set[Node]) -> list[Node]:
        """What is made for `end` alone; before the first linear, of cheap work alone."""
        members = {end: None}
        for number in range(self.order[end] - 1, -1, -1):
            node = self.nodes[number]
            if not node.users or node in self.claimed or not self._is_used_as_rows(node, members):
                continue
            cheap = self._works(node) and primitive_of(node) != "linear"
            if cheap or (number >= first and (node in joined or node.target in _VIEWS or self._works(node))):
                members[node] = None
        return list(reversed(members))

    def _is_used_as_rows(self, node: Node, members: Collection[Node]) -> bool:
        """Whether all users of a node are members, and none of them takes it as something that all rows share."""
        return all(user in members and node not in self._shared_of(user) for user in node.users)

    def _works(self, node: Node) -> bool:
        """Whether a node is a primitive of rows or heads, of what lies along the tokens, and of what all share."""
        operands = roles(node)
        if operands is None or not (self._is_rows(node) or self._is_heads(node)):
            return False
        same = self._is_rows if self._is_rows(node) else self._is_heads
        if not any(map(same, operands.rows)) or not all(map(is_fixed, operands.shared)):
            return False
        return all(same(operand) or self._is_along(operand) for operand in operands.rows)

    def _given(self, members: Sequence[Node]) -> list[Node]:
        """What lies along the tokens and is made elsewhere, rows first."""
        inside = set(members)
        used = [operand for node in members for operand in self._rows_of(node)]
        outside = list(dict.fromkeys(operand for operand in used if operand not in inside))
        return sorted(outside, key=lambda node: not self._is_rows(node))

    def _rows_of(self, node: Node) -> Sequence[Node]:
        if node is self.call.operator:
            return self.call.heads
        if node is self.call.result:
            return ()
        if node.target in _VIEWS:
            viewed = _viewed(node)
            return (viewed,) if isinstance(viewed, Node) else ()
        operands = roles(node)
        return () if operands is None else operands.rows

    def _shared_of(self, node: Node) -> Sequence[Node]:
        operands = None if node.target in _VIEWS else roles(node)
        return () if operands is None else operands.shared

    def _written(self, members: list[Node], joined: Sequence[Node]) -> Block | None:
        rows = self._given(members)
        if not rows or not self._is_rows(rows[0]) or not all(self._is_rows(each) or self._is_along(each) for each in rows):
            return None
        shared: list[Node] = []
        writers = [_Writer(self, members, rows, shared, joined[-1]) for _ in range(4)]
        targets = (*self.call.heads, members[-1])
        if not all(writer.write(target) for writer, target in zip(writers, targets, strict=True)):
            return None
        recipes = [Recipe(tuple(writer.steps)) for writer in writers]
        values = [value_of(each) for each in (*rows, joined[-1])]
        for writer, recipe in zip(writers, recipes, strict=True):
            if not recipe.steps or not writer.agrees(recipe, values):
                return None
        query, key, value, result = recipes
        held = {each: each.held_bytes(values, [value_of(node) for node in shared]) for each in recipes}
        row_bytes = max(held[key], held[value], held[query] + held[result])
        return Block(tuple(members), tuple(rows), tuple(shared), query, key, value, result, self.call.text, row_bytes)

    def _is_rows(self, node: Any) -> bool:
        """(batch, tokens, features)"""
        found = _sizes(node)
        return len(found) == 3 and found[:2] == (self.batch, self.tokens) and isinstance(found[2], int)

    def _is_heads(self, node: Any) -> bool:
        """(batch, heads, tokens, features)"""
        found = _sizes(node)
        fits = len(found) == 4 and found[::2] == (self.batch, self.tokens)
        return fits and isinstance(found[1], int) and isinstance(found[3], int)

    def _is_along(self, node: Any) -> bool:
        """(1, ..., tokens, features), the same for every batch and head; batch and one head too."""
        found = _sizes(node)
        if len(found) < 2 or found[-2] != self.tokens or not isinstance(found[-1], int):
            return False
        return all(size == 1 for size in found[:-2]) or (len(found) == 4 and found[:2] == (self.batch, 1))


@dataclass
class _Writer:
    """Writes the steps that lead to one value. made: the nodes whose values the steps are, in their order."""

    search: _Search
    members: list[Node]
    rows: list[Node]
    shared: list[Node]
    joined: Node
    steps: list[Step] = field(default_factory=list)
    made: dict[Node, str] = field(default_factory=dict)

    def write(self, node: Node) -> str | None:
        """The name of the value of rows or heads, its steps written before; None where it has none."""
        if node in self.made:
            return self.made[node]
        if node in self.rows or node is self.joined:
            return f"x{[*self.rows, self.joined].index(node)}"
        if node not in self.members:
            return None
        if (base := self.search._base(node)) is not None:
            return self._heads(node, *base)
        call = read(node)
        if call is None:
            return None
        operands = [self._operand(call.primitive, place, operand) for place, operand in enumerate(call.operands)]
        if any(name is None and isinstance(operand, Node) for name, operand in zip(operands, call.operands, strict=True)):
            return None
        if not call.primitive:
            return str(operands[0])
        self.made[node] = self._step(call.primitive, operands, call.options)
        return self.made[node]

    def _operand(self, primitive: str, place: int, operand: Any) -> Any:
        """An operand's name by its role in the call; numbers and None as they are."""
        if not isinstance(operand, Node):
            return operand
        source = tensor_of(operand)
        return self.write(source) if is_along_rows(primitive, place, source) else self._shared(source)

    def _shared(self, node: Node) -> str:
        if node not in self.shared:
            self.shared.append(node)
        return f"w{self.shared.index(node)}"

    def _heads(self, node: Node, base: Node, start: int) -> str | None:
        """Of a linear that makes more than these heads, these alone are computed."""
        _, heads, _, features = sizes(value_of(node).shape)
        options = {"start": start, "length": heads * features}
        call = read(base) if base in self.members else None
        if call is not None and call.primitive == "linear":
            names = [self._operand("linear", place, operand) for place, operand in enumerate(call.operands)]
            primitive = "linear_part"
        else:
            names = [self.write(base)]
            primitive = "narrow"
        if names[0] is None:
            return None
        part = self._step(primitive, names, options)
        self.made[node] = self._step("split_heads", [part], {"heads": heads})
        return self.made[node]

    def _step(self, primitive: str, operands: list[Any], options: dict[str, Any]) -> str:
        self.steps.append(Step(f"v{len(self.steps)}", primitive, tuple(operands), tuple(options.items())))
        return self.steps[-1].result

    def agrees(self, recipe: Recipe, rows: Sequence[Tensor]) -> bool:
        """Whether each value has the features and the dtype of its trace: under autocast, say, it has not."""
        try:
            kinds = recipe.kinds(rows, [value_of(node) for node in self.shared])
        except (RuntimeError, ValueError, TypeError):  # what the primitives do not take as it stands
            return False
        pairs = [(kinds[name], value_of(node)) for node, name in self.made.items()]
        return all(kind.dtype == value.dtype and kind.shape[-1] == sizes(value.shape)[-1] for kind, value in pairs)


def _swaps_tokens_and_heads(node: Node) -> bool:
    given: Any = node.args[1:]
    dims = given[0] if len(given) == 1 and isinstance(given[0], (list, tuple)) else given
    if not all(isinstance(dim, int) for dim in dims):
        return False
    dims = [dim % 4 for dim in dims]
    return (node.target in _TRANSPOSES and sorted(dims) == [1, 2]) or (node.target in _PERMUTES and dims == [0, 2, 1, 3])


def _viewed(view: Node) -> Any:
    """What a view is of: its first argument, which may be named."""
    return view.args[0] if view.args else view.kwargs.get("input")


def _width(node: Node) -> int:
    """Bytes of a row: the features of rows, of heads, and of what lies along the tokens are their last dim."""
    return width(node, row_dims=1)


def _sizes(node: Any) -> tuple[Any, ...]:
    value = value_of(node) if isinstance(node, Node) else None
    return sizes(value.shape) if isinstance(value, Tensor) else ()
