"""What a model becomes under some passes, before anything is compiled or run: the graphs that inductor would be given."""

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
    """A model's graph as Dynamo takes it, and what it takes. training: a backward follows."""

    module: GraphModule
    inputs: tuple[Any, ...]
    training: bool


@dataclass(frozen=True)
class Change:
    """What one pass did to one graph: a line for each change, none where it left the graph alone."""

    by: Pass
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Traced:
    """The lowered graphs of a step. backward: None in inference."""

    passes: tuple[Pass, ...]
    forward: GraphModule
    backward: GraphModule | None
    changes: tuple[Change, ...]

    def footprint(self, *, sizes: Mapping[str, int] | None = None) -> Footprint:
        """What the compiled step holds at its peak. sizes: values of symbols, else those of the trace."""
        # Inductor has ordered the nodes before the passes of Stage.LOWERED did.
        with config.patch(options(self.passes) | {"reorder_for_locality": False}):
            if self.backward is None:
                return footprint.of_graph(self.forward, sizes=sizes)
            return footprint.of_step(self.forward, self.backward, sizes=sizes)


def captured(module: GraphModule, inputs: Sequence[Any]) -> Captured:
    """What a backend of torch.compile is called with. It may be traced until that backend returns."""
    wants = any(isinstance(each, Tensor) and each.requires_grad for each in inputs)
    return Captured(module, tuple(inputs), wants and torch.is_grad_enabled())


def capture(
    model: Callable[..., Any],
    example_inputs: Sequence[Any],
    study: Callable[[Captured], Result],
    *,
    train: bool,
    dynamic: bool | None = None,
) -> Result:
    """study(graph) of the whole graph of a model, which is not run. example_inputs: real, fake or meta; their data do not matter.

    Raises torch._dynamo.exc.Unsupported with the line where the model cannot be one graph, and TypeError or ValueError where it
    cannot be called with such inputs.
    """
    arguments.model(model)
    given = arguments.inputs("example_inputs", example_inputs, model)
    arguments.flag("dynamic", dynamic, or_none=True)
    found: list[Result] = []

    def backend(module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        found.append(study(captured(module, inputs)))
        return _stop

    device = next((each.device for each in model.parameters()), None) if isinstance(model, nn.Module) else None
    untouched = pytree.tree_map_only(Tensor, lambda each: _untouched(each, device), given)
    torch._dynamo.reset()
    try:
        with torch.set_grad_enabled(train):
            torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)(*untouched)
    except _Stopped:
        return found[-1]
    except (TorchRuntimeError, Unsupported) as error:
        # An operator has refused its operands; all else that Dynamo does not support says itself where it stands.
        if isinstance(error, Unsupported) and not isinstance(error.__cause__, TypeError):
            raise
        kinds = ", ".join(map(arguments.shown, given))
        raise ValueError(
            f"example_inputs must be inputs that the model can compute with; got {kinds}: {_refusal(error)}"
        ) from error
    finally:
        torch._dynamo.reset()
    raise ValueError(f"model must compute with tensors; got {model!r}, which has no graph")


def _refusal(error: BaseException) -> BaseException:
    """What an operator said, for which Dynamo has raised errors of its own."""
    inner = error.__cause__ or error.__context__
    return _refusal(inner) if isinstance(error, TorchDynamoException) and inner is not None else error


def trace(graph: Captured, passes: Sequence[Pass]) -> Traced:
    """Runs the passes of every stage where torch.compile would; nothing is compiled."""
    from torch._inductor.compile_fx import compile_fx

    lowered: list[GraphModule] = []
    patches, changes = _recording(passes)

    def keep(module: GraphModule, inputs: Sequence[Any], **settings: Any) -> Any:
        lowered.append(_lowered(module, inputs, inference=bool(settings.get("is_inference"))))
        return _stop

    with ExitStack() as stack:
        stack.enter_context(functorch_config.patch(force_non_lazy_backward_lowering=True, enable_autograd_cache=False))
        stack.enter_context(config.patch(force_disable_caches=True))
        stack.enter_context(torch.set_grad_enabled(graph.training))
        compile_fx(footprint.copied(graph.module), list(graph.inputs), inner_compile=keep, config_patches=patches)
    forward, *rest = lowered
    return Traced(tuple(passes), forward, rest[0] if rest else None, tuple(changes))


def without_idle(graph: Captured, passes: Sequence[Pass], *, kept: Collection[Pass] = ()) -> tuple[Pass, ...]:
    """All but those of Stage.DYNAMO that find nothing to do, which is known before the graph is differentiated and lowered."""
    from torch._inductor.compile_fx import _recursive_pre_grad_passes

    early = [each for each in passes if each.stage is Stage.DYNAMO]
    if not early:
        return tuple(passes)
    patches, changes = _recording(early)
    with config.patch(patches):
        _recursive_pre_grad_passes(footprint.copied(graph.module), list(graph.inputs))
    counting = busy(early, changes, kept=kept)
    return tuple(each for each in passes if each not in early or each in counting)


def _recording(passes: Sequence[Pass]) -> tuple[dict[str, Any], list[Change]]:
    """Options of inductor with which `passes` run, and where what they do will stand."""
    changes: list[Change] = []
    return inductor_configs(passes, told=lambda by, lines: changes.append(Change(by, tuple(lines)))), changes


def busy(passes: Sequence[Pass], changes: Sequence[Change], *, kept: Collection[Pass] = ()) -> tuple[Pass, ...]:
    """Those without which a step would be another: they changed something, or want an option; and `kept`."""
    acting = [each.by for each in changes if each.lines]
    return tuple(each for each in passes if each in acting or each in kept or options([each]))


def _lowered(module: GraphModule, inputs: Sequence[Any], *, inference: bool) -> GraphModule:
    """A graph after inductor's last passes, which run the hooks of Stage.LOWERED."""
    from torch._inductor import compile_fx
    from torch._inductor.fx_passes.post_grad import view_to_reshape
    from torch._inductor.virtualized import V

    module = footprint.copied(module)
    view_to_reshape(module)
    with torch.no_grad(), V.set_fake_mode(compile_fx.fake_tensor_prop(module, list(inputs))):
        compile_fx._recursive_post_grad_passes(module, is_inference=inference)
    return module


class _Stopped(BaseException):
    """The model was captured, and is not to run."""


def _stop(*arguments: Any) -> Any:
    raise _Stopped


def _untouched(tensor: Tensor, device: torch.device | None) -> Tensor:
    """Memory that is never touched takes none."""
    where = device or torch.device("cpu") if tensor.device.type == "meta" else tensor.device
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=where)
    return made.requires_grad_(tensor.requires_grad)
