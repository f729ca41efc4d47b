"""Visible key tiles per query tile, found by refinement.

Time and memory grow with the number of visible tiles only.

    window(2), 8 tokens, tiles of 2       offsets  0   2     5     8  10
       0 1 2 3   key tiles                indices  0 1  0 1 2 1 2 3 2 3
     0 # +                                full     1 0  0 1 0 0 1 0 0 1
     1 + # +     # FULL
     2   + # +   + PARTIAL
     3     + #

numpy only; `block_masks` turns a map into FlexAttention's BlockMask.

lists       TileLists: the visible columns of each row
refinement  from super tiles to the tiles that are not EMPTY
maps        TileMap: the lists of a mask, with lengths, tile sizes and the order
splitting   rectangles with short lists
"""

from .lists import Flags, TileIndices, TileLists
from .maps import TileMap
from .splitting import split

__all__ = ["Flags", "TileIndices", "TileLists", "TileMap", "split"]
