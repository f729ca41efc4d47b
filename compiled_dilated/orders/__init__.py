"""Orders of execution: permutations of tokens that make masks tile-friendly.

An order never changes a result.

    place                 0  1  2  3  4  5  6  7      hilbert(4, 4), the place of each cell
    residue(2)            0  2  4  6  1  3  5  7                  0  1 14 15
    residue(2, period=4)  0  2  1  3  4  6  5  7                  3  2 13 12
                                                                  4  7  8 11
                                                                  5  6  9 10

A *place* is an index along the order, a *position* an index in the original sequence;
`permutation(n)[place]` is a position.

    core      Order, Identity
    residues  Residue: residue classes one after the other
    grids     Hilbert, PlacedHilbert: cells of a grid along a curve
    curves    the Hilbert curve of a grid, as arrays
    indices   the curve as an index tensor, cached per device
"""

from .core import Identity, Order, identity
from .grids import Hilbert, PlacedHilbert, hilbert
from .residues import Residue, residue

__all__ = [
    "Hilbert",
    "Identity",
    "Order",
    "PlacedHilbert",
    "Residue",
    "hilbert",
    "identity",
    "residue",
]
