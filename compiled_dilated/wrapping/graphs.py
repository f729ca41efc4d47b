"""Attention of any model: calls of torch's attention in the graphs that Dynamo captures become ours.

    scaled_dot_product_attention           replaced      calls.py
    F.multi_head_attention_forward         the same code over a replaced scaled_dot_product_attention      multihead.py
    flex_attention                         replaced, its score_mod and mask_mod with it      flex.py

Graphs inside of graphs (checkpoints) too. A mask of the call joins the program: nothing that it hides is shown. How it is made is
read from the graph (reading.py), so that one that says "causal, and no padding" is never made.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.fx import GraphModule, Node

from . import rules_of_reading  # noqa: F401  what is read of masks
from .calls import Attention
from .expressions import Expression, Index
from .flex import FLEX, FlexCall, training
from .layers import Choice, Layer, check_choice, check_patterns, program_of
from .multihead import MULTIHEAD, bound_arguments, multihead, read_masks
from .places import leave_out_own, line_of, path_of
from .reading import Reader, Scope, bring, callers_of, example_of, scope_of
from .sites import Site, put_sites
from .structure import Structure, structure_of

_SDPA = (
    F.scaled_dot_product_attention,
    torch._C._nn.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention.default,
)
_SDPA_PARAMETERS = (
    "query",
    "key",
    "value",
    "attn_mask",
    "dropout_p",
    "is_causal",
    "scale",
    "enable_gqa",
)
# The pair's indices along a mask, by the dimensions of the query.
_SDPA_INDICES = {
    2: (Index("q"), Index("kv")),
    3: (Index("b"), Index("q"), Index("kv")),
    4: (Index("b"), Index("h"), Index("q"), Index("kv")),
}
# Attention that is not read, by the names that people know.
_CLOSED = {
    torch._transformer_encoder_layer_fwd: "the fast path of nn.TransformerEncoderLayer",
    torch._native_multi_head_attention: "the fast path of nn.MultiheadAttention",
}
_WAY_OUT = "Call compiled_dilated.compile(program) there"
# Operators that compute a graph inside of a graph once more in the backward, and pass all other operands on to it.
_CHECKPOINTS = ("tag_activation_checkpoint",)

Backend = Callable[[GraphModule, Sequence[Any]], Callable[..., Any]]


def wrap(
    model: nn.Module, attention: Choice, dynamic: bool | None, backend: Backend | None = None
) -> nn.Module:
    """The model, its forward compiled in place with attention by programs.

    attention: as in `compile`; a path is that of the module which calls the attention, path#2 of its second call.
    dynamic: as in torch.compile, which captures the forward whole (fullgraph).
    backend: what compiles the rewritten graphs, default torch's inductor.

    Raises ValueError for a pattern that matches no module, and where a part of the model is wrapped already. The first call
    raises ValueError where no attention is found or a program shows later keys to a causal call; NotImplementedError, with the
    source line, for what is not computed: dropout of weights, weights as a result; and what torch.compile raises for what it
    cannot capture.
    """
    check_choice(attention)
    names = [name for name, _ in model.named_modules()]
    patterns = (
        {pattern.partition("#")[0]: None for pattern in attention}
        if isinstance(attention, Mapping)
        else attention
    )
    check_patterns(patterns, names)
    for name, module in model.named_modules():
        if module is not model and _wrapped_of(module) is not None:
            raise ValueError(
                f"{name} of {type(model).__name__} is wrapped already. Wrap the whole model alone"
            )
    _leave_fast_paths(model)
    put_sites(model, [])
    before = _wrapped_of(model)
    forward = model.__dict__.get("forward") if before is None else before.forward
    model.forward = _Wrapped(model, forward, attention, dynamic, backend or _inductor).run
    return model


def _wrapped_of(module: nn.Module) -> _Wrapped | None:
    owner = getattr(module.__dict__.get("forward"), "__self__", None)
    return owner if isinstance(owner, _Wrapped) else None


class _Wrapped:
    """Whose `run` stands in a model for its forward; copies and pickles of the model compile anew.

    forward: the model's own where it is not that of its class.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Callable[..., Any] | None,
        attention: Choice,
        dynamic: bool | None,
        backend: Backend,
    ) -> None:
        self.model, self.forward, self.attention, self.dynamic, self.backend = (
            model,
            forward,
            attention,
            dynamic,
            backend,
        )
        self._compiled: Callable[..., Any] | None = None

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward."""
        if torch.compiler.is_compiling():
            raise NotImplementedError(
                "this model is compiled by compiled_dilated.compile(model, attention=...): torch.compile or torch.export around "
                "it would leave that out. Call it as it is; export a model that is built of compiled_dilated.compile(program)"
            )
        if self._compiled is None:
            self._compiled = self._compile()
        try:
            with training:
                return self._compiled(*args, **kwargs)
        except BackendCompilerFailed as failure:
            # What the rewriting says to the user, without torch's frame around it.
            if isinstance(failure.inner_exception, (NotImplementedError, TypeError, ValueError)):
                raise failure.inner_exception from None
            raise

    def _compile(self) -> Callable[..., Any]:
        model, own = self.model, self.forward
        forward: Callable[..., Any] = (
            functools.partial(type(model).forward, model) if own is None else own
        )

        def traced(*args: Any, **kwargs: Any) -> Any:
            if not torch.compiler.is_compiling():
                raise RuntimeError(
                    "torch runs this model without compiling it (torch.compiler.set_stance, or TORCHDYNAMO_DISABLE), which would "
                    "leave its attention as it was"
                )
            return forward(*args, **kwargs)

        # A code object of its own: Dynamo counts graphs by code, and those of all wrapped models would be one too many.
        alone = FunctionType(
            traced.__code__.replace(), traced.__globals__, "traced", None, traced.__closure__
        )
        rewriting = _Rewriting(model, self.attention, self.backend)
        return torch.compile(alone, backend=rewriting, dynamic=self.dynamic, fullgraph=True)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_compiled": None}


def _inductor(graph: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    from torch._inductor.compile_fx import compile_fx

    compiled: Any = compile_fx(graph, list(inputs))
    return compiled  # type: ignore[no-any-return]


def _leave_fast_paths(model: nn.Module) -> None:
    """Send encoder layers of torch through Python: their fast path is one operator, of one activation of two."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0


class _Rewriting:
    """A backend of torch.compile that rewrites a graph before another one compiles it."""

    def __init__(self, model: nn.Module, attention: Choice, backend: Backend) -> None:
        self.model, self.attention, self.backend = model, attention, backend
        self.sites: dict[str, Site] = {}

    def __call__(self, graph: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        calls: Counter[str] = Counter()
        callers = callers_of(graph, _CHECKPOINTS)
        for part in graph.modules():
            if isinstance(part, GraphModule):
                leave_out_own(part, __file__, self.model)
                self._rewrite(part, calls, callers)
        if not self.sites:
            raise ValueError(
                f"{type(self.model).__name__} called no scaled_dot_product_attention, no nn.MultiheadAttention and no "
                "flex_attention: there is no attention to replace. Build its own of compiled_dilated.compile(program)"
            )
        put_sites(self.model, list(self.sites.values()))
        compiled = self.backend(graph, inputs)
        missed = [site.path for site in self.sites.values() if site.last is None]
        if missed:
            raise RuntimeError(
                f"attention of {', '.join(missed)} was not replaced, though it was found; please report this"
            )
        return compiled

    def _rewrite(
        self, part: GraphModule, calls: Counter[str], callers: Mapping[GraphModule, Scope]
    ) -> None:
        """Replace the calls of one graph. calls: how many each module has made so far. callers: of graphs inside of graphs."""
        for node in list(part.graph.nodes):
            if node.op != "call_function":
                continue
            if node.target in _CLOSED:
                raise NotImplementedError(
                    f"{_CLOSED[node.target]} is not replaced{line_of(node)}. {_WAY_OUT}"
                )
            rewrite = {MULTIHEAD: self._multihead, FLEX: self._flex}.get(node.target)
            if rewrite is None and node.target in _SDPA:
                rewrite = self._scaled_dot_product
            if rewrite is not None:
                target, arguments = rewrite(part, node, self._path(node, calls), callers)
                _replace(part, node, target, arguments)
        part.recompile()

    def _path(self, node: Node, calls: Counter[str]) -> str:
        """The path of a call's module; of its second call path#2."""
        path = path_of(node, self.model)
        calls[path] += 1
        return path if calls[path] == 1 else f"{path}#{calls[path]}"

    def _site(self, path: str, kind: str, causal: object, heads: int | None, node: Node) -> Site:
        """The site of a call, with the user's program for it."""
        if not isinstance(causal, bool):
            raise NotImplementedError(
                f"is_causal of {path} varies in the graph{line_of(node)}. Pass True or False"
            )
        site = Site(
            path,
            kind,
            program_of(self.attention, Layer(path, kind, None, causal, None, heads, heads, None)),
        )
        self.sites[path] = site
        return site

    def _scaled_dot_product(
        self, part: GraphModule, node: Node, path: str, callers: Mapping[GraphModule, Scope]
    ) -> _Replacement:
        bound: dict[str, Any] = dict(zip(_SDPA_PARAMETERS, node.args, strict=False)) | node.kwargs
        site = self._site(
            path,
            "scaled_dot_product_attention",
            bound.get("is_causal", False),
            _heads_of(bound["query"]),
            node,
        )
        reader, scope = Reader(), scope_of(part, node, callers)
        query, mask = bound["query"], bound.get("attn_mask")
        said = None
        if mask is not None and example_of(query).dim() <= 4:
            said = reader.mask(mask, scope, _SDPA_INDICES[example_of(query).dim()])
            bound["attn_mask"] = None
        structure, captured = _structure(said, reader, scope, bound["query"], bound["key"], -2)
        return Attention(site, line_of(node), structure), bound | {"captured": captured}

    def _multihead(
        self, part: GraphModule, node: Node, path: str, callers: Mapping[GraphModule, Scope]
    ) -> _Replacement:
        bound = bound_arguments(node)
        site = self._site(
            path,
            "multi_head_attention_forward",
            bound.get("is_causal", False),
            bound["num_heads"],
            node,
        )
        reader, scope = Reader(), scope_of(part, node, callers)
        said = read_masks(bound, reader, scope)
        structure, captured = _structure(said, reader, scope, bound["query"], bound["key"], 0)
        return multihead(Attention(site, line_of(node), structure)), bound | {"captured": captured}

    def _flex(
        self, part: GraphModule, node: Node, path: str, callers: Mapping[GraphModule, Scope]
    ) -> _Replacement:
        call = FlexCall(part, node)
        site = self._site(path, "flex_attention", False, _heads_of(call.query), node)
        reader, scope = Reader(), scope_of(part, node, callers)
        said = call.read_mask(reader, scope)
        call.check_tiles(said)
        structure, captured = _structure(said, reader, scope, call.query, call.key, -2)
        return call.replacement(
            Attention(site, line_of(node), structure), said is not None
        ), call.arguments(captured)


_Replacement = tuple[Callable[..., Any], dict[str, Any]]


def _structure(
    said: Expression | None, reader: Reader, scope: Scope, query: Node, key: Node, tokens: int
) -> tuple[Structure | None, tuple[Node, ...]]:
    """What a mask says, and the nodes that it captures; nothing of none.

    tokens: the dimension of query and key that counts them.
    """
    if said is None:
        return None, ()
    said, captured = reader.used(said)
    q_len, kv_len = (example_of(x).shape[tokens] for x in (query, key))
    return structure_of(said, q_len, kv_len), tuple(bring(captured, scope))


def _replace(
    part: GraphModule, node: Node, target: Callable[..., Any], arguments: dict[str, Any]
) -> None:
    """Put a call in the place of another."""
    with part.graph.inserting_before(node):
        ours = part.graph.call_function(target, (), arguments)
    ours.meta = dict(node.meta)
    node.replace_all_uses_with(ours)
    part.graph.erase_node(node)


def _heads_of(query: Any) -> int | None:
    example = example_of(query) if isinstance(query, Node) else None
    return None if example is None or example.dim() < 4 else int(example.shape[-3])
