"""Replacement of attention in the graphs of a model.

    scaled_dot_product_attention      replaced (calls.py)
    F.multi_head_attention_forward    torch's code over a replaced call (multihead.py)
    flex_attention                    replaced, with its score_mod and mask_mod (flex.py)

Graphs inside of graphs (checkpoints) too. A call's mask is read from the graph that makes it
(reading/) and joins the site's program (structures/), so a mask that is "causal, and no padding"
is never made as a tensor. Nothing that a mask hides becomes visible.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from .calls import Attention
from .data import check_forward, check_names, names_of
from .flex import FLEX, FlexCall
from .layers import Choice, Layer, program_of
from .multihead import MULTIHEAD, bound_arguments, multihead, read_masks
from .places import leave_out_own, line_of, path_of
from .reading.expressions import Expression, Index
from .reading.reader import Reader
from .reading.rules import RULES
from .reading.scopes import Scope, bring, callers_of, example_of, scope_of
from .sites import Site, put_sites
from .structures.structure import Structure, structure_of

_SDPA = (
    F.scaled_dot_product_attention,
    torch._C._nn.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention.default,
)
_SDPA_PARAMETERS = (
    *("query", "key", "value", "attn_mask"),
    *("dropout_p", "is_causal", "scale", "enable_gqa"),
)
# The pair's indices along a mask, by the dimensions of the query.
_SDPA_INDICES = {
    2: (Index("q"), Index("kv")),
    3: (Index("b"), Index("q"), Index("kv")),
    4: (Index("b"), Index("h"), Index("q"), Index("kv")),
}
# Attention that is not replaced, with names for messages.
_CLOSED = {
    torch._transformer_encoder_layer_fwd: "the fast path of nn.TransformerEncoderLayer",
    torch._native_multi_head_attention: "the fast path of nn.MultiheadAttention",
}
# Operators that run a graph again in the backward, and pass their other operands on to it.
_CHECKPOINTS = ("tag_activation_checkpoint",)


def named(x: Tensor, name: str) -> Tensor:
    """Data of a call, marked in its graph; `Rewriting` removes the mark."""
    return x


# A function in place of an operator, and its arguments by name.
_Replacement = tuple[Callable[..., Any], dict[str, Any]]


class Rewriting:
    """Replaces the attention of one model.

    model: its sites are set.
    attention: a program, by layer or for all; see `layers`.
    own_file: a file whose frames are removed from the origins of nodes.
    """

    def __init__(self, model: nn.Module, attention: Choice, own_file: str) -> None:
        self.model, self.attention, self.own_file = model, attention, own_file
        self.sites: dict[str, Site] = {}
        # Nodes of the outermost graph with the data of a call, by name.
        self._data: dict[str, Node] = {}

    def rewrite(self, graph: GraphModule) -> None:
        """Replace the calls of a graph and of its subgraphs.

        Raises ValueError if there are none, and for data that no program reads.
        """
        self._data = _unmarked(graph)
        calls: Counter[str] = Counter()
        callers = callers_of(graph, _CHECKPOINTS)
        for part in graph.modules():
            if isinstance(part, GraphModule):
                leave_out_own(part, self.own_file, self.model)
                self._rewrite(part, calls, callers)
        if not self.sites:
            raise ValueError(
                f"{type(self.model).__name__} called no scaled_dot_product_attention, no "
                "nn.MultiheadAttention and no flex_attention: there is no attention to replace. "
                "Build its own of compiled_dilated.compile(program)"
            )
        names = names_of(site.program for site in self.sites.values())
        check_names(type(self.model).__name__, names, self._data)
        put_sites(self.model, list(self.sites.values()))

    def check_replaced(self) -> None:
        """Raise RuntimeError unless a trace has recorded every site."""
        missed = [site.path for site in self.sites.values() if site.last is None]
        if missed:
            raise RuntimeError(
                f"attention of {', '.join(missed)} was not replaced, though it was found; "
                "please report this"
            )

    def _rewrite(
        self, part: GraphModule, calls: Counter[str], callers: Mapping[GraphModule, Scope]
    ) -> None:
        """Replace the calls of one graph.

        calls: number of calls of every module so far, by path.
        callers: scopes of the calls of inner graphs.
        """
        for node in list(part.graph.nodes):
            if node.op != "call_function":
                continue
            # Attention inside of a fused operator cannot be replaced.
            if node.target in _CLOSED:
                raise NotImplementedError(
                    f"{_CLOSED[node.target]} is not replaced{line_of(node)}. "
                    "Call compiled_dilated.compile(program) there"
                )
            replacement = {MULTIHEAD: self._multihead, FLEX: self._flex}.get(node.target)
            if replacement is None and node.target in _SDPA:
                replacement = self._scaled_dot_product
            if replacement is not None:
                path = self._path(node, calls)
                target, arguments = replacement(node, path, scope_of(part, node, callers))
                _replace(part, node, target, arguments)
        part.recompile()

    def _path(self, node: Node, calls: Counter[str]) -> str:
        """The path of a call's module; of its second call path#2."""
        path = path_of(node, self.model)
        calls[path] += 1
        if calls[path] == 1:
            return path
        return f"{path}#{calls[path]}"

    def _site(self, path: str, kind: str, causal: object, heads: int | None, node: Node) -> Site:
        """The site of a call, with the user's program for it."""
        if not isinstance(causal, bool):
            raise NotImplementedError(
                f"is_causal of {path} varies in the graph{line_of(node)}. Pass True or False"
            )
        layer = Layer(path, kind, None, causal, None, heads, heads, None)
        site = Site(path, kind, program_of(self.attention, layer))
        self.sites[path] = site
        return site

    def _scaled_dot_product(self, node: Node, path: str, scope: Scope) -> _Replacement:
        bound: dict[str, Any] = dict(zip(_SDPA_PARAMETERS, node.args, strict=False)) | node.kwargs
        query, mask = bound["query"], bound.get("attn_mask")
        causal = bound.get("is_causal", False)
        site = self._site(path, "scaled_dot_product_attention", causal, _heads_of(query), node)
        reader = Reader(RULES)
        dims = example_of(query).dim()
        expression = None
        if mask is not None and dims in _SDPA_INDICES:
            expression = reader.mask(mask, scope, _SDPA_INDICES[dims])
            bound["attn_mask"] = None
        lengths = _lengths(query, bound["key"], -2)
        structure, captured = self._structure(site, expression, reader, scope, lengths)
        return Attention(site, line_of(node), structure), bound | {"captured": captured}

    def _multihead(self, node: Node, path: str, scope: Scope) -> _Replacement:
        bound = bound_arguments(node)
        causal, heads = bound.get("is_causal", False), bound["num_heads"]
        site = self._site(path, "multi_head_attention_forward", causal, heads, node)
        reader = Reader(RULES)
        expression = read_masks(bound, reader, scope)
        lengths = _lengths(bound["query"], bound["key"], 0)
        structure, captured = self._structure(site, expression, reader, scope, lengths)
        return multihead(Attention(site, line_of(node), structure)), bound | {"captured": captured}

    def _flex(self, node: Node, path: str, scope: Scope) -> _Replacement:
        call = FlexCall(scope.part, node)
        site = self._site(path, "flex_attention", False, _heads_of(call.query), node)
        reader = Reader(RULES)
        expression = call.read_mask(reader, scope)
        call.check_tiles(expression)
        lengths = _lengths(call.query, call.key, -2)
        structure, captured = self._structure(site, expression, reader, scope, lengths)
        attention = Attention(site, line_of(node), structure)
        return call.replacement(attention, expression is not None), call.arguments(captured)

    def _structure(
        self,
        site: Site,
        mask: Expression | None,
        reader: Reader,
        scope: Scope,
        lengths: tuple[Any, Any],
    ) -> tuple[Structure | None, tuple[Node, ...]]:
        """The structure of a mask, and the nodes that the site reads.

        mask: None for a call without a mask, or with one that was not read.
        lengths: tokens of the query and of the key.
        """
        data = self._data_of(site, scope)
        if mask is None:
            return None, data
        mask, captured = reader.used(mask)
        structure = structure_of(mask, *lengths, names_of([site.program]))
        return structure, (*bring(captured, scope), *data)

    def _data_of(self, site: Site, scope: Scope) -> tuple[Node, ...]:
        """Nodes of a call's graph with the data of its site's program.

        Raises ValueError where the data was not passed.
        """
        names = names_of([site.program])
        if not names:
            return ()
        model = self.model
        if not set(names) <= set(self._data):
            check_forward(model, type(model).forward)
            check_names(type(model).__name__, names, self._data)
        outermost = scope
        while outermost.outer is not None:
            outermost = outermost.outer
        if not set(outermost.part.graph.nodes).issuperset(self._data[name] for name in names):
            raise NotImplementedError(
                f"{site.path} is called in a graph inside of the model's, into which data of a "
                f"call is not brought{line_of(scope.node)}. Use a program without data there"
            )
        return tuple(bring([(outermost, self._data[name]) for name in names], scope))


def _lengths(query: Node, key: Node, dim: int) -> tuple[Any, Any]:
    """Tokens of the query and of the key, along a dimension."""
    return example_of(query).shape[dim], example_of(key).shape[dim]


def _unmarked(graph: GraphModule) -> dict[str, Node]:
    """The marked data of a call by name; the marks are removed."""
    data = {}
    for node in graph.graph.find_nodes(op="call_function", target=named):
        x, name = node.args
        data[name] = x
        node.replace_all_uses_with(x)
        graph.graph.erase_node(node)
    return data


def _replace(
    part: GraphModule, node: Node, target: Callable[..., Any], arguments: dict[str, Any]
) -> None:
    """Replace a node by a call of `target`."""
    with part.graph.inserting_before(node):
        replacement = part.graph.call_function(target, (), arguments)
    replacement.meta = dict(node.meta)
    node.replace_all_uses_with(replacement)
    part.graph.erase_node(node)


def _heads_of(query: Any) -> int | None:
    """Heads of a query (..., heads, tokens, width); None without heads."""
    if not isinstance(query, Node):
        return None
    example = example_of(query)
    if example is None or example.dim() < 4:
        return None
    return int(example.shape[-3])
