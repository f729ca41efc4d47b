"""The graphs that inductor would lower under some passes.

Nothing is compiled or run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException, TorchRuntimeError, Unsupported
from torch._functorch import config as functorch_config
from torch._inductor import config
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from .. import arguments
from ..analysis import footprint
from ..analysis.footprint import Footprint
from ..protocol import Pass, Stage
from .inductor_hooks import inductor_configs, options

Result = TypeVar("Result")


@dataclass(frozen=True)
class Captured:
    """A model's graph as Dynamo captures it, with its inputs.

    training: a backward follows
    """

    module: GraphModule
    inputs: tuple[Any, ...]
    training: bool


@dataclass(frozen=True)
class Change:
    """The lines that a pass returned for a graph, one a change."""

    by: Pass
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Traced:
    """The lowered graphs of a step under some passes.

    backward: None in inference
    """

    passes: tuple[Pass, ...]
    forward: GraphModule
    backward: GraphModule | None
    changes: tuple[Change, ...]

    def footprint(self, *, sizes: Mapping[str, int] | None = None) -> Footprint:
        """The footprint of the compiled step.

        sizes: values of symbols; other symbols count as traced
        """
        # Inductor has reordered for locality before the passes of Stage.LOWERED; again, it would
        # undo their order.
        with config.patch(options(self.passes) | {"reorder_for_locality": False}):
            if self.backward is None:
                return footprint.of_graph(self.forward, sizes=sizes)
            return footprint.of_step(self.forward, self.backward, sizes=sizes)


def captured(module: GraphModule, inputs: Sequence[Any]) -> Captured:
    """Arguments of a torch.compile backend, traceable until it returns."""
    has_gradient = any(isinstance(value, Tensor) and value.requires_grad for value in inputs)
    return Captured(module, tuple(inputs), has_gradient and torch.is_grad_enabled())


def capture(
    model: Callable[..., Any],
    example_inputs: Sequence[Any],
    study: Callable[[Captured], Result],
    *,
    train: bool,
    dynamic: bool | None = None,
) -> Result:
    """Capture a model's whole graph without a run; return study(graph).

    example_inputs: real, fake or meta tensors; their data is not read
    study: called while the graph may be traced
    train: with gradients enabled
    dynamic: as in torch.compile

    Raises torch._dynamo.exc.Unsupported with the line at which the model cannot be one graph, and
    TypeError or ValueError if it cannot be called with such inputs.
    """
    arguments.model(model)
    inputs = arguments.inputs("example_inputs", example_inputs, model)
    arguments.flag("dynamic", dynamic, or_none=True)
    results: list[Result] = []

    def backend(module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        results.append(study(captured(module, inputs)))
        return _stop

    device = None
    if isinstance(model, nn.Module):
        device = next((parameter.device for parameter in model.parameters()), None)
    empty = pytree.tree_map_only(Tensor, lambda tensor: _empty_like(tensor, device), inputs)
    torch._dynamo.reset()
    try:
        with torch.set_grad_enabled(train):
            torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)(*empty)
    except _Stopped:
        return results[-1]
    except (TorchRuntimeError, Unsupported) as error:
        # Only errors of operators are converted. Others that Dynamo raises name the line.
        if isinstance(error, Unsupported) and not isinstance(error.__cause__, TypeError):
            raise
        raise _refused(inputs, error) from error
    finally:
        torch._dynamo.reset()
    raise ValueError(f"model must compute with tensors; got {model!r}, which has no graph")


def _refused(inputs: Sequence[Any], error: BaseException) -> ValueError:
    """The error for inputs that an operator of the model refuses."""
    kinds = ", ".join(map(arguments.shown, inputs))
    return ValueError(
        f"example_inputs must be inputs that the model can compute with; got {kinds}: "
        f"{_innermost(error)}"
    )


def _innermost(error: BaseException) -> BaseException:
    """The error of an operator, from those that Dynamo raised for it."""
    inner = error.__cause__ or error.__context__
    if isinstance(error, TorchDynamoException) and inner is not None:
        return _innermost(inner)
    return error


def trace(graph: Captured, passes: Sequence[Pass]) -> Traced:
    """Run the passes of every stage where torch.compile would, without compiling."""
    from torch._inductor.compile_fx import compile_fx

    lowered: list[GraphModule] = []
    patches, changes = _recording(passes)

    def keep(module: GraphModule, inputs: Sequence[Any], **settings: Any) -> Any:
        is_inference = bool(settings.get("is_inference"))
        lowered.append(_lowered(module, inputs, inference=is_inference))
        return _stop

    with ExitStack() as stack:
        # The backward is lowered at once, and nothing is read from a cache: every pass must run.
        stack.enter_context(
            functorch_config.patch(
                force_non_lazy_backward_lowering=True, enable_autograd_cache=False
            )
        )
        stack.enter_context(config.patch(force_disable_caches=True))
        stack.enter_context(torch.set_grad_enabled(graph.training))
        compile_fx(
            footprint.copied(graph.module),
            list(graph.inputs),
            inner_compile=keep,
            config_patches=patches,
        )
    # The forward is lowered first, then the backward of a training step.
    backward = lowered[1] if len(lowered) > 1 else None
    return Traced(tuple(passes), lowered[0], backward, tuple(changes))


def without_idle(
    graph: Captured, passes: Sequence[Pass], *, required: Collection[Pass] = ()
) -> tuple[Pass, ...]:
    """The passes, less those of Stage.DYNAMO without effect on a graph.

    Cheaper than `busy`: the graph need not be differentiated and lowered.

    required: passes that stay
    """
    from torch._inductor.compile_fx import _recursive_pre_grad_passes

    early = [member for member in passes if member.stage is Stage.DYNAMO]
    if not early:
        return tuple(passes)
    patches, changes = _recording(early)
    with config.patch(patches):
        _recursive_pre_grad_passes(footprint.copied(graph.module), list(graph.inputs))
    acting = busy(early, changes, required=required)
    return tuple(member for member in passes if member not in early or member in acting)


def _recording(passes: Sequence[Pass]) -> tuple[dict[str, Any], list[Change]]:
    """Inductor's options to run `passes`, and a list of their changes."""
    changes: list[Change] = []

    def record(member: Pass, lines: Sequence[str]) -> None:
        changes.append(Change(member, tuple(lines)))

    return inductor_configs(passes, on_run=record), changes


def busy(
    passes: Sequence[Pass], changes: Sequence[Change], *, required: Collection[Pass] = ()
) -> tuple[Pass, ...]:
    """The passes that changed a graph, set an option, or are required."""
    acting = [change.by for change in changes if change.lines]
    return tuple(
        member for member in passes if member in acting or member in required or options([member])
    )


def _lowered(module: GraphModule, inputs: Sequence[Any], *, inference: bool) -> GraphModule:
    """A copy of a graph after Stage.LOWERED, the last of inductor's passes."""
    from torch._inductor import compile_fx
    from torch._inductor.fx_passes.post_grad import view_to_reshape
    from torch._inductor.virtualized import V

    module = footprint.copied(module)
    view_to_reshape(module)
    with torch.no_grad(), V.set_fake_mode(compile_fx.fake_tensor_prop(module, list(inputs))):
        compile_fx._recursive_post_grad_passes(module, is_inference=inference)
    return module


class _Stopped(BaseException):
    """Raised in place of running a captured model."""


def _stop(*arguments: Any) -> Any:
    raise _Stopped


def _empty_like(tensor: Tensor, device: torch.device | None) -> Tensor:
    """A tensor like another, without memory: its data are never touched.

    device: for a meta tensor
    """
    if tensor.device.type != "meta":
        device = tensor.device
    empty = torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device or torch.device("cpu")
    )
    return empty.requires_grad_(tensor.requires_grad)
