"""Conjunctions of masks: their factors, and their split into disjoint masks."""

from __future__ import annotations

from .core import And, Mask, Or
from .full import Full


def conjuncts(mask: Mask) -> tuple[Mask, ...]:
    """Masks whose `&` is this mask; `full()` is the empty conjunction."""
    if isinstance(mask, And):
        factors: list[Mask] = []
        for part in mask.masks:
            factors += conjuncts(part)
        return tuple(factors)
    if isinstance(mask, Full):
        return ()
    return (mask,)


def conjunction(masks: tuple[Mask, ...]) -> Mask:
    """The `&` of some masks; the inverse of `conjuncts`."""
    if not masks:
        return Full()
    if len(masks) == 1:
        return masks[0]
    return And(masks)


def disjoint(mask: Mask) -> list[Mask]:
    """Split a mask into masks without common pairs.

    `a & (b | c)` becomes `a & b` and `a & c & ~b`.
    """
    parts = conjuncts(mask)
    for place, part in enumerate(parts):
        if isinstance(part, Or):
            # The first alternative; the second without the first; and so on.
            factors = parts[:place] + parts[place + 1 :]
            out = []
            for number, option in enumerate(part.masks):
                earlier = [~previous for previous in part.masks[:number]]
                out.append(conjunction((*factors, *conjuncts(option), *earlier)))
            return out
    return [mask]
