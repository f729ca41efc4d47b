"""Tiles and verdicts of the tests of masks."""

from __future__ import annotations

from typing import Any

import numpy as np

from compiled_dilated import masks
from compiled_dilated.masks import Mask
from compiled_dilated.regions import EMPTY, FULL, PARTIAL, Regions

DOCUMENTS = masks.documents(lengths=(7, 0, 20, 5))
# Masks whose classify is exact on contiguous tiles.
EXACT = [
    masks.full(),
    masks.causal(),
    masks.window(9),
    masks.window(3, 12),
    masks.window(11, dilation=3),
    masks.window(0, 17, dilation=5),
    masks.segments(12),
    masks.congruent(3, 1),
    masks.congruent(4, 3, period=16),
    DOCUMENTS,
    masks.sinks(5),
    masks.prefix(13),
    masks.global_tokens(6),
    masks.global_tokens(positions=(0, 17, 18, 19, 20, 40)),
    masks.block_window(5, 1, 2),
    masks.tiles([(0, 1), (1, 1), (2, 0), (2, 1)], block=8),
    masks.random_blocks(6, 3, 48),
    masks.neighborhood((30,), 4, offset=5),
]


def verdict_of(seen: Any) -> Any:
    """The exact verdict of a tile, from its pairs."""
    if seen.all():
        return FULL
    return PARTIAL if seen.any() else EMPTY


def contiguous_tiles(n: int, tile: int) -> Regions:
    """Tiles of consecutive tokens; the last may be short."""
    starts = np.arange(0, n, tile)
    return Regions.contiguous(starts, np.minimum(starts + tile, n))


def check_classify(mask: Mask, truth: Any, q: Regions, kv: Regions, exact: bool = False) -> None:
    """Compare the verdicts of all pairs of regions with the dense mask.

    truth: (queries, keys), bool.
    exact: PARTIAL is accepted only where it is exact.
    """
    rows, columns = (axis.reshape(-1) for axis in np.indices((len(q), len(kv))))
    verdicts = mask.classify(q[rows], kv[columns])
    assert verdicts.dtype == np.uint8
    assert verdicts.shape == rows.shape
    for row, column, verdict in zip(rows.tolist(), columns.tolist(), verdicts, strict=True):
        seen = truth[np.ix_(q.positions(row), kv.positions(column))]
        accepted = {verdict_of(seen)} if exact else {verdict_of(seen), PARTIAL}
        assert verdict in accepted, (mask, q[row : row + 1], kv[column : column + 1])
