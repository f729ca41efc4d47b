"""Attention of any model: calls of torch's attention in the graphs that Dynamo captures become ours.

    scaled_dot_product_attention           replaced
    F.multi_head_attention_forward         the same code over a replaced scaled_dot_product_attention

Graphs inside of graphs (checkpoints) too. A mask of the call joins the program: nothing that it hides is shown.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from operator import getitem
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._higher_order_ops.flex_attention import flex_attention
from torch.fx import GraphModule, Node

from .. import masks
from ..attend import Attend
from ..programs import Program, as_program
from .layers import Choice, Layer, check_choice, check_patterns, program_of
from .scores import added
from .sites import Site, put_sites

_SDPA = (
    F.scaled_dot_product_attention,
    torch._C._nn.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention.default,
)
_SDPA_PARAMETERS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_MULTIHEAD = F.multi_head_attention_forward
# Attention that is not read, by the names that people know.
_CLOSED = {
    flex_attention: "flex_attention",
    torch._transformer_encoder_layer_fwd: "the fast path of nn.TransformerEncoderLayer",
    torch._native_multi_head_attention: "the fast path of nn.MultiheadAttention",
}
_WAY_OUT = "Call compiled_dilated.compile(program) there"
_PADDING = "padding"

Backend = Callable[[GraphModule, Sequence[Any]], Callable[..., Any]]


def wrap(model: nn.Module, attention: Choice, dynamic: bool | None, backend: Backend | None = None) -> nn.Module:
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
    patterns = {pattern.partition("#")[0]: None for pattern in attention} if isinstance(attention, Mapping) else attention
    check_patterns(patterns, names)
    for name, module in model.named_modules():
        if module is not model and _wrapped_of(module) is not None:
            raise ValueError(f"{name} of {type(model).__name__} is wrapped already. Wrap the whole model alone")
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
        self, model: nn.Module, forward: Callable[..., Any] | None, attention: Choice, dynamic: bool | None, backend: Backend
    ) -> None:
        self.model, self.forward, self.attention, self.dynamic, self.backend = model, forward, attention, dynamic, backend
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
            return self._compiled(*args, **kwargs)
        except BackendCompilerFailed as failure:
            # What the rewriting says to the user, without torch's frame around it.
            if isinstance(failure.inner_exception, (NotImplementedError, TypeError, ValueError)):
                raise failure.inner_exception from None
            raise

    def _compile(self) -> Callable[..., Any]:
        model, own = self.model, self.forward
        forward: Callable[..., Any] = functools.partial(type(model).forward, model) if own is None else own

        def traced(*args: Any, **kwargs: Any) -> Any:
            if not torch.compiler.is_compiling():
                raise RuntimeError(
                    "torch runs this model without compiling it (torch.compiler.set_stance, or TORCHDYNAMO_DISABLE), which would "
                    "leave its attention as it was"
                )
            return forward(*args, **kwargs)

        # A code object of its own: Dynamo counts graphs by code, and those of all wrapped models would be one too many.
        alone = FunctionType(traced.__code__.replace(), traced.__globals__, "traced", None, traced.__closure__)
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
        for part in graph.modules():
            if isinstance(part, GraphModule):
                self._rewrite(part, calls)
        if not self.sites:
            raise ValueError(
                f"{type(self.model).__name__} called no scaled_dot_product_attention and no nn.MultiheadAttention: there is no "
                "attention to replace. Build its own of compiled_dilated.compile(program)"
            )
        put_sites(self.model, list(self.sites.values()))
        compiled = self.backend(graph, inputs)
        missed = [site.path for site in self.sites.values() if site.last is None]
        if missed:
            raise RuntimeError(f"attention of {', '.join(missed)} was not replaced, though it was found; please report this")
        return compiled

    def _rewrite(self, part: GraphModule, calls: Counter[str]) -> None:
        """Replace the calls of one graph. calls: how many each module has made so far."""
        for node in list(part.graph.nodes):
            if node.op != "call_function":
                continue
            if node.target in _SDPA:
                bound = dict(zip(_SDPA_PARAMETERS, node.args, strict=False)) | node.kwargs
                self._replace(part, node, bound, self._path(node, calls), _heads_of(bound["query"]))
            elif node.target is _MULTIHEAD:
                bound = dict(inspect.signature(_MULTIHEAD).bind(*node.args, **node.kwargs).arguments)
                _leave_out_weights(node, bound)
                self._replace(part, node, bound, self._path(node, calls), bound["num_heads"])
            elif node.target in _CLOSED:
                raise NotImplementedError(f"{_CLOSED[node.target]} is not replaced{_line_of(node)}. {_WAY_OUT}")
        part.recompile()

    def _path(self, node: Node, calls: Counter[str]) -> str:
        """The path of a call's module; of its second call path#2."""
        path = _path_of(node, self.model)
        calls[path] += 1
        return path if calls[path] == 1 else f"{path}#{calls[path]}"

    def _replace(self, part: GraphModule, node: Node, bound: dict[str, Any], path: str, heads: int | None) -> None:
        causal = bound.get("is_causal", False)
        if not isinstance(causal, bool):
            raise NotImplementedError(f"is_causal of {path} varies in the graph{_line_of(node)}. Pass True or False")
        kind = "scaled_dot_product_attention" if node.target in _SDPA else "multi_head_attention_forward"
        layer = Layer(path, kind, None, causal, None, heads, heads, None)
        program = program_of(self.attention, layer)
        site = Site(layer.path, kind, program)
        self.sites[layer.path] = site
        attention = _Attention(site, _line_of(node))
        target = attention if node.target in _SDPA else _multihead(attention)
        with part.graph.inserting_before(node):
            ours = part.graph.call_function(target, (), bound)
        ours.meta = dict(node.meta)
        node.replace_all_uses_with(ours)
        part.graph.erase_node(node)


class _Attention:
    """What stands in a graph for scaled_dot_product_attention."""

    def __init__(self, site: Site, line: str) -> None:
        self.site, self.line = site, line
        self.__name__ = "attention"
        # By whether the call is causal and its mask one of keys alone.
        self.attends: dict[tuple[bool, bool], Attend] = {}
        for causal in (False, True):
            program = site.program or as_program(masks.causal() if causal else masks.full())
            self.attends[causal, False] = Attend(program)
            self.attends[causal, True] = Attend(_padded(program))

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """scaled_dot_product_attention over (..., heads, tokens, width), by the site's program and the mask of the call."""
        if dropout_p:
            raise NotImplementedError(f"dropout of attention weights ({dropout_p}) is not computed{self.line}. Set it to 0")
        if key.shape[-3:-2] != query.shape[-3:-2] and not enable_gqa:
            raise ValueError(f"{query.shape[-3]} query heads and {key.shape[-3]} key heads need enable_gqa=True{self.line}")
        if key.shape[:-3] != query.shape[:-3] or value.shape[:-3] != query.shape[:-3]:
            raise ValueError(
                f"query, key and value must have the same leading dimensions; got {tuple(query.shape)}, {tuple(key.shape)} and "
                f"{tuple(value.shape)}{self.line}"
            )
        q, k, v = (_four(x) for x in (query, key, value))
        attend, score_mod = self.attends[is_causal, False], None
        data: dict[str, Tensor] = {}
        said = "causal()" if is_causal else "full()"
        if attn_mask is not None:
            attn_mask = _four_of_mask(attn_mask, query)
            if _is_padding(attn_mask, k):
                attend, data = self.attends[is_causal, True], {_PADDING: ~attn_mask[:, 0, 0]}
            else:
                score_mod = added(attn_mask)
        said += _said_of(attn_mask, k)
        self.site.note(attend, said, 0, q.shape, k.shape, v.shape, q.dtype, q.device.type)
        out: Tensor = attend(q, k, v, scale=scale, data=data, score_mod=score_mod)
        return out.reshape(*query.shape[:-1], value.shape[-1])


def _multihead(attention: _Attention) -> Callable[..., Any]:
    """F.multi_head_attention_forward over another scaled_dot_product_attention: the same code with one name changed."""
    names = {
        **_MULTIHEAD.__globals__,
        "scaled_dot_product_attention": attention,
        # Tensors of a trace would send the call on to the original.
        "has_torch_function": lambda tensors: False,
    }
    copy = FunctionType(_MULTIHEAD.__code__, names, "multi_head_attention", _MULTIHEAD.__defaults__, _MULTIHEAD.__closure__)
    copy.__kwdefaults__ = _MULTIHEAD.__kwdefaults__
    # A cache of graphs takes what torch's own modules define for the same in every process.
    copy.__module__ = __name__
    return copy


def _padded(program: Program) -> Program:
    return program.map(lambda mask: masks.conjunction((mask, masks.padding(_PADDING))))


def _is_padding(mask: Tensor, key: Tensor) -> bool:
    """Whether a mask hides keys from all queries and heads alike."""
    return mask.dtype == torch.bool and mask.shape[1] == 1 and mask.shape[2] == 1 and mask.shape[3] == key.shape[2]


def _said_of(mask: Tensor | None, key: Tensor) -> str:
    if mask is None:
        return ""
    if _is_padding(mask, key):
        return " & padding"
    return " & a mask" if mask.dtype == torch.bool else " + a bias"


def _four(x: Tensor) -> Tensor:
    """(batch, heads, tokens, width) of a tensor with any leading dimensions; of three the first is the batch."""
    if x.dim() == 4:
        return x
    if x.dim() < 4:
        return x[None, None] if x.dim() == 2 else x[:, None]
    return x.reshape(-1, *x.shape[-3:])


def _four_of_mask(mask: Tensor, query: Tensor) -> Tensor:
    """(batch or 1, heads or 1, queries or 1, keys or 1) of a mask that broadcasts to the scores of a query."""
    while mask.dim() < max(query.dim(), 2):
        mask = mask[None]
    if query.dim() <= 4:
        return _four(mask)
    # Leading dimensions are joined: each must be there whole.
    return mask.expand(*query.shape[:-3], *mask.shape[-3:]).reshape(-1, *mask.shape[-3:])


def _heads_of(query: Any) -> int | None:
    example = query.meta.get("example_value") if isinstance(query, Node) else None
    return None if example is None or example.dim() < 4 else int(example.shape[-3])


def _path_of(node: Node, model: nn.Module) -> str:
    """The path of the module that makes a call."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    # As L['self']._modules['layers']._modules['0'], or L['self'].layers[0].
    written: str = next(reversed(stack.values()))[0]
    words = [word for word in re.findall(r"\w+", written) if word != "_modules"]
    names = [name for name, _ in model.named_modules() if words[-len(name.split(".")) :] == name.split(".")]
    return max(names, key=len, default="")


def _line_of(node: Node) -> str:
    """Where the user's code makes a call, for messages."""
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines()]
    # Innermost outside of torch, whose folder every installation has somewhere else.
    torch_folder = os.path.dirname(torch.__file__)
    places = [line for line in lines if line.startswith("File") and torch_folder not in line]
    return f" ({places[-1]})" if places else ""


def _leave_out_weights(node: Node, bound: dict[str, Any]) -> None:
    """Ask for no weights where nobody reads them; raise NotImplementedError where somebody does."""
    if not bound.get("need_weights", True):
        return
    for user in node.users:
        is_item = user.target is getitem and user.args[1] == 1
        if is_item and user.users:
            raise NotImplementedError(f"attention weights as a result are not made{_line_of(node)}. Pass need_weights=False")
        if user.op == "output" or (user.target is not getitem):
            raise NotImplementedError(f"attention weights as a result are not made{_line_of(node)}. Pass need_weights=False")
    bound["need_weights"] = False
    # A hint so far: without weights torch's code would take it for the mask.
    bound["is_causal"] = False
