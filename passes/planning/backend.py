"""torch.compile under a memory budget: the backend, compile and estimate."""

from __future__ import annotations

import itertools
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import GraphModule
from torch.utils.weak import WeakIdRef

from .. import arguments
from ..analysis.peak import mebibytes
from ..protocol import Pass
from . import inductor_hooks
from .candidates import Passes, candidates, check_candidates, check_members, described
from .choose import BudgetError, Choice, Pipeline, pipeline
from .estimates import Estimate
from .estimates import estimate as estimated
from .tracing import Captured, capture, captured, trace, without_idle


class Backend:
    """A backend of torch.compile that chooses passes for each graph.

    Inductor compiles the graph with them.

    choices: one for each graph, in the order of compilation. Chosen here and not in inductor's
        hooks, which do not run if the compile cache is warm.

    Each graph is fitted to the budget alone. A warning says so once if a step has several: no
    graph is planned with what those before and after it keep.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline, self.choices = pipeline, list[Choice]()
        self._parts, self._has_warned = list[_Part](), False

    def __call__(self, module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        from torch._inductor.compile_fx import compile_fx

        # The graph may be traced only until compile_fx has begun to change it.
        choice = self.pipeline.choose(captured(module, inputs))
        symbols = {
            place: str(value)
            for place, value in enumerate(inputs)
            if isinstance(value, torch.SymInt)
        }
        configs = inductor_hooks.inductor_configs(choice.chosen.passes)
        run: Any = compile_fx(module, inputs, config_patches=configs)
        self.choices.append(choice)
        self._check_is_whole(inputs)
        budget = self.pipeline.budget_bytes
        # Sizes that are fixed fit already.
        return run if budget is None or not symbols else _Guarded(run, choice, budget, symbols)

    def reset(self) -> None:
        """Forget the parts: Dynamo's reset calls this, and numbers functions anew."""
        self._parts.clear()

    def _check_is_whole(self, inputs: Sequence[Any]) -> None:
        """Warn once if this graph is only a part of a step."""
        part = _part(inputs)
        if part is None:
            return
        # Dynamo calls reset() once only, on the backends registered here.
        getattr(torch._dynamo.eval_frame, "cached_backends", {})[id(self)] = self
        if not any(map(part.is_same, self._parts)):
            self._parts.append(part)
        budget = self.pipeline.budget_bytes
        if len(self._parts) <= 1 or self._has_warned or budget is None:
            return
        self._has_warned = True
        warnings.warn(
            f"memory_budget is kept by each graph alone, and the model breaks into several: a step "
            f"may exceed {budget:,} bytes by what its other graphs keep (activations saved for "
            "backward, gradients, parameters). Compile with fullgraph=True, which names the line "
            "of the break, or give a smaller memory_budget",
            stacklevel=2,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of a model is planned and compiled anew.
        return Backend, (self.pipeline,)


@dataclass(frozen=True)
class _Part:
    """The identity of a part of a step, equal at all sizes.

    function: Dynamo's number of the function; behind a graph break begins another
    parameters: of the graph; two modules of a class share their function, not these
    """

    function: int
    parameters: frozenset[WeakIdRef]

    def is_same(self, part: _Part) -> bool:
        if self.function != part.function:
            return False
        if not self.parameters or not part.parameters:
            return True
        return not self.parameters.isdisjoint(part.parameters)


def _part(inputs: Sequence[Any]) -> _Part | None:
    """The part that Dynamo compiles now; None outside of Dynamo."""
    compile_id = torch._guards.CompileContext.current_compile_id()
    if compile_id is None or compile_id.frame_id is None:
        return None
    parameters = [WeakIdRef(value) for value in inputs if isinstance(value, torch.nn.Parameter)]
    return _Part(compile_id.frame_id, frozenset(parameters))


class _Guarded:
    """A compiled graph that refuses sizes beyond its memory budget.

    symbols: names by the places of the inputs that are sizes
    fits: sizes that fit, by symbol; the peak does not fall if sizes grow
    """

    def __init__(
        self,
        run: Callable[..., Any],
        choice: Choice,
        budget_bytes: int,
        symbols: dict[int, str],
    ) -> None:
        self.run, self.choice, self.budget_bytes, self.symbols = run, choice, budget_bytes, symbols
        self.fits: list[dict[str, int]] = []

    def __call__(self, *inputs: Any) -> Any:
        sizes = {symbol: int(inputs[place]) for place, symbol in self.symbols.items()}
        if not any(_is_within(sizes, limits) for limits in self.fits):
            self._check(sizes)
        return self.run(*inputs)

    def _check(self, sizes: dict[str, int]) -> None:
        peak = self.choice.traced.footprint(sizes=sizes).peak_bytes
        if peak > self.budget_bytes:
            raise BudgetError(
                f"memory_budget must be at least {peak:,} bytes ({mebibytes(peak)}) for sizes "
                f"{sizes} under the plan made for earlier ones, "
                f"{described(self.choice.chosen.passes)}; got {self.budget_bytes:,}. "
                "Call with the longest input first",
                peak,
            )
        # Only the largest are kept: others are within them.
        self.fits = [limits for limits in self.fits if not _is_within(limits, sizes)]
        self.fits.append(sizes)


def _is_within(sizes: dict[str, int], limits: dict[str, int]) -> bool:
    """Whether no size is above its limit; both by symbol."""
    return all(size <= limits[symbol] for symbol, size in sizes.items())


# Weak, so that a step that is dropped takes its graphs with it.
_backends: weakref.WeakKeyDictionary[Any, Backend] = weakref.WeakKeyDictionary()


def compile(
    model: Callable[..., Any],
    *,
    memory_budget: int | str | None = None,
    passes: Sequence[Pass] | None = None,
    extra: Sequence[Pass] = (),
    dynamic: bool | None = None,
    fullgraph: bool = False,
) -> Any:
    """torch.compile(model) with passes that make a step fit a budget.

    memory_budget: bytes, or "6GiB", "512 MB", for the peak of a step: parameters, inputs,
        activations, gradients; not an optimizer's state. If the model breaks into several graphs,
        each keeps it alone, so that a step may exceed it: a warning says so
    passes: these, instead of the fastest that fit; with a budget they must fit it
    extra: a user's own passes besides
    dynamic, fullgraph: as in torch.compile

    The first call plans, for its sizes. Raises BudgetError there if nothing fits, with
    the least budget that would do, and later if dynamic sizes grow beyond the plan.
    """
    if memory_budget is None and passes is None:
        raise ValueError(
            "memory_budget or passes must be given; got neither. "
            "Without both this is torch.compile(model)"
        )
    arguments.model(model)
    arguments.flag("dynamic", dynamic, or_none=True)
    arguments.flag("fullgraph", fullgraph)
    offered: list[Sequence[Pass]] | None = None
    if passes is not None:
        check_members("passes", passes)
        offered = [passes]
    planning = Backend(pipeline(memory_budget, offered, extra=extra))
    step = torch.compile(model, backend=planning, dynamic=dynamic, fullgraph=fullgraph)
    _backends[step] = planning
    return step


def backend(memory_budget: int | str) -> Backend:
    """The backend of `compile`, for graphs that another backend rewrites first.

    memory_budget: as in `compile`; checked here
    """
    return Backend(pipeline(memory_budget))


def choices(step: Any) -> tuple[Choice, ...]:
    """The choice for each graph of a step.

    Raises ValueError if the step does not come from compile, or was not called yet.
    """
    owner = _backend_of(step)
    if owner is None:
        raise ValueError(f"step must come from passes.compile; got {type(step).__name__}")
    if not owner.choices:
        raise ValueError("step must have been called once: the first call plans, for its sizes")
    return tuple(owner.choices)


def _backend_of(step: Any) -> Backend | None:
    """The backend of a step, or of a model compiled in place."""
    registered = _backends.get(step)
    if registered is not None:
        return registered
    # model.compile() replaces the model's forward.
    owner = getattr(getattr(step, "forward", None), "__self__", None)
    planning = getattr(owner, "backend", None)
    return planning if isinstance(planning, Backend) else None


def estimate(
    model: Callable[..., Any],
    example_inputs: Sequence[Any],
    *,
    train: bool,
    passes: Sequence[Sequence[Pass]] | None = None,
    dynamic: bool | None = None,
) -> tuple[Estimate, ...]:
    """Estimate peak and time of a step under every candidate, fastest first.

    Nothing is compiled or run.

    example_inputs: tensors of the sizes in question, also fake or meta; they take no memory
    train: a forward and its backward
    passes: candidates instead of the default ones (planning.candidates)
    dynamic: as in torch.compile

    Raises TypeError or ValueError with the argument's name before anything is traced; ValueError
    also if the model cannot compute with such inputs.
    """
    arguments.flag("train", train)
    if passes is not None:
        check_candidates(passes)
    offered: list[Passes]
    if passes is None:
        offered = list(itertools.chain(*candidates(train)))
    else:
        offered = [tuple(candidate) for candidate in passes]

    def study(graph: Captured) -> list[Estimate]:
        # Candidates that differ only in no-op passes have the same estimate.
        by_acting: dict[Passes, Estimate] = {}
        estimates: list[Estimate] = []
        for candidate in offered:
            acting = without_idle(graph, candidate)
            if acting not in by_acting:
                by_acting[acting] = estimated(trace(graph, acting))
            estimates.append(replace(by_acting[acting], passes=candidate))
        return estimates

    estimates = capture(model, example_inputs, study, train=train, dynamic=dynamic)
    return tuple(sorted(estimates, key=lambda estimate: estimate.seconds))
