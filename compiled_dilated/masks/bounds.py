"""Masks of positions that bound masks of data, for counts before a call passes its data.

causal() & documents(ids="ids")        at most causal() & full()
causal() & ~documents(ids="ids")       at most causal() & ~~full()
"""

from __future__ import annotations

from collections.abc import Callable

from .core import Full, Mask, Not
from .functions import FromMod, Traced


def upper_bound(mask: Mask) -> Mask:
    """A mask of positions that allows at least the pairs of `mask`; itself if it reads no data."""
    if isinstance(mask, Not):
        return Not(lower_bound(mask.mask))
    if isinstance(mask, FromMod | Traced) and _reads_tensors(mask):
        return Full() if mask.within is None else upper_bound(mask.within)
    return _bound(mask, upper_bound, Full())


def lower_bound(mask: Mask) -> Mask:
    """A mask of positions that allows at most the pairs of `mask`; itself if it reads no data."""
    if isinstance(mask, Not):
        return Not(upper_bound(mask.mask))
    if isinstance(mask, FromMod | Traced) and _reads_tensors(mask):
        return Not(Full())
    return _bound(mask, lower_bound, Not(Full()))


def _bound(mask: Mask, of_part: Callable[[Mask], Mask], of_data: Mask) -> Mask:
    """The bound of a mask that grows with its parts, by the bounds of these."""
    if mask.parts:
        return mask._map(of_part)
    return of_data if mask.names else mask


def _reads_tensors(mask: FromMod | Traced) -> bool:
    """Whether a function captures tensors."""
    if isinstance(mask, FromMod):
        mask = mask.trace()[0]
    return bool(mask.slots)
