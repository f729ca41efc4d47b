"""An exact search for placements, by CP-SAT of OR-tools.

For a placement below a given roof, two searches run at the same time. One fills the arena from
below: depth-first, the box that can be lowest goes there, ties by a box order, and CP-SAT learns
from dead ends. With an order that suits the problem that takes a second, with others for ever, so
several orders take turns of one second, two seconds, and so on. The other search is CP-SAT's own.
Which one ends first depends on the problem.
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
from .parts import Box, Part, profile

_WORKERS = 2
_FIRST_TURN_SECONDS = 1.0
_POLL_SECONDS = 0.02

BoxOrder = Callable[[Box], tuple[int, ...]]


def fit(part: Part, roof: int, deadline: float) -> Offsets | None:
    """Offsets of a part's boxes by number, all below a roof.

    None if there are none, or time is up.

    roof: in units
    deadline: a time of time.monotonic()
    """
    return _Race(part, roof, deadline).run()


def lower(part: Part, start: Offsets, enough: int, deadline: float) -> Offsets:
    """The lowest placement found until the deadline.

    start: the placement to improve
    enough: a height in units at which to stop
    """
    model = _Model(part, height(part.boxes, start), _by_area)
    model.minimize(start, enough)
    solver = _solver(deadline - time.monotonic(), _WORKERS)
    return model.offsets(solver) if model.solve(solver) else start


class _Race:
    """The two searches for a placement below a roof.

    The first that ends, with a placement or a proof that there is none, stops the other.
    """

    def __init__(self, part: Part, roof: int, deadline: float) -> None:
        self.part, self.roof, self.deadline = part, roof, deadline
        self.over = threading.Event()
        self.result: Offsets | None = None
        self.solvers: list[Any] = []

    def run(self) -> Offsets | None:
        with ThreadPoolExecutor(_WORKERS) as pool:
            searches: list[Future[None]] = [
                pool.submit(self.from_below),
                pool.submit(self.freely),
            ]
            try:
                while wait(searches, timeout=_POLL_SECONDS).not_done:
                    if self.over.is_set():
                        self.stop()  # repeatedly: a solver that has not begun yet ignores it
            finally:  # also after Ctrl-C
                self.over.set()
                self.stop()
        for search in searches:
            search.result()  # raises the search's exception
        return self.result

    def stop(self) -> None:
        for solver in self.solvers:
            solver.stop_search()

    def from_below(self) -> None:
        """Fill from below, with several box orders in turn."""
        models = [_Model(self.part, self.roof, order) for order in _box_orders(self.part)]
        for model in models:
            model.fill_from_below()
        for seconds, model in _turns(models):
            if self.over.is_set() or time.monotonic() >= self.deadline:
                return
            self.attempt(model, seconds, fixed=True)

    def freely(self) -> None:
        """Search by CP-SAT's own strategy."""
        self.attempt(_Model(self.part, self.roof, _by_area), math.inf, fixed=False)

    def attempt(self, model: _Model, seconds: float, fixed: bool) -> None:
        """Run one solver; a placement or a proof ends the race."""
        solver = _solver(min(seconds, self.deadline - time.monotonic()), workers=1, fixed=fixed)
        self.solvers.append(solver)
        if self.over.is_set():
            return
        has_placement = model.solve(solver)
        if has_placement:
            self.result = model.offsets(solver)
        if has_placement is not None:
            self.over.set()


class _Model:
    """Rectangles of lifetime times size below a roof that do not overlap.

    Offsets count from the part's floor in the greatest common divisor of all sizes (in a placement
    that is pushed down they are sums of sizes), steps are those at which a box begins or ends: with
    small numbers the search is many times faster.
    """

    def __init__(self, part: Part, roof: int, order: BoxOrder) -> None:
        # Imports pandas, which takes a second that only hard problems need.
        from ortools.sat.python import cp_model

        self.cp, self.model = cp_model, cp_model.CpModel()
        self.floor, self.boxes = part.floor, sorted(part.boxes, key=order)
        self.unit = math.gcd(*(box.size for box in self.boxes))
        self.sizes = [box.size // self.unit for box in self.boxes]
        self.roof = (roof - part.floor) // self.unit
        self.places = [self.model.new_int_var(0, self.roof - size, "") for size in self.sizes]
        # Only steps at which a box begins or ends count, numbered in order.
        ends = set[int]()
        for box in self.boxes:
            ends.update((box.lower, box.upper))
        number_of = {step: number for number, step in enumerate(sorted(ends))}
        # A rectangle for each box: its lifetime, and its span in the arena.
        interval = self.model.new_fixed_size_interval_var
        lifetimes, spans = [], []
        for box, place, size in zip(self.boxes, self.places, self.sizes, strict=True):
            lower, upper = number_of[box.lower], number_of[box.upper]
            lifetimes.append(interval(lower, upper - lower, ""))
            spans.append(interval(place, size, ""))
        self.model.add_no_overlap_2d(lifetimes, spans)

    def fill_from_below(self) -> None:
        """Place the box that can be lowest first, at its lowest offset."""
        self.model.add_decision_strategy(
            self.places, self.cp.CHOOSE_LOWEST_MIN, self.cp.SELECT_MIN_VALUE
        )

    def minimize(self, start: Offsets, enough: int) -> None:
        """Minimize the height.

        start: a placement, as a hint
        enough: the lowest height to consider
        """
        top = self.model.new_int_var(-(-(enough - self.floor) // self.unit), self.roof, "")
        for place, size, box in zip(self.places, self.sizes, self.boxes, strict=True):
            self.model.add(place + size <= top)
            self.model.add_hint(place, (start[box.number] - self.floor) // self.unit)
        self.model.minimize(top)

    def solve(self, solver: Any) -> bool | None:
        """Whether there is a placement; None if the solver was stopped."""
        status = solver.solve(self.model)
        if status in (self.cp.OPTIMAL, self.cp.FEASIBLE):
            return True
        if status == self.cp.INFEASIBLE:
            return False
        return None

    def offsets(self, solver: Any) -> Offsets:
        """The solver's placement, by the numbers of the boxes."""
        offsets: Offsets = {}
        for box, place in zip(self.boxes, self.places, strict=True):
            offsets[box.number] = self.floor + solver.value(place) * self.unit
        return offsets


def _solver(seconds: float, workers: int, fixed: bool = False) -> Any:
    from ortools.sat.python import cp_model

    solver = cp_model.CpSolver()
    parameters: Any = solver.parameters
    parameters.max_time_in_seconds = max(0.0, seconds)
    parameters.num_workers = workers
    # The linear relaxation of a packing is useless, and takes most of the time.
    parameters.linearization_level = 0
    if fixed:
        parameters.search_branching = type(parameters.search_branching).FIXED_SEARCH
    return solver


def _turns(models: list[_Model]) -> Iterator[tuple[float, _Model]]:
    """Yield the models in turn, with seconds that double every round."""
    for number in itertools.count():
        for model in models:
            yield _FIRST_TURN_SECONDS * 2**number, model


def _by_area(box: Box) -> tuple[int, ...]:
    return (-box.size * (box.upper - box.lower), box.lower, box.number)


def _box_orders(part: Part) -> list[BoxOrder]:
    """Box orders of minimalloc.

    By the fullest step that a box is live at, its length and its area. The length counts steps at
    which some box begins or ends. Ties matter: the earlier box goes first.
    """
    steps, live = profile(part.boxes)
    number_of = {step: number for number, step in enumerate(steps)}

    def fullness(box: Box) -> int:
        return max(live[number_of[box.lower] : number_of[box.upper]])

    def length(box: Box) -> int:
        return number_of[box.upper] - number_of[box.lower]

    def area(box: Box) -> int:
        return length(box) * box.size

    return [
        lambda box: (-fullness(box), -length(box), -area(box), box.lower, box.number),
        lambda box: (-fullness(box), -area(box), box.lower, box.number),
        lambda box: (-area(box), -length(box), -fullness(box), box.lower, box.number),
        _by_area,
    ]
