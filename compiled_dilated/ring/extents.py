"""Extents: the narrowest ranges of queries and keys with all allowed pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ..masks import Mask
from ..masks.ranges import NOTHING
from ..regions import EMPTY, PARTIAL, Regions

# A run is classified in this many parts, to cut off empty parts at its ends.
_PARTS = 16


def regions(runs: Sequence[range]) -> Regions:
    """Runs as regions."""
    columns = np.array([[run.start, len(run), run.step] for run in runs], dtype=np.int64).T
    return Regions.strided(*columns)


def verdict(mask: Mask, q: range, kv: range) -> int:
    """EMPTY, PARTIAL or FULL for a run of queries and of keys."""
    return int(mask.classify(regions([q]), regions([kv]))[0])


def cut(runs: Sequence[range], period: int | None) -> Iterator[range]:
    """Cut runs at the first multiple of a mask's period.

    Tokens before it are in one period; after it the mask repeats.
    """
    for run in runs:
        start = run.start
        if period is not None:
            start = -(-run.start // period) * period
        index = -(-(start - run.start) // run.step)
        for part in (run[:index], run[index:]):
            if part:
                yield part


def narrowest(mask: Mask, queries: range, keys: range) -> tuple[range, range]:
    """The narrowest queries and keys that contain all allowed pairs.

    Both are empty without allowed pairs.
    """
    q, kv = mask.shrink(queries, keys)
    if not q or not kv:
        return NOTHING
    result = verdict(mask, q, kv)
    if result == PARTIAL:
        kv = _trimmed(mask, q, kv, of_queries=False)
        if kv:
            q = _trimmed(mask, q, kv, of_queries=True)
    if result == EMPTY or not q or not kv:
        return NOTHING
    return (q, kv)


def _trimmed(mask: Mask, q: range, kv: range, of_queries: bool) -> range:
    """The queries (or the keys) without empty parts at the ends."""
    run = q if of_queries else kv
    size = -(-len(run) // _PARTS)
    parts = [run[start : start + size] for start in range(0, len(run), size)]
    # Each part against the complete other side.
    if of_queries:
        verdicts = mask.classify(regions(parts), regions([kv] * len(parts)))
    else:
        verdicts = mask.classify(regions([q] * len(parts)), regions(parts))
    visible = [part for part, result in zip(parts, verdicts, strict=True) if result != EMPTY]
    if visible:
        return range(visible[0].start, visible[-1].stop, run.step)
    return range(0)
