"""The choice of passes: none, or the fastest that fit a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch._dynamo.exc import ShortenTraceback

from .. import arguments
from ..analysis.costs import MACHINE, Machine
from ..analysis.peak import mebibytes
from ..protocol import Pass
from ..rewrites.spill import Spill
from . import budgets, choice_cache
from .candidates import Passes, candidates, check_candidates, check_members, described
from .estimates import Estimate, estimate, seconds
from .tracing import Captured, Traced, busy, trace, without_idle


class BudgetError(ShortenTraceback, ValueError):
    """No candidate fits the budget. Dynamo raises it unchanged.

    least_bytes: the least budget that would do
    """

    def __init__(self, message: str, least_bytes: int) -> None:
        super().__init__(message, first_useful_frame=None)
        self.least_bytes = least_bytes


@dataclass(frozen=True)
class Choice:
    """The choice for one graph.

    estimates: of all candidates that were examined, the one without passes first
    """

    chosen: Estimate
    estimates: tuple[Estimate, ...]
    traced: Traced


@dataclass(frozen=True)
class Pipeline:
    """Chooses passes for graphs.

    budget_bytes: for the peak of a step, inputs and parameters included; None for no limit
    candidates: tuples of passes to choose from; None for those of candidates()
    extra: a user's passes, which run in every candidate after its own of the same stage
    """

    budget_bytes: int | None
    candidates: tuple[Passes, ...] | None = None
    extra: Passes = ()
    machine: Machine = MACHINE

    def choose(self, graph: Captured) -> Choice:
        """Choose no pass, or the fastest candidate that fits.

        No default candidate is examined where plain torch.compile fits.

        A choice that is stored for such a graph is loaded instead.

        Raises BudgetError with the least budget that would do.
        """
        # 1. The stored choice, if there is one.
        offered: list[Passes] = []
        by_repr: dict[str, Pass] = {}
        for group in self._groups(graph.training):
            for passes in group:
                candidate = (*passes, *self.extra)
                offered.append(candidate)
                by_repr.update((repr(member), member) for member in candidate)
        name = choice_cache.name_of(graph, repr(self), tuple(by_repr.values()))
        if name is None:
            return self._chosen(graph)
        stored = choice_cache.decoded(choice_cache.load(name), offered, self.budget_bytes)
        if stored is not None:
            chosen, estimates = stored
            return Choice(chosen, estimates, trace(graph, chosen.passes))
        # 2. Else a new one, which is stored.
        choice = self._chosen(graph)
        choice_cache.store(name, choice_cache.encoded(choice.chosen, choice.estimates))
        return choice

    def _chosen(self, graph: Captured) -> Choice:
        """No pass if that fits, else the fastest candidate.

        The groups are examined in order.
        """
        plain = trace(graph, ())
        baseline = estimate(plain, self.machine)
        # One rehearsal answers a budget that asks for nothing.
        is_default = self.candidates is None and not self.extra
        if is_default and baseline.peak_bytes <= (self.budget_bytes or 0):
            return Choice(baseline, (baseline,), plain)
        # By candidate: the estimates of those examined, the seconds of those traced.
        examined, seconds_of = dict[Passes, Estimate](), dict[Passes, float]()
        best: Choice | None = None
        groups = self._groups(graph.training)
        for group in groups:
            # The last group is for budgets that nothing else fits.
            if best is not None and group is groups[-1]:
                break
            offered = [
                passes
                for passes in group
                if best is None or _may_win(passes, best.chosen, seconds_of)
            ]
            traced = self._traced(graph, plain, offered)
            for passes, step in traced.items():
                seconds_of[passes] = seconds(step, self.machine)
            # Fastest first: the time follows from the trace, the peak takes inductor's program.
            for passes, step in sorted(traced.items(), key=lambda item: seconds_of[item[0]]):
                if best is not None and seconds_of[passes] >= best.chosen.seconds:
                    break
                if step.passes in examined:
                    continue
                estimated = estimate(step, self.machine) if step.passes else baseline
                examined[step.passes] = estimated
                if self.budget_bytes is None or estimated.peak_bytes <= self.budget_bytes:
                    best = Choice(estimated, (), step)
                    break
        if best is not None:
            return replace(best, estimates=tuple(({(): baseline} | examined).values()))
        least = min(examined.values(), key=lambda estimated: estimated.peak_bytes)
        raise BudgetError(
            f"memory_budget must be at least {least.peak_bytes:,} bytes "
            f"({mebibytes(least.peak_bytes)}) for these inputs, which {described(least.passes)} "
            f"would take; got {self.budget_bytes:,} ({mebibytes(self.budget_bytes or 0)}). "
            "Raise it, or shorten the inputs",
            least.peak_bytes,
        )

    def _groups(self, training: bool) -> Sequence[Sequence[Passes]]:
        """The candidates, in groups; later ones cost more."""
        if self.candidates is not None:
            return [self.candidates]
        return candidates(training, self.budget_bytes)

    def _traced(
        self, graph: Captured, plain: Traced, offered: Sequence[Passes]
    ) -> dict[Passes, Traced]:
        """Trace each candidate.

        Default candidates that differ only in no-op passes share a trace.

        plain: the step without passes
        """
        is_default, result = self.candidates is None, dict[Passes, Traced]()
        distinct: dict[Passes, Traced] = {(): plain}
        for candidate in offered:
            # No-op passes of Stage.DYNAMO drop out before the trace, those of later stages after.
            passes = (*candidate, *self.extra)
            if is_default:
                passes = without_idle(graph, passes, required=self.extra)
            if passes not in distinct:
                traced = trace(graph, passes)
                acting = passes
                if is_default:
                    acting = busy(passes, traced.changes, required=self.extra)
                distinct[passes] = distinct.setdefault(acting, replace(traced, passes=acting))
            result[candidate] = distinct[passes]
        return result


def _may_win(passes: Passes, best: Estimate, seconds_of: Mapping[Passes, float]) -> bool:
    """Whether a candidate may be faster than the best that fits.

    Spills only add time.

    seconds_of: seconds of candidates traced before, the one without these spills among them
    """
    without_spills = tuple(member for member in passes if not isinstance(member, Spill))
    return seconds_of[without_spills] < best.seconds


def pipeline(
    memory_budget: int | str | None = None,
    passes: Sequence[Sequence[Pass]] | None = None,
    *,
    extra: Sequence[Pass] = (),
    machine: Machine = MACHINE,
) -> Pipeline:
    """Make a pipeline that chooses passes under a budget.

    memory_budget: bytes, or "6GiB"; None for no limit
    passes: candidates instead of the default ones
    extra: a user's passes, which run in every candidate
    """
    if passes is not None:
        check_candidates(passes)
    check_members("extra", extra)
    arguments.kind("machine", machine, Machine, "Write passes.costs.Machine(...)")
    budget: int | None = None
    if memory_budget is not None:
        budget = budgets.parse("memory_budget", memory_budget)
    offered = None if passes is None else tuple(map(tuple, passes))
    return Pipeline(budget, offered, tuple(extra), machine)
