"""CP-SAT of OR-tools on a part that the greedy orders leave open: two searches at once, and the first to end stops the other.

One says the problem as rectangles that do not overlap, the other as crowds: those that live at one step lie in some order. Which
of the two is done first differs from problem to problem by more than an order of magnitude.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from typing import Any

from .greedy import Offsets, height
from .parts import Box, Part


def search(part: Part, start: Offsets, enough: int, roof: int | None, deadline: float) -> Offsets | None:
    """Offsets of the part's boxes by number.

    With a roof, any that end there or lower; None where there are none or none was found before the deadline, a time of
    time.monotonic(). Without, the lowest found from the placement `start`; one no higher than `enough` ends the search.
    """
    searches = [_Search(part, start, enough, roof, deadline, crowds) for crowds in (False, True)]
    with ThreadPoolExecutor(len(searches)) as pool:
        running = {pool.submit(each.run): each for each in searches}
        wait(running, return_when=FIRST_COMPLETED)
        # One that merely ran out of time says nothing; the other is then at its end too.
        for each in searches:
            each.stop()
    found = [offsets for future in running if (offsets := future.result()) is not None]
    return min(found, key=lambda offsets: height(part.boxes, offsets), default=None)


class _Search:
    """One model of a part and its solver, with one worker.

    It counts from the part's floor, in what divides all sizes (a placement pushed down has only sums of sizes for offsets), and
    in the steps at which something comes or goes; the largest boxes come first. On small numbers the search is many times faster.
    """

    def __init__(self, part: Part, start: Offsets, enough: int, roof: int | None, deadline: float, crowds: bool) -> None:
        # It brings pandas with it: a second that only hard problems need.
        from ortools.sat.python import cp_model

        self.part, self.deadline = part, deadline
        self.model, self.solver = cp_model.CpModel(), cp_model.CpSolver()
        self.found = (cp_model.OPTIMAL, cp_model.FEASIBLE)
        self.boxes = sorted(part.boxes, key=lambda box: (-box.size * (box.upper - box.lower), box.number))
        self.unit = math.gcd(*(box.size for box in self.boxes))
        sizes = [box.size // self.unit for box in self.boxes]
        highest = ((height(part.boxes, start) if roof is None else roof) - part.floor) // self.unit
        self.offsets = [self.model.new_int_var(0, highest - size, "") for size in sizes]
        spans = [self.model.new_fixed_size_interval_var(at, size, "") for at, size in zip(self.offsets, sizes, strict=True)]
        if crowds:
            for crowd in _crowds(self.boxes):
                self.model.add_no_overlap([spans[i] for i in sorted(crowd)])
        else:
            self.model.add_no_overlap_2d(self._lifetimes(), spans)
        if roof is None:
            top = self.model.new_int_var(-(-(enough - part.floor) // self.unit), highest, "")
            for offset, size, box in zip(self.offsets, sizes, self.boxes, strict=True):
                self.model.add(offset + size <= top)
                self.model.add_hint(offset, (start[box.number] - part.floor) // self.unit)
            self.model.minimize(top)

    def _lifetimes(self) -> list[Any]:
        ends = sorted({box.lower for box in self.boxes} | {box.upper for box in self.boxes})
        step = {end: number for number, end in enumerate(ends)}
        return [
            self.model.new_fixed_size_interval_var(step[box.lower], step[box.upper] - step[box.lower], "") for box in self.boxes
        ]

    def run(self) -> Offsets | None:
        left = self.deadline - time.monotonic()
        if left <= 0:
            return None
        parameters: Any = self.solver.parameters
        parameters.max_time_in_seconds = left
        parameters.num_workers = 1
        # The relaxation of a packing is worth nothing, and takes most of the time.
        parameters.linearization_level = 0
        if self.solver.solve(self.model) not in self.found:
            return None
        return {
            box.number: self.part.floor + self.solver.value(offset) * self.unit
            for box, offset in zip(self.boxes, self.offsets, strict=True)
        }

    def stop(self) -> None:
        self.solver.stop_search()


def _crowds(boxes: Sequence[Box]) -> list[frozenset[int]]:
    """Places in `boxes` of those that live together: every largest such set once."""
    crowds: list[frozenset[int]] = []
    # A set is largest only at the last step of one of its boxes.
    for end in {box.upper for box in boxes}:
        crowd = frozenset(i for i, box in enumerate(boxes) if box.lower < end <= box.upper)
        crowds = [other for other in crowds if not other <= crowd]
        if not any(crowd <= other for other in crowds):
            crowds.append(crowd)
    return crowds
