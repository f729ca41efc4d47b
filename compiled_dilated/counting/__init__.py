"""Exact numbers of allowed pairs and of tiles, without their lists.

Rectangles of pairs are halved until the mask decides them, a formula counts them, or they are small
enough to evaluate the mask at every pair. Masks are invariant under certain translations:
rectangles that such a translation maps onto each other are counted once, with a multiplicity. The
work grows with the logarithm of the length.

    causal(), 8 tokens            # FULL, counted at once; . EMPTY
    1 . . .   4 x 2 . .           1: four rectangles on the diagonal, one counted, times 4
    # 1 . .                       the next halving counts one of its 4 x 2 quarters
    # # 1 .
    # # # 1

    counts      pairs, cells, tiles
    symmetries  rectangles that are translations of each other
    pairwise    masks evaluated at pairs, all or a sample
"""

from .counts import CellCounts, TileCounts, cells, pairs, tiles

__all__ = ["CellCounts", "TileCounts", "cells", "pairs", "tiles"]
