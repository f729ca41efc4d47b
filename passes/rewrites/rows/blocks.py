"""Transformer blocks of a graph: one attention, and row-wise work around it.

    x ──┬─ norm ─ linear ─ heads ─── query ─┐
        ├─ norm ─ linear ─ heads ─── key ───┼─ attention ─ joined ─ linear ─┬─ norm ─ MLP ─┬─ result
        ├─ norm ─ linear ─ heads ─── value ─┘                               │              │
        └────────────────────────────────────────────────────────────── add ┴───────── add ┘

Everything but the attention becomes recipes: query, key and value from x and from what has the
tokens as rows (a rotary embedding's angles); the result from those and the joined heads.

Which dims are batch, heads, tokens and features follows from the attention's call. From there a
primitive keeps the dims of its operands, aligned from the last one on, a linear's weight has none
of them (readers.Roles), and a view has those of its strides.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch.fx import Graph, Node

from . import attentions, growing
from .block_recipes import Writer
from .calls import example_value
from .growing import is_contiguous, is_interrupted, is_static, row_inputs, sizes_of
from .heads import RESHAPES, VIEWS, Dims, swaps_tokens_and_heads, viewed
from .readers import Memo
from .recipes import Recipe


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
    """Yield the disjoint blocks of a graph, in its order.

    The graph may be changed at a block once it has been yielded.
    """
    nodes, claimed = list(graph.nodes), set[Node]()
    order = growing.order_of(nodes)
    for node in nodes:
        call = attentions.call(node)
        if call is None or not _is_self_attention(call):
            continue
        batch, _, tokens, _ = sizes_of(node)
        block = _Search(nodes, order, call, Dims(batch, tokens), claimed).block()
        if block is not None:
            claimed.update(block.nodes)
            yield block


def _is_self_attention(call: attentions.Call) -> bool:
    """Whether query, key, value and result agree in batch and tokens.

    All are (batch, heads, tokens, features).
    """
    shapes = [sizes_of(node) for node in (call.result, *call.heads)]
    if not all(len(shape) == 4 for shape in shapes):
        return False
    return len({shape[::2] for shape in shapes}) == 1


@dataclass
class _Search:
    """The search for a block around one attention.

    nodes, order: of the graph, and their places
    claimed: nodes that belong to other blocks
    """

    nodes: list[Node]
    order: Mapping[Node, int]
    call: attentions.Call
    dims: Dims
    claimed: set[Node]
    memo: Memo = field(init=False)

    def __post_init__(self) -> None:
        self.memo = Memo(self.claimed)

    def block(self) -> Block | None:
        # 1. From the attention forward, to its joined heads.
        joined = self._joined()
        # 2. From the attention back, to the linears of query, key and value.
        linears: list[int] = []
        for head in self.call.heads:
            for node in self._views_of_rows(head):
                base = self.dims.base(node)
                if base is not None:
                    linears.append(self.order[base[0]])
        if joined is None or not linears:
            return None
        # 3. The nodes from the first linear to the block's result, written as recipes.
        members = self._members(joined, min(linears))
        if not members or not is_contiguous(members[-1]):
            return None
        if is_interrupted(self.nodes, self.order, members):
            return None
        return self._written(members, joined)

    def _joined(self) -> list[Node] | None:
        """The nodes from the attention to its joined heads.

        Joined heads are (batch, tokens, heads * features).
        """
        _, heads, _, features = sizes_of(self.call.result)
        shape = (self.dims.batch, self.dims.tokens, heads * features)
        chain = [self.call.result]
        while len(chain[-1].users) == 1 and sizes_of(chain[-1]) != shape:
            (user,) = chain[-1].users
            # First tokens and heads are swapped, then heads are joined with their features.
            is_expected = user.target in RESHAPES
            if len(chain) == 1:
                is_expected = swaps_tokens_and_heads(user)
            if not is_expected:
                return None
            chain.append(user)
        if len(chain) <= 2 or not self.dims.is_rows(chain[-1]):
            return None
        return chain

    def _views_of_rows(self, node: Node) -> list[Node]:
        """The views of rows behind a query, key or value.

        The node itself, or the operands of a rotary embedding.
        """
        if self.dims.base(node) is not None:
            return [node]
        call = self.memo.read(node)
        if call is None:
            return []
        views: dict[Node, None] = {}
        for operand in call.operands:
            if self.dims.is_heads(operand):
                views.update(dict.fromkeys(self._views_of_rows(operand)))
        return list(views)

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
            if not self.dims.is_rows(end) or not self._works(end):
                continue
            members = self._grown_back(end, first, inner)
            inputs = self._inputs(members)
            is_narrow = _row_width(end) <= max(map(_row_width, inputs))
            takes_heads = any(map(self.dims.is_heads, inputs))
            if self.call.operator in members and is_narrow and not takes_heads:
                best = members
        # Before the first linear, cut where the inputs are narrowest.
        before = [node for node in best if self.order[node] < first]
        cuts = [best[start:] for start in range(len(before) + 1)]
        return min(cuts, key=lambda part: sum(map(_row_width, self._inputs(part))))

    def _grown_back(self, end: Node, first: int, inner: set[Node]) -> list[Node]:
        """The nodes that only `end` uses; before the first linear, cheap ones."""

        def accepts(node: Node) -> bool:
            works = self._works(node)
            if works and self.memo.primitive(node) != "linear":
                return True
            if self.order[node] < first:
                return False
            return works or node in inner or node.target in VIEWS

        grown = growing.grow_back(end, self.order, accepts, self.claimed, self._shared_operands)
        return [node for node, _ in grown][::-1]

    def _works(self, node: Node) -> bool:
        """Whether a node is a primitive of rows or of heads.

        Its other operands have the tokens as rows, or are shared by all tokens and static.
        """
        operands = self.memo.roles(node)
        if self.dims.is_rows(node):
            is_same = self.dims.is_rows
        elif self.dims.is_heads(node):
            is_same = self.dims.is_heads
        else:
            return False
        if not any(map(is_same, operands.rows)) or not all(map(is_static, operands.shared)):
            return False
        return all(is_same(row) or self.dims.is_by_token(row) for row in operands.rows)

    def _inputs(self, members: Sequence[Node]) -> list[Node]:
        """The row operands from outside, those of (batch, tokens, features) first."""
        inputs = row_inputs(members, self._row_operands)
        return sorted(inputs, key=lambda node: not self.dims.is_rows(node))

    def _row_operands(self, node: Node) -> Sequence[Node]:
        if node is self.call.operator:
            return self.call.heads
        if node is self.call.result:
            return ()
        if node.target in VIEWS:
            operand = viewed(node)
            return (operand,) if isinstance(operand, Node) else ()
        return self.memo.rows(node)

    def _shared_operands(self, node: Node) -> Sequence[Node]:
        """The operands that all tokens share; a view has none."""
        if node.target in VIEWS:
            return ()
        return self.memo.shared(node)

    def _written(self, members: list[Node], joined: Sequence[Node]) -> Block | None:
        """Write members as recipes; None if that is not possible."""
        rows = self._inputs(members)
        if not rows or not self.dims.is_rows(rows[0]):
            return None
        if not all(self.dims.is_rows(node) or self.dims.is_by_token(node) for node in rows):
            return None
        # 1. One recipe for each of query, key, value and result. They share their inputs.
        shared: list[Node] = []
        writers: list[Writer] = []
        for target in (*self.call.heads, members[-1]):
            writer = Writer(self.dims, members, rows, shared, joined[-1])
            writers.append(writer)
            if writer.write(target) is None or not writer.steps:
                return None
        # 2. Each agrees with the trace.
        row_values = list(map(example_value, (*rows, joined[-1])))
        shared_values = list(map(example_value, shared))
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


def _row_width(node: Node) -> int:
    """Bytes of a row of features, the last dim of a value."""
    return growing.row_width(node, row_dims=1)
