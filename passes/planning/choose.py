"""Which passes a step gets: of all candidates that fit the budget by estimate, the one that takes least time by estimate."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeGuard

from torch._dynamo.exc import ShortenTraceback

from .. import arguments
from ..analysis import costs
from ..analysis.costs import MACHINE, Machine
from ..analysis.footprint import Footprint
from ..analysis.peak import mebibytes
from ..protocol import Pass
from ..rewrites.causal import Causal
from ..rewrites.chunk import Chunk
from ..rewrites.linear_cross_entropy import LinearCrossEntropy
from ..rewrites.materialize import Materialize
from ..rewrites.reorder import Reorder
from ..rewrites.spill import Spill
from ..rewrites.stream_qkv import StreamQKV
from . import budgets, choice_cache, inductor_hooks, operator_workspaces
from .tracing import Captured, Traced, busy, trace, without_idle

Passes = tuple[Pass, ...]

operator_workspaces.tell_all()

# Bytes of a chunk: below, its products are too small to be fast; above, its values leave a last-level cache.
_LEAST_CHUNK, _MOST_CHUNK = 2**20, 16 * 2**20


class BudgetError(ShortenTraceback, ValueError):
    """No candidate fits. least_bytes: the least budget that would do. Dynamo passes it on as it is."""

    def __init__(self, message: str, least_bytes: int) -> None:
        super().__init__(message, first_useful_frame=None)
        self.least_bytes = least_bytes


@dataclass(frozen=True)
class Estimate:
    """A step under some passes. peak_bytes: all that it holds at once, its inputs and parameters included; seconds by the model.

    changed: whether any pass changed anything.
    """

    passes: Passes
    peak_bytes: int
    input_bytes: int
    seconds: float
    changed: bool

    @property
    def added_bytes(self) -> int:
        """What the step needs beyond its inputs."""
        return self.peak_bytes - self.input_bytes


@dataclass(frozen=True)
class Choice:
    """What was chosen for one graph. estimates: of all candidates that had to be looked at, the plain one first."""

    chosen: Estimate
    estimates: tuple[Estimate, ...]
    traced: Traced


@dataclass(frozen=True)
class Pipeline:
    """Chooses passes for graphs. budget_bytes: for the peak of a step with its inputs and parameters; None: no limit.

    candidates: tuples of passes to choose from, () among them or not; None: those of candidates(). extra: a user's own passes,
    which run in every candidate after its own of the same stage.
    """

    budget_bytes: int | None
    candidates: tuple[Passes, ...] | None = None
    extra: Passes = ()
    machine: Machine = MACHINE

    def choose(self, graph: Captured) -> Choice:
        """The least time of those that fit. Raises BudgetError with the least budget that would do.

        What was chosen for such a graph before, in another process too, is chosen again without a look at the others.
        """
        offered = [(*passes, *self.extra) for group in self._groups(graph.training) for passes in group]
        by_name = {repr(each): each for passes in offered for each in passes}
        name = choice_cache.name_of(graph, repr(self), tuple(by_name.values()))
        if name is None:
            return self._chosen(graph)
        recalled = _recalled(choice_cache.load(name), offered, self.budget_bytes)
        if recalled is not None:
            chosen, estimates = recalled
            return Choice(chosen, estimates, trace(graph, chosen.passes))
        choice = self._chosen(graph)
        saved = [dataclasses.asdict(each) | {"passes": [*map(repr, each.passes)]} for each in choice.estimates]
        choice_cache.store(name, {"estimates": saved, "chosen": choice.estimates.index(choice.chosen)})
        return choice

    def _chosen(self, graph: Captured) -> Choice:
        plain = trace(graph, ())
        baseline = estimate(plain, self.machine)
        tried, took = dict[Passes, Estimate](), dict[Passes, float]()
        best: Choice | None = None
        groups = self._groups(graph.training)
        for group in groups:
            if best is not None and group is groups[-1]:
                break
            offered = [each for each in group if best is None or _may_win(each, best.chosen, took)]
            traced = self._traced(graph, plain, offered)
            took |= {passes: seconds(each, self.machine) for passes, each in traced.items()}
            for passes, each in sorted(traced.items(), key=lambda item: took[item[0]]):
                if best is not None and took[passes] >= best.chosen.seconds:
                    break
                if each.passes in tried:
                    continue
                found = tried[each.passes] = estimate(each, self.machine) if each.passes else baseline
                if self.budget_bytes is None or found.peak_bytes <= self.budget_bytes:
                    best = Choice(found, (), each)
                    break
        if best is not None:
            return replace(best, estimates=(*({(): baseline} | tried).values(),))
        least = min(tried.values(), key=lambda each: each.peak_bytes)
        raise BudgetError(
            f"memory_budget must be at least {least.peak_bytes:,} bytes ({mebibytes(least.peak_bytes)}) for these inputs, which "
            f"{told(least.passes)} would take; got {self.budget_bytes:,} ({mebibytes(self.budget_bytes or 0)}). "
            "Raise it, or shorten the inputs",
            least.peak_bytes,
        )

    def _groups(self, training: bool) -> Sequence[Sequence[Passes]]:
        return candidates(training, self.budget_bytes) if self.candidates is None else [self.candidates]

    def _traced(self, graph: Captured, plain: Traced, offered: Sequence[Passes]) -> dict[Passes, Traced]:
        """By candidate the graph under it; candidates of ours that differ in passes that find nothing to do have one."""
        own, found = self.candidates is None, dict[Passes, Traced]()
        distinct: dict[Passes, Traced] = {(): plain}
        for each in offered:
            passes = (*each, *self.extra)
            if own:
                passes = without_idle(graph, passes, kept=self.extra)
            if passes not in distinct:
                traced = trace(graph, passes)
                counting = busy(passes, traced.changes, kept=self.extra) if own else passes
                distinct[passes] = distinct.setdefault(counting, replace(traced, passes=counting))
            found[each] = distinct[passes]
        return found


def _may_win(passes: Passes, best: Estimate, least_seconds: Mapping[Passes, float]) -> bool:
    """Whether a candidate might take less time than the best that fits: by the one without its spills, which only add to it."""
    without = tuple(each for each in passes if not isinstance(each, Spill))
    return least_seconds[without] < best.seconds


def _recalled(saved: object, offered: Sequence[Passes], budget_bytes: int | None) -> tuple[Estimate, tuple[Estimate, ...]] | None:
    """The chosen estimate and all of them, from what `choose` stored; None of any other value.

    A file that is damaged, or that somebody else wrote, counts as not there, and is written anew.
    """
    if not isinstance(saved, dict) or saved.keys() != {"estimates", "chosen"} or not isinstance(saved["estimates"], list):
        return None
    estimates = [_estimate(each, offered) for each in saved["estimates"]]
    known = tuple(each for each in estimates if each is not None)
    place = saved["chosen"]
    # The plain step is the first of them: reports show it as what the others are measured by.
    if len(known) < len(estimates) or not known or known[0].passes or not _is_count(place) or place >= len(known):
        return None
    chosen = known[place]
    return None if budget_bytes is not None and chosen.peak_bytes > budget_bytes else (chosen, known)


def _estimate(saved: object, offered: Sequence[Passes]) -> Estimate | None:
    """An estimate from its stored fields; None where a field is not one, or where its passes were never offered together."""
    if not isinstance(saved, dict) or saved.keys() != {each.name for each in dataclasses.fields(Estimate)}:
        return None
    if not _is_count(saved["peak_bytes"]) or not _is_count(saved["input_bytes"]) or not isinstance(saved["changed"], bool):
        return None
    if not isinstance(saved["seconds"], float) or not 0 <= saved["seconds"] < math.inf:
        return None
    passes = next((found for each in offered if (found := _named(saved["passes"], each)) is not None), None)
    return None if passes is None else Estimate(**saved | {"passes": passes})


def _named(names: object, passes: Passes) -> Passes | None:
    """Those of `passes` whose reprs are the names, in their order; None where names are left over."""
    if not isinstance(names, list):
        return None
    rest, found = list(names), []
    for each in passes:
        if rest and rest[0] == repr(each):
            found.append(each)
            rest.pop(0)
    return None if rest else tuple(found)


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def pipeline(
    memory_budget: int | str | None = None,
    passes: Sequence[Sequence[Pass]] | None = None,
    *,
    extra: Sequence[Pass] = (),
    machine: Machine = MACHINE,
) -> Pipeline:
    """What chooses passes under a budget in bytes, or as "6GiB". passes: candidates instead of those of candidates()."""
    if passes is not None:
        check_candidates(passes)
    check_members("extra", extra)
    arguments.kind("machine", machine, Machine, "Write passes.costs.Machine(...)")
    budget = None if memory_budget is None else budgets.parse("memory_budget", memory_budget)
    return Pipeline(budget, None if passes is None else tuple(map(tuple, passes)), tuple(extra), machine)


def check_candidates(passes: Sequence[Sequence[Pass]]) -> None:
    """Raises TypeError or ValueError unless these are one or more candidates, each a tuple or a list of passes."""
    for place, candidate in enumerate(arguments.sequence("passes", passes, "candidates, each a tuple or a list of passes")):
        check_members(f"passes[{place}]", candidate)
    if not passes:
        raise ValueError("passes must have at least one candidate; got none. Write [()] for a step without a pass")


def check_members(name: str, passes: Sequence[Pass]) -> None:
    """Raises TypeError unless `passes` are a tuple or a list of passes that can be told apart: plans are kept by their passes."""
    inductor_hooks.check(name, passes)
    for place, each in enumerate(passes):
        try:
            hash(each)
        except TypeError as error:
            raise TypeError(
                f"{name}[{place}] must be hashable; got {arguments.shown(each)}: {error}. Keep tuples in it, no lists or dicts"
            ) from None


def candidates(training: bool, budget_bytes: int | None = None) -> list[list[Passes]]:
    """What is tried where nobody says: plain, and combinations of the passes that this kind of step can use.

    In groups: those of a later one cost more, and the last one's, whose orders take long to plan and whose chunks are least, are
    for budgets that nothing else fits. Not Remat, which has inductor write dozens of programs to plan by: name it in passes=.
    """
    ordered = (Materialize(), Reorder())
    chunk, tighter = Chunk(), list[Chunk]()
    if budget_bytes is not None:
        chunk = Chunk(chunk_bytes=min(max(budget_bytes // 32, _LEAST_CHUNK), _MOST_CHUNK))
        tighter = [each for each in (Chunk(chunk_bytes=_LEAST_CHUNK),) if each != chunk]
    groups: list[list[Passes]]
    if training:
        loss = LinearCrossEntropy()
        groups = [
            [(loss,), (loss, chunk)],
            [(loss, Spill()), (loss, chunk, Spill())],
            [(loss, each, Spill(), *ordered) for each in (chunk, *tighter)],
        ]
    else:
        streamed, *streamed_tighter = ((StreamQKV(chunk_bytes=each.chunk_bytes), each) for each in (chunk, *tighter))
        groups = [[(), (chunk,), streamed], [ordered, *((each, *ordered) for each in (chunk, *tighter)), *streamed_tighter]]
    first, *later = ([(Causal(), *each) for each in group] for group in groups)
    return [[(), *first], *later]


def estimate(traced: Traced, machine: Machine = MACHINE) -> Estimate:
    found: Footprint = traced.footprint()
    changed = any(each.lines for each in traced.changes)
    return Estimate(traced.passes, found.peak_bytes, found.input_bytes, seconds(traced, machine), changed)


def seconds(traced: Traced, machine: Machine) -> float:
    graphs = [traced.forward] if traced.backward is None else [traced.forward, traced.backward]
    return sum(machine.seconds(costs.of_graph(each.graph)) for each in graphs)


def told(passes: Sequence[Pass]) -> str:
    """Passes as code, "no pass" of none."""
    return ", ".join(map(repr, passes)) or "no pass"
