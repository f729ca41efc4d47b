"""torch.compile under a memory budget."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule

from . import arguments, hooks
from .peak import mebibytes
from .planning import BudgetError, Choice, Estimate, Pipeline, candidates, check_candidates, check_members, pipeline, told
from .planning import estimate as estimated
from .stages import Pass
from .traced import Captured, capture, captured, trace, without_idle


class Backend:
    """A backend of torch.compile: plans each graph, and has inductor compile it with the passes chosen.

    choices: one for each graph, in the order in which they came. They are made here and not in inductor's hooks, so that they are
    there when the compile cache is warm and no pass runs.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline, self.choices = pipeline, list[Choice]()

    def __call__(self, module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        from torch._inductor.compile_fx import compile_fx

        choice = self.pipeline.choose(captured(module, inputs))
        symbols = {place: str(each) for place, each in enumerate(inputs) if isinstance(each, torch.SymInt)}
        run: Any = compile_fx(module, inputs, config_patches=hooks.inductor_configs(choice.chosen.passes))
        self.choices.append(choice)
        budget = self.pipeline.budget_bytes
        return run if budget is None or not symbols else _Guarded(run, choice, budget, symbols)

    def __reduce__(self) -> tuple[Any, ...]:
        return Backend, (self.pipeline,)  # a copy of a model is compiled anew


class _Guarded:
    """A compiled graph of dynamic sizes, which refuses sizes for which its plan does not fit.

    fits: the largest values known to fit, by symbol; a peak does not fall where sizes grow.
    """

    def __init__(self, run: Callable[..., Any], choice: Choice, budget_bytes: int, symbols: dict[int, str]) -> None:
        self.run, self.choice, self.budget_bytes, self.symbols = run, choice, budget_bytes, symbols
        self.fits: list[dict[str, int]] = []

    def __call__(self, *inputs: Any) -> Any:
        sizes = {symbol: int(inputs[place]) for place, symbol in self.symbols.items()}
        if not any(all(sizes[each] <= known[each] for each in sizes) for known in self.fits):
            self._check(sizes)
        return self.run(*inputs)

    def _check(self, sizes: dict[str, int]) -> None:
        peak = self.choice.traced.footprint(sizes=sizes).peak_bytes
        if peak > self.budget_bytes:
            raise BudgetError(
                f"memory_budget must be at least {peak:,} bytes ({mebibytes(peak)}) for sizes {sizes} under the plan made for "
                f"earlier ones, {told(self.choice.chosen.passes)}; got {self.budget_bytes:,}. Call with the longest input first",
                peak,
            )
        self.fits.append(sizes)


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

    memory_budget: bytes, or "6GiB", "512 MB", for all that a step holds at its peak: parameters, inputs, activations, gradients;
    not an optimiser's state. passes: these and no others, instead of the cheapest that fit; with a budget they must fit it.
    extra: a user's own passes besides. dynamic, fullgraph: as in torch.compile.

    Plans are made at the first call, for its sizes. Raises BudgetError there where nothing fits, with the least budget that
    would; and later where a dynamic size has grown until the plan does not fit any more.
    """
    if memory_budget is None and passes is None:
        raise ValueError("memory_budget or passes must be given; got neither. Without both this is torch.compile(model)")
    arguments.model(model)
    arguments.flag("dynamic", dynamic, or_none=True)
    arguments.flag("fullgraph", fullgraph)
    if passes is not None:
        check_members("passes", passes)
    backend = Backend(pipeline(memory_budget, None if passes is None else [passes], extra=extra))
    step = torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=fullgraph)
    _backends[step] = backend
    return step


def backend(memory_budget: int | str) -> Backend:
    """What `compile` gives torch.compile for its backend, for graphs that are rewritten before; the budget is checked now."""
    return Backend(pipeline(memory_budget))


def choices(step: Any) -> tuple[Choice, ...]:
    """What compile chose for each graph of a step. Raises ValueError where it did not make the step, or it was not called yet."""
    found = _backend_of(step)
    if found is None:
        raise ValueError(f"step must come from passes.compile; got {type(step).__name__}")
    if not found.choices:
        raise ValueError("step must have been called once: plans are made for the sizes of a first call")
    return tuple(found.choices)


def _backend_of(step: Any) -> Backend | None:
    """The backend of a step: of compile's, or of a model whose forward is compiled in place and keeps its own."""
    found = _backends.get(step)
    own = getattr(getattr(getattr(step, "forward", None), "__self__", None), "backend", None)
    return found if found is not None else own if isinstance(own, Backend) else None


def estimate(
    model: Callable[..., Any],
    example_inputs: Sequence[Any],
    *,
    train: bool,
    passes: Sequence[Sequence[Pass]] | None = None,
    dynamic: bool | None = None,
) -> tuple[Estimate, ...]:
    """Of every candidate the peak and the time of a step, without running or compiling it. Fastest first.

    example_inputs: tensors of the sizes in question; fake and meta tensors do, and no memory is taken for them. train: a forward
    and the backward of a gradient of its results. passes: candidates instead of those of planning.candidates.

    Raises TypeError or ValueError, with the argument's name, before anything is traced; ValueError also where the model cannot
    compute with such inputs.
    """
    arguments.flag("train", train)
    if passes is not None:
        check_candidates(passes)
    offered = [tuple(each) for each in (itertools.chain(*candidates(train)) if passes is None else passes)]

    def study(graph: Captured) -> list[Estimate]:
        acting = [without_idle(graph, each) for each in offered]
        known = {each: estimated(trace(graph, each)) for each in dict.fromkeys(acting)}
        return [replace(known[each], passes=passes) for passes, each in zip(offered, acting, strict=True)]

    return tuple(sorted(capture(model, example_inputs, study, train=train, dynamic=dynamic), key=lambda each: each.seconds))
