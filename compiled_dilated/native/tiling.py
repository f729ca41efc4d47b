"""How the native kernel tiles a program.

By patches of a grid, or by residue classes of positions: a tile has queries of one residue class
modulo its step, and visits keys of some classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from ..masks import And, Mask, Or
from ..masks.bands import Window
from ..masks.blocks import DilatedBlocks
from ..masks.congruent import Congruent
from ..masks.data import DocumentIds
from ..masks.functions import FromMod
from ..masks.neighborhoods import Neighborhood, PlacedNeighborhood
from ..masks.segments import Segments
from ..masks.traced import Traced
from ..orders import Hilbert, PlacedHilbert
from ..programs import Branch

# A tile of queries visits at most this many residue classes of keys. Where masks would need more,
# hidden pairs are computed too, with the same result.
_MOST_CLASSES = 48
_LANES = 16  # of the longest vectors


class Keys(NamedTuple):
    """The keys of a branch's blocks.

    step: the distance of a block's keys.
    strict: as of `_Classes`.
    """

    step: int
    strict: bool


class Tiling(NamedTuple):
    """The tiles of a group of branches.

    step: the distance of a tile's queries.
    offset, sizes: the grid whose patches are tiles; sizes is empty where there is none.
    keys: of each branch.
    """

    step: int
    offset: int
    sizes: tuple[int, ...]
    keys: tuple[Keys, ...]


def tiling_of(branches: Sequence[Branch]) -> Tiling:
    """The tiles of the branches of a head."""
    grids = [_grid(branch) for branch in branches]
    offset, sizes = next((grid for grid in grids if grid is not None), (0, ()))
    # A grid is tiled by patches, anything else by residue classes modulo `step`.
    classes = [_Classes(1, True)] * len(branches)
    if not sizes:
        classes = [_classes(branch.mask) for branch in branches]
    step = _query_step(classes, _most_step(branches, classes))
    keys = [Keys(_key_step(of_branch, step), of_branch.strict) for of_branch in classes]
    return Tiling(step, offset, sizes, tuple(keys))


def position_limit(branches: Sequence[Branch]) -> int:
    """One past the last position that the branches define; -1 for any."""
    limits = []
    for branch in branches:
        for part in branch.mask.walk():
            if isinstance(part, Neighborhood):
                limits.append(math.prod(part.grid))
        if isinstance(branch.order, Hilbert):
            limits.append(math.prod(branch.order.grid))
    return min(limits, default=-1)


def _grid(branch: Branch) -> tuple[int, tuple[int, ...]] | None:
    """The grid whose patches are tiles: its first position and its sizes."""
    for part in branch.mask.walk():
        if isinstance(part, Neighborhood) and len(part.grid) > 1:
            return 0, part.grid
        if isinstance(part, PlacedNeighborhood) and len(part.neighborhood.grid) > 1:
            return part.offset, part.neighborhood.grid
    # An order lays out work: tiles along the line compute fewer hidden pairs of masks that are
    # defined along it. What a function or ids link is unknown.
    if any(isinstance(part, (FromMod, Traced, DocumentIds)) for part in branch.mask.walk()):
        if isinstance(branch.order, Hilbert):
            return 0, branch.order.grid
        if isinstance(branch.order, PlacedHilbert):
            return branch.order.offset, branch.order.hilbert.grid
    return None


class _Classes(NamedTuple):
    """The residue classes of a mask's positions.

    modulus: of the classes; 1 where the mask has none.
    strict: whether linked positions are always of one class. Otherwise they are within a period of
        the mask only, and classes begin anew with each period.
    """

    modulus: int
    strict: bool


def _classes(mask: Mask) -> _Classes:
    """The finest classes known of a mask."""
    match mask:
        case Window():
            return _Classes(mask.dilation, True)
        case Congruent():
            return _Classes(mask.modulus, mask.period == mask.modulus)
        case DilatedBlocks() if mask.block == 1:
            return _Classes(mask.stride, True)
        case Neighborhood() if len(mask.axes) == 1:
            return _Classes(mask.axes[0].dilation, True)
        case PlacedNeighborhood():
            return _classes(mask.neighborhood)
        case Traced() if mask.within is not None:
            return _classes(mask.within)
        case And():
            return _classes_of_all(mask.masks)
        case Or():
            return _classes_of_any(mask.masks)
    return _Classes(1, True)


def _classes_of_all(masks: Sequence[Mask]) -> _Classes:
    """Classes of positions that all masks link: strict ones, if any."""
    parts = [_classes(mask) for mask in masks]
    strict = math.lcm(*(part.modulus for part in parts if part.strict))
    if strict > 1:
        return _Classes(strict, True)
    modulus = math.lcm(*(part.modulus for part in parts))
    return _Classes(modulus, modulus == 1)


def _classes_of_any(masks: Sequence[Mask]) -> _Classes:
    """Classes of positions that one of the masks links."""
    parts = [_classes(mask) for mask in masks]
    if not all(part.strict for part in parts):
        return _Classes(1, True)
    return _Classes(math.gcd(*(part.modulus for part in parts)), True)


def _most_step(branches: Sequence[Branch], classes: Sequence[_Classes]) -> int:
    """The greatest step by which vectors stay within the branches' extents."""
    most: float = _MOST_CLASSES
    for branch, of_branch in zip(branches, classes, strict=True):
        # Queries of one class see each other's keys, however far apart they are.
        most = min(most, max(of_branch.modulus, _extent(branch.mask) // _LANES))
    return int(most)


def _extent(mask: Mask) -> float:
    """A bound of the distance of linked positions in tokens."""
    match mask:
        case Segments():
            return mask.length
        case Window():
            return mask.left + mask.right + 1
        case And():
            return min(_extent(part) for part in mask.masks)
    return math.inf


def _query_step(classes: Sequence[_Classes], most: int) -> int:
    """The distance of a tile's queries, for all branches of a head.

    most: the greatest step, unless all branches share their classes.
    """
    # Classes that all branches share cost no branch a hidden pair, however many there are.
    shared = math.gcd(*(of_branch.modulus for of_branch in classes if of_branch.strict))
    if shared > _MOST_CLASSES and all(of_branch.strict for of_branch in classes):
        return shared
    # Tiles of a large step are long: branches without classes compute hidden pairs.
    steps = [_divisor(of_branch, most) for of_branch in classes]
    step = math.lcm(*steps)
    return step if step <= most else max(steps)


def _divisor(classes: _Classes, most: int) -> int:
    """The greatest divisor of a modulus up to `most`.

    1 for larger moduli of classes that begin anew.
    """
    if classes.modulus <= most:
        return classes.modulus
    if not classes.strict:
        return 1
    return next(divisor for divisor in range(most, 0, -1) if classes.modulus % divisor == 0)


def _key_step(classes: _Classes, step: int) -> int:
    """The distance of a block's keys, for tiles of a step."""
    if classes.strict and classes.modulus // math.gcd(classes.modulus, step) <= _MOST_CLASSES:
        return classes.modulus
    return _divisor(classes, _MOST_CLASSES)
