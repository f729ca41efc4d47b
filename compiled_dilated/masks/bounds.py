"""Bounds of data masks by masks of positions.

For counts before a call passes its data:

causal() & documents(ids="ids")        at most causal() & full()
causal() & ~documents(ids="ids")       at most causal() & ~~full()
"""

from __future__ import annotations

from collections.abc import Callable

from .core import Mask, Not
from .full import Full
from .functions import FromMod
from .traced import Traced


def upper_bound(mask: Mask) -> Mask:
    """A mask of positions that allows at least the pairs of `mask`.

    `mask` itself if it reads no data.
    """
    if isinstance(mask, Not):
        return Not(lower_bound(mask.mask))
    if isinstance(mask, FromMod | Traced) and _reads_tensors(mask):
        if mask.within is None:
            return Full()
        return upper_bound(mask.within)
    return _bound(mask, upper_bound, Full())


def lower_bound(mask: Mask) -> Mask:
    """A mask of positions that allows at most the pairs of `mask`.

    `mask` itself if it reads no data.
    """
    if isinstance(mask, Not):
        return Not(upper_bound(mask.mask))
    if isinstance(mask, FromMod | Traced) and _reads_tensors(mask):
        return Not(Full())
    return _bound(mask, lower_bound, Not(Full()))


def _bound(mask: Mask, of_part: Callable[[Mask], Mask], of_data: Mask) -> Mask:
    """Bound of a mask that is monotone in its parts.

    of_part: the bound of a part.
    of_data: the bound of a mask that reads data itself.
    """
    if mask.parts:
        return mask._map(of_part)
    if mask.names:
        return of_data
    return mask


def _reads_tensors(mask: FromMod | Traced) -> bool:
    """Whether a function captures tensors."""
    if isinstance(mask, FromMod):
        mask = mask.trace()[0]
    return bool(mask.slots)
