"""Arithmetic of ranges of positions: parts, hulls, intersections, unions and gaps."""

from __future__ import annotations

import math
from collections.abc import Sequence

# `Mask.shrink` of two ranges without allowed pairs.
NOTHING = (range(0), range(0))


def clip(span: range, low: int, high: int) -> range:
    """Elements x of a range with low <= x < high.

    The step is positive.
    """
    start = span.start + max(0, -((span.start - low) // span.step)) * span.step
    return range(start, min(span.stop, high), span.step)


def hull(spans: Sequence[range]) -> range:
    """The smallest range that contains some non-empty ranges."""
    first = min(span[0] for span in spans)
    # The largest step that reaches every element from the first.
    step = math.gcd(
        *(span.step for span in spans if len(span) > 1),
        *(span[0] - first for span in spans),
    )
    return range(first, max(span[-1] for span in spans) + 1, step or 1)


def intersection(a: range, b: range) -> range:
    """The numbers in both ranges (steps positive), by the Chinese remainder theorem."""
    if a.step == b.step == 1:
        return range(max(a.start, b.start), min(a.stop, b.stop))
    shared = math.gcd(a.step, b.step)
    if (b.start - a.start) % shared:
        return range(0)
    step = a.step // shared * b.step
    # The fewest steps of a that reach the residue class of b.
    distance = (b.start - a.start) // shared
    inverse = pow(a.step // shared, -1, b.step // shared)
    steps = distance * inverse % (b.step // shared)
    first = a.start + steps * a.step
    start = max(a.start, b.start)
    return range(first + -(-(start - first) // step) * step, min(a.stop, b.stop), step)


def common_ranges(a: tuple[range, ...], b: tuple[range, ...]) -> tuple[range, ...]:
    """The non-empty intersections of two lists of disjoint ranges."""
    if len(a) == len(b) == 1:  # the common case; decoding runs this for every token
        return (intersection(a[0], b[0]),)
    out = []
    for first in a:
        for second in b:
            common = intersection(first, second)
            if common:
                out.append(common)
    return tuple(out)


def union(spans: Sequence[range]) -> tuple[range, ...]:
    """The numbers in any of some ranges, as disjoint ranges.

    spans: not empty, of step 1.
    """
    # A sweep over the ranges by their start joins those that overlap or touch.
    out: list[range] = []
    for span in sorted(spans, key=lambda span: span.start):
        if out and span.start <= out[-1].stop:
            out[-1] = range(out[-1].start, max(out[-1].stop, span.stop))
        else:
            out.append(span)
    return tuple(out)


def gaps(spans: Sequence[range], stop: int) -> tuple[range, ...]:
    """The numbers below stop, from 0, in none of some ranges.

    spans: disjoint, of step 1.
    """
    borders = [0]
    for span in sorted(spans, key=lambda span: span.start):
        if span:
            borders += [span.start, span.stop]
    borders.append(stop)
    # Every second border starts a gap.
    out = []
    for start, end in zip(borders[::2], borders[1::2], strict=True):
        if start < end:
            out.append(range(start, end))
    return tuple(out)
