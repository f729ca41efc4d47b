"""Rectangles of a tile map with short rectangular lists."""

from __future__ import annotations

import itertools

import numpy as np

from ..regions import IntArray
from .maps import TileMap

# Rectangular lists may have this many times the visible tiles, and always this many entries
# (256 KiB); else a map is split.
_MOST_PADDING = 4
_ALWAYS_FITS = 2**16
_MOST_CUTS = 16


def split(tile_map: TileMap) -> tuple[TileMap, ...]:
    """Disjoint rectangles of all tiles, with short rectangular lists.

    A few heavy rows (global tokens) or columns (sinks) would widen the list of every row, so they
    become separate parts. Parts without tiles are dropped. A map is not split if its lists are
    short enough, or if its heavy rows are scattered over too many places.

        window | global tokens      # # # # #       A A A A A
                                    # # .           B C C
                                    # # # .    ->   B C C C
                                    #   # # #       B   C C C
    """
    by_row, by_column = tile_map.counts, np.bincount(tile_map.indices, minlength=tile_map.columns)
    # Entries of rectangular lists per row, and per column.
    padded = [len(counts) * int(counts.max(initial=0)) for counts in (by_row, by_column)]
    if max(padded) <= max(_MOST_PADDING * len(tile_map.indices), _ALWAYS_FITS):
        return (tile_map,)
    rows, columns = range(tile_map.rows), range(tile_map.columns)
    if padded[0] >= padded[1]:
        parts = [tile_map.restrict(run, columns) for run in _heavy_and_light(by_row)]
    else:
        parts = [tile_map.restrict(rows, run) for run in _heavy_and_light(by_column)]
    if len(parts) == 1:
        return (tile_map,)
    rectangles: list[TileMap] = []
    for part in parts:
        if len(part.indices):
            rectangles += split(part)
    return tuple(rectangles)


def _heavy_and_light(counts: IntArray) -> list[range]:
    """Runs of heavy and of light rows, with the least padding."""
    # Entries of both lists if the rows up to each count are light.
    ascending = np.sort(counts)
    light = np.arange(1, len(counts) + 1)
    entries = light * ascending + (len(counts) - light) * ascending[-1]
    heavy = counts > ascending[np.argmin(entries)]
    cuts = [0, *(np.flatnonzero(np.diff(heavy)) + 1).tolist(), len(counts)]
    if len(cuts) <= _MOST_CUTS:
        return [range(*ends) for ends in itertools.pairwise(cuts)]
    return [range(len(counts))]
