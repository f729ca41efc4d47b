"""CP-SAT of OR-tools on a part that the greedy orders leave open.

To end at a given roof, two searches run at once. One fills the arena from below: of the boxes that can lie lowest, the first in
line goes there, and what a dead end teaches is kept. Where a line suits the problem that takes a second, where not, for ever:
each line gets a second, then two, and so on. The other search chooses freely. Which is done first differs by problem.
"""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from .greedy import Offsets, height
from .parts import Box, Part

_WORKERS = 2
_FIRST_TURN_SECONDS = 1.0
_POLL_SECONDS = 0.02

Line = Callable[[Box], tuple[int, ...]]


def fit(part: Part, roof: int, deadline: float) -> Offsets | None:
    """Offsets of the part's boxes by number with which none ends above `roof`; None where there are none or time is up.

    deadline: a time of time.monotonic().
    """
    return _Race(part, roof, deadline).run()


def lower(part: Part, start: Offsets, enough: int, deadline: float) -> Offsets:
    """The lowest placement found in time from the placement `start`; one that ends at `enough` ends the search."""
    model = _Model(part, height(part.boxes, start), _by_area)
    model.minimize(start, enough)
    solver = _solver(deadline - time.monotonic(), _WORKERS)
    return model.offsets(solver) if model.solve(solver) else start


class _Race:
    """The two searches for a placement below a roof. The first that ends, with a placement or with a proof, stops the other."""

    def __init__(self, part: Part, roof: int, deadline: float) -> None:
        self.part, self.roof, self.deadline = part, roof, deadline
        self.over = threading.Event()
        self.found: Offsets | None = None
        self.solvers: list[Any] = []

    def run(self) -> Offsets | None:
        with ThreadPoolExecutor(_WORKERS) as pool:
            searches: list[Future[None]] = [pool.submit(search) for search in (self.from_below, self.freely)]
            try:
                while wait(searches, timeout=_POLL_SECONDS).not_done:
                    if self.over.is_set():
                        self.stop()  # again and again: a solver that has not begun yet hears nothing
            finally:  # Ctrl-C too
                self.over.set()
                self.stop()
        for search in searches:
            search.result()  # raises what it raised
        return self.found

    def stop(self) -> None:
        for solver in self.solvers:
            solver.stop_search()

    def from_below(self) -> None:
        models = [_Model(self.part, self.roof, line) for line in _lines(self.part)]
        for model in models:
            model.fill_from_below()
        for seconds, model in _turns(models):
            if self.over.is_set() or time.monotonic() >= self.deadline:
                return
            self.attempt(model, seconds, fixed=True)

    def freely(self) -> None:
        self.attempt(_Model(self.part, self.roof, _by_area), math.inf, fixed=False)

    def attempt(self, model: _Model, seconds: float, fixed: bool) -> None:
        solver = _solver(min(seconds, self.deadline - time.monotonic()), workers=1, fixed=fixed)
        self.solvers.append(solver)
        if self.over.is_set():
            return
        ended = model.solve(solver)
        if ended:
            self.found = model.offsets(solver)
        if ended is not None:
            self.over.set()


class _Model:
    """Rectangles of lifetime times size below a roof that do not overlap.

    It counts from the part's floor, in what divides all sizes (in a placement that is pushed down, offsets are sums of sizes),
    and in the steps at which something comes or goes: with small numbers the search is many times faster.
    """

    def __init__(self, part: Part, roof: int, line: Line) -> None:
        # It brings pandas with it: a second that only hard problems need.
        from ortools.sat.python import cp_model

        self.cp, self.model = cp_model, cp_model.CpModel()
        self.floor, self.boxes = part.floor, sorted(part.boxes, key=line)
        self.unit = math.gcd(*(box.size for box in self.boxes))
        self.sizes = [box.size // self.unit for box in self.boxes]
        self.roof = (roof - part.floor) // self.unit
        self.places = [self.model.new_int_var(0, self.roof - size, "") for size in self.sizes]
        ends = sorted({end for box in self.boxes for end in (box.lower, box.upper)})
        step = {end: number for number, end in enumerate(ends)}
        span = self.model.new_fixed_size_interval_var
        lifetimes = [span(step[box.lower], step[box.upper] - step[box.lower], "") for box in self.boxes]
        self.model.add_no_overlap_2d(
            lifetimes, [span(place, size, "") for place, size in zip(self.places, self.sizes, strict=True)]
        )

    def fill_from_below(self) -> None:
        self.model.add_decision_strategy(self.places, self.cp.CHOOSE_LOWEST_MIN, self.cp.SELECT_MIN_VALUE)

    def minimize(self, start: Offsets, enough: int) -> None:
        """Asks for the least height from `enough` on, with `start` to begin from."""
        top = self.model.new_int_var(-(-(enough - self.floor) // self.unit), self.roof, "")
        for place, size, box in zip(self.places, self.sizes, self.boxes, strict=True):
            self.model.add(place + size <= top)
            self.model.add_hint(place, (start[box.number] - self.floor) // self.unit)
        self.model.minimize(top)

    def solve(self, solver: Any) -> bool | None:
        """Whether there is a placement; None where the solver has not found out."""
        status = solver.solve(self.model)
        if status in (self.cp.OPTIMAL, self.cp.FEASIBLE):
            return True
        return False if status == self.cp.INFEASIBLE else None

    def offsets(self, solver: Any) -> Offsets:
        """The placement found, by the numbers of the boxes."""
        return {
            box.number: self.floor + solver.value(place) * self.unit for box, place in zip(self.boxes, self.places, strict=True)
        }


def _solver(seconds: float, workers: int, fixed: bool = False) -> Any:
    from ortools.sat.python import cp_model

    solver = cp_model.CpSolver()
    parameters: Any = solver.parameters
    parameters.max_time_in_seconds = max(0.0, seconds)
    parameters.num_workers = workers
    # The linear relaxation of a packing is worth nothing, and takes most of the time.
    parameters.linearization_level = 0
    if fixed:
        parameters.search_branching = type(parameters.search_branching).FIXED_SEARCH
    return solver


def _turns(models: list[_Model]) -> Iterator[tuple[float, _Model]]:
    """Each model in turn, for a time that doubles from round to round."""
    for number in itertools.count():
        for model in models:
            yield _FIRST_TURN_SECONDS * 2**number, model


def _by_area(box: Box) -> tuple[int, ...]:
    return (-box.size * (box.upper - box.lower), box.lower, box.number)


def _lines(part: Part) -> list[Line]:
    """Those first that live at full steps, then the longest or the largest; or the largest throughout. Lines of minimalloc's.

    Long is what lives over many comings and goings. Ties matter more than one would think; the earlier goes first.
    """
    change: dict[int, int] = {}
    for box in part.boxes:
        change[box.lower] = change.get(box.lower, 0) + box.size
        change[box.upper] = change.get(box.upper, 0) - box.size
    ends = sorted(change)
    step = {end: number for number, end in enumerate(ends)}
    held = list(itertools.accumulate(change[end] for end in ends))

    def fullness(box: Box) -> int:
        return max(held[step[box.lower] : step[box.upper]])

    def length(box: Box) -> int:
        return step[box.upper] - step[box.lower]

    def area(box: Box) -> int:
        return length(box) * box.size

    return [
        lambda box: (-fullness(box), -length(box), -area(box), box.lower, box.number),
        lambda box: (-fullness(box), -area(box), box.lower, box.number),
        lambda box: (-area(box), -length(box), -fullness(box), box.lower, box.number),
        _by_area,
    ]
