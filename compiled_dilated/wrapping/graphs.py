"""Compilation of a model's forward in place, with attention by programs."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.comptime import comptime
from torch._dynamo.exc import BackendCompilerFailed
from torch.fx import GraphModule

from ..masks import Mask
from ..programs import Program, as_program
from ..tracing import is_traced
from .data import ARGUMENT, ByPosition, forward_of, names_of, tensors_by_name
from .flex import device_check
from .layers import Choice, check_choice, check_patterns
from .rewriting import Rewriting, named
from .sites import put_sites, sites_of

# In the graph, without a look inside.
_named = torch.compiler.allow_in_graph(named)

# Compiles a graph for example inputs, as a backend of torch.compile.
Backend = Callable[[GraphModule, Sequence[Any]], Callable[..., Any]]
# Not of a model, whose copies and pickles could not have it.
_FIRST_CALLS = threading.RLock()


def wrap(
    model: nn.Module, attention: Choice, dynamic: bool | None, backend: Backend | None = None
) -> nn.Module:
    """The model, its forward compiled in place with attention by programs.

    attention: as in `compile`; a path is that of the module that calls the attention, path#2 of
        its second call. Data that programs read by name is passed in a call, as
        model(x, data={name: tensor}).
    dynamic: as in torch.compile; the forward is captured whole (fullgraph).
    backend: compiles the rewritten graphs, default torch's inductor.

    Raises ValueError for a pattern that matches no module, and for a model with a wrapped part.
    The first call raises ValueError if no attention is found or a program shows later keys to a
    causal call; NotImplementedError, with the source line, for what is not computed: dropout of
    weights, weights as a result; and torch.compile's own errors for what it cannot capture.
    """
    check_choice(attention)
    paths = [path for path, _ in model.named_modules()]
    choice = attention
    if isinstance(attention, Mapping):
        # Calls of a module are counted in the trace.
        choice = {pattern.partition("#")[0]: None for pattern in attention}
    check_patterns(choice, paths)
    for path, module in model.named_modules():
        if module is not model and _wrapped_of(module) is not None:
            raise ValueError(
                f"{path} of {type(model).__name__} is wrapped already. Wrap only the whole model"
            )
    _leave_fast_paths(model)
    put_sites(model, [])
    forward = model.__dict__.get("forward")
    # A model that is wrapped already is wrapped anew, around its own forward.
    before = _wrapped_of(model)
    if before is not None:
        forward = before.forward
    model.forward = _Wrapped(model, forward, attention, dynamic, backend or _inductor).run
    return model


@contextlib.contextmanager
def exportable(
    model: nn.Module, inputs: tuple[Tensor, ...], dynamic_shapes: tuple[Any, ...]
) -> Iterator[nn.Module]:
    """The model, or the rewritten graph of a wrapped model, for torch.export.

    inputs: of the forward, then the data of a wrapped model's programs in the order of names.
    dynamic_shapes: of the inputs, as in torch.export.

    Raises RuntimeError on exit if attention of a wrapped model was not replaced.
    """
    wrapped, forward = _wrapped_of(model), forward_of(model)
    if forward is not None:
        yield ByPosition(model, forward.names)
        return
    if wrapped is None:
        yield model
        return
    rewriting, graph = wrapped.rewriting(), wrapped.capture(inputs, dynamic_shapes)
    rewriting.rewrite(graph)
    yield graph
    rewriting.check_replaced()


def _wrapped_of(module: nn.Module) -> _Wrapped | None:
    owner = getattr(module.__dict__.get("forward"), "__self__", None)
    return owner if isinstance(owner, _Wrapped) else None


class _Wrapped:
    """A model's compiled forward: `run` replaces the model's `forward`.

    forward: the model's own, where it is not its class's.

    Copies and pickles of the model compile anew.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Callable[..., Any] | None,
        attention: Choice,
        dynamic: bool | None,
        backend: Backend,
    ) -> None:
        self.model, self.forward, self.attention = model, forward, attention
        self.dynamic, self.backend = dynamic, backend
        self._compiled: Callable[..., Any] | None = None
        # The graphs so far, and whether the last call needed no new one.
        self._graphs, self._is_settled = 0, False

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward.

        Its keyword `data`, tensors by name, is for the programs, unless the model has one.
        """
        if is_traced():
            raise NotImplementedError(
                "this model is compiled by compiled_dilated.compile(model, attention=...): "
                "torch.compile or torch.export around it would leave that out. Call it as it is, "
                "and export it by compiled_dilated.export(model, ...)"
            )
        # All in this function: Dynamo skips it behind the refusal, whereas it would trace the
        # compiled forward in another one, and leave the program out.
        if self._compiled is None:
            self._compiled = self._compile()
        # First calls are serialized: threads without a graph would compile one each, past torch's
        # limit of graphs.
        turn: Any = contextlib.nullcontext() if self._is_settled else _FIRST_CALLS
        data = {}
        if ARGUMENT in kwargs and not self._has_own_data():
            data = tensors_by_name(kwargs.pop(ARGUMENT))
        try:
            with turn:
                graphs = self._graphs
                out = self._compiled(data, *args, **kwargs)
                self._is_settled = self._graphs == graphs
            return out
        except BaseException as failure:
            # A trace that failed has not restored torch's check.
            device_check.restore()
            if isinstance(failure, BackendCompilerFailed) and isinstance(
                failure.inner_exception, (NotImplementedError, TypeError, ValueError)
            ):
                # The rewriting's message to the user, without torch's frame around it.
                raise failure.inner_exception from None
            raise

    def capture(self, inputs: tuple[Tensor, ...], dynamic_shapes: tuple[Any, ...]) -> GraphModule:
        """The model's own forward as a graph; its parameters are the model's.

        inputs: of the forward, then the programs' data in the order of names.
        """
        traced, names = self._traced(), self._names()
        count = len(inputs) - len(names)

        def by_position(*tensors: Tensor) -> Any:
            return traced(dict(zip(names, tensors[count:], strict=True)), *tensors[:count])

        capturing = torch._dynamo.export(
            by_position, dynamic_shapes=(dynamic_shapes,), assume_static_by_default=True
        )
        try:
            graph: GraphModule = capturing(*inputs).graph_module
        finally:
            device_check.restore()
        return graph

    def _compile(self) -> Callable[..., Any]:
        rewriting = self.rewriting()

        def backend(graph: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            self._graphs, self._is_settled = self._graphs + 1, False
            rewriting.rewrite(graph)
            compiled = self.backend(graph, inputs)
            rewriting.check_replaced()
            return compiled

        return torch.compile(self._traced(), backend=backend, dynamic=self.dynamic, fullgraph=True)

    def rewriting(self) -> Rewriting:
        """A replacement of the model's attention, for one compiled or exported function."""
        return Rewriting(self.model, self.attention, __file__)

    def _traced(self) -> Callable[..., Any]:
        """The model's own forward as a function for Dynamo."""
        model, model_forward = self.model, self.forward
        if model_forward is None:
            model_forward = functools.partial(type(model).forward, model)

        def traced(data: dict[str, Tensor], /, *args: Any, **kwargs: Any) -> Any:
            if not is_traced():
                raise RuntimeError(
                    "torch runs this model without compiling it (torch.compiler.set_stance, or "
                    "TORCHDYNAMO_DISABLE), which would leave its attention as it was"
                )
            # Called by Dynamo while it traces, not by the graph. Guards are built after the trace,
            # on torch's own check.
            comptime(_start_trace)
            for name, x in data.items():
                _named(x, name)
            out = model_forward(*args, **kwargs)
            comptime(_stop_trace)
            return out

        # A code object of its own: Dynamo limits the number of graphs per code object.
        return FunctionType(
            traced.__code__.replace(), traced.__globals__, "traced", None, traced.__closure__
        )

    def _has_own_data(self) -> bool:
        """Whether the model's own forward has an argument `data`."""
        forward = self.forward or type(self.model).forward
        return ARGUMENT in inspect.signature(forward).parameters

    def _names(self) -> tuple[str, ...]:
        """Names of the data that the programs read.

        Those of a function of layers are known after a call.
        """
        choices: list[Any] = [site.program for site in sites_of(self.model) or ()]
        if isinstance(self.attention, (Program, Mask)):
            choices = [self.attention]
        elif isinstance(self.attention, Mapping):
            choices = list(self.attention.values())
        programs = [choice for choice in choices if isinstance(choice, (Program, Mask))]
        return names_of(map(as_program, programs))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_compiled": None, "_is_settled": False}


def _start_trace(context: Any) -> None:
    device_check.replace()


def _stop_trace(context: Any) -> None:
    device_check.restore()


def _inductor(graph: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    from torch._inductor.compile_fx import compile_fx

    compiled: Any = compile_fx(graph, list(inputs))
    return compiled  # type: ignore[no-any-return]


def _leave_fast_paths(model: nn.Module) -> None:
    """Make torch's encoder layers run in Python.

    Their fast path, one operator for the layer, is taken for two activations by number.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
