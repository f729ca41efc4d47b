"""FlexAttention's BlockMask from a mask expression, and back.

A BlockMask has rectangular lists, as wide as its widest row. A mask with a few very wide rows is
split into disjoint parts. Triton kernels accept these narrow lists; the CPU kernels need `widen`.
Eager FlexAttention only evaluates mask_mod, which is complete.

checked     block_masks, block_mask: checked arguments
parts       a BlockMask for each rectangle of tiles
conversion  wide lists, and tiles back from a BlockMask
"""

from .checked import block_mask, block_masks
from .conversion import tile_map, widen
from .parts import BlockMaskPart, build

__all__ = ["BlockMaskPart", "block_mask", "block_masks", "build", "tile_map", "widen"]
