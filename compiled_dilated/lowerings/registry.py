"""The lowerings, and the only place that lists them."""

from __future__ import annotations

from collections.abc import Sequence

from ..plans import Proposal
from . import dense, flex, lanes, native, strided, tiled
from .protocol import Lowering

LOWERINGS: tuple[Lowering, ...] = (
    native.LOWERING,
    dense.LOWERING,
    strided.LOWERING,
    tiled.LOWERING,
    flex.LOWERING,
    lanes.LOWERING,
)
NAMES = tuple(lowering.name for lowering in LOWERINGS)
_BY_NAME = {lowering.name: lowering for lowering in LOWERINGS}


def named(name: str) -> Lowering:
    """The lowering of this name; KeyError if there is none."""
    return _BY_NAME[name]


def of(chosen: Sequence[Proposal]) -> Lowering:
    """The lowering that runs these proposals: that of the first.

    Proposals of strided and tiled for different branches are run by the same code.
    """
    return _BY_NAME[chosen[0].lowering]
