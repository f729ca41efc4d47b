"""Options of a call beside q, k and v."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from .mods import Mod


@dataclass(frozen=True)
class Call:
    """The options of one call, for all tiles, blocks and ranks.

    scale: of q . k, of any sign.
    q_offset: position of the first query.
    data: tensors that masks read, by name: the user's, and operands of traced functions.
    score_mod: bound to its operands.
    offsets: position of the first query of each batch entry, (B,), in place of q_offset.
    """

    scale: float
    q_offset: int = 0
    data: Mapping[str, Tensor] = field(default_factory=dict)
    score_mod: Mod | None = None
    offsets: Tensor | None = None
