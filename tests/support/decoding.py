"""Masks of which the keys of one query are a few ranges."""

from __future__ import annotations

from compiled_dilated import masks

CAUSAL, WINDOW = masks.causal, masks.window
GRID = (5, 9)
MASKS = [
    masks.full(),
    CAUSAL(),
    WINDOW(5),
    WINDOW(3, 7),
    WINDOW(9, 9, 3),
    masks.segments(7),
    masks.congruent(3, 1),
    masks.congruent(3, 2, period=10),
    masks.documents(lengths=(4, 0, 9, 20)),
    masks.sinks(3),
    masks.prefix(5),
    masks.global_tokens(4),
    masks.neighborhood(GRID, (1, 2)),
    masks.neighborhood(GRID, 2, edges="shift"),
    masks.neighborhood(GRID, (1, 2), dilation=2, edges="shift", causal=(True, False)),
    masks.neighborhood((3, 3, 5), 1, dilation=2),
    masks.dilated_blocks(4, 3),
    CAUSAL() & (WINDOW(5) | masks.sinks(3)),
    ~(CAUSAL() & WINDOW(5)),
    masks.segments(12) & masks.congruent(3, 1, period=12) & CAUSAL(),
    WINDOW(20, 20, 4) & masks.congruent(6, 2),
    ~masks.neighborhood(GRID, 1),
]
