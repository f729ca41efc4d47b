"""The largest batch and the longest sequence within a memory limit."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

from . import planner
from .footprints import Fit, mib
from .plans import Plan, Problem

# Kernels number positions up to here; longer sequences are not tried.
_LONGEST = 2**30
# Of batch rows there is no other limit than memory.
_LARGEST = 2**60


def read_limit(name: str, limit: int | str, ranks: object = None) -> int:
    """A memory limit in bytes, of "8GiB" or bytes.

    name: of the argument, for errors.

    Raises TypeError or ValueError for anything else, and beside `ranks`.
    """
    if ranks is not None:
        raise ValueError(
            f"{name} is for a call on one device; got ranks={ranks!r} too. Leave one out: "
            "the plan of a ring prints the peak of a rank under every layout"
        )
    # A late import: it loads decimal and fractions, which only limits and budgets need.
    from passes.planning import budgets

    return budgets.parse(name, limit)


def fit(plan: Plan, lowering: str, limit: int) -> Fit:
    """The largest batch and the longest sequence within a limit.

    The batch is at the plan's length, the sequence at the plan's batch.

    lowering: as it was named for the plan, "auto" or one of the lowerings.
    limit: bytes.

    Raises ValueError if no batch row fits.
    """
    problem = plan.problem
    batches = _Sizes(plan, lowering, lambda count: replace(problem, batch=count))
    batch = _largest(batches, limit, problem.batch, _LARGEST)
    if batch == 0:
        raise ValueError(_nothing_fits(problem, lowering, limit))
    batch_bytes = batches(batch) or 0
    if not _is_one_sequence(problem):
        return Fit(limit, batch, batch_bytes, None, 0, "")
    return Fit(limit, batch, batch_bytes, *longest(plan, lowering, limit))


def _is_one_sequence(problem: Problem) -> bool:
    return problem.q_len == problem.kv_len and problem.q_offset == 0


def longest(plan: Plan, lowering: str, limit: int) -> tuple[int, int, str]:
    """The longest sequence at the plan's batch within a limit.

    lowering: as it was named for the plan.
    limit: bytes.

    Returns tokens, their bytes and what ends the sequence, as in `Fit`.
    """
    problem = plan.problem
    lengths = _Sizes(plan, lowering, lambda count: replace(problem, q_len=count, kv_len=count))
    most = max(_LONGEST, problem.q_len)
    tokens = _largest(lengths, limit, problem.q_len, most)
    if tokens == 0:
        return 0, 0, "program"
    end = "memory"
    if tokens == most:
        end = "search"
    elif lengths(tokens + 1) is None:
        end = "program"
    return tokens, lengths(tokens) or 0, end


class _Sizes:
    """Bytes of a plan's problem at other sizes: batch rows or tokens.

    of: the problem of a size.
    """

    def __init__(self, plan: Plan, lowering: str, of: Callable[[int], Problem]) -> None:
        self._plan, self._lowering, self._of = plan, lowering, of
        self._bytes: dict[int, int | None] = {}
        # Tensors are linear in both sizes: no plan needs less.
        self.least_bytes = of(1).footprint.total

    def __call__(self, count: int) -> int | None:
        """Peak bytes of a call of this size.

        None if the program has no such size.
        """
        if count not in self._bytes:
            self._bytes[count] = self._planned(self._of(count))
        return self._bytes[count]

    def _planned(self, problem: Problem) -> int | None:
        if problem == self._plan.problem:
            return self._plan.memory.total
        try:
            return planner.choose(problem, self._lowering).memory.total
        except ValueError:
            return None


def _largest(bytes_of: _Sizes, limit: int, start: int, most: int) -> int:
    """The largest size within a limit; 0 if there is none.

    start: a size that the program has.
    most: the largest size that is tried.
    """
    low, high = 0, min(limit // bytes_of.least_bytes, most) + 1
    sizes: list[tuple[int, int]] = []
    count = min(start, high)
    for turn in itertools.count(1):
        size = None
        if count < high:
            size = bytes_of(count)
        if size is not None:
            sizes.append((count, size))
        if size is not None and size <= limit:
            low = max(low, count)
        else:
            high = min(high, count)
        if high - low <= 1:
            break
        # Bytes are nearly linear: a line through the last two reaches the limit at once. The
        # middle without a line, and at every fourth turn, so that the search always ends.
        count = (low + high) // 2
        if size is not None and turn % 4:
            count = _where(sizes[-2:], limit, count)
        count = min(max(count, low + 1), high - 1)
    return low


def _where(points: list[tuple[int, int]], limit: int, middle: int) -> int:
    """The size at which a line through two points reaches the limit.

    points: sizes and their bytes; a single point is joined with the origin.
    middle: the result without such a line.
    """
    count, size = points[-1]
    before, size_before = points[0] if len(points) == 2 else (0, 0)
    if count == before or size == size_before:
        return middle
    return count + (limit - size) * (count - before) // (size - size_before)


def _nothing_fits(problem: Problem, lowering: str, limit: int) -> str:
    """The message for a limit below one batch row."""
    row = replace(problem, batch=1)
    plan = planner.choose(row, lowering)
    shape = (1, problem.heads, problem.q_len, problem.head_dim)
    remedy = "Raise memory_limit"
    if _is_one_sequence(problem):
        tokens, _, _ = longest(plan, lowering, limit)
        if tokens:
            remedy += f", shorten the sequence to at most {tokens:,} tokens,"
        remedy += " or share the sequence between ranks, as in plan(..., ranks=8)"
    way = "forward"
    if problem.training:
        way = "forward and backward"
    return (
        f"memory_limit must be at least {plan.memory.total:,} bytes: one batch row, "
        f"q of {shape}, takes {plan.memory} {way}; got {limit:,} bytes ({mib(limit)} MiB). {remedy}"
    )
