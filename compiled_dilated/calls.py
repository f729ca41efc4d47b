"""Options of a call beside q, k and v."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from .mods import Mod


@dataclass(frozen=True)
class Call:
    """The options of one call, the same for all its tiles, blocks and ranks.

    scale: of q . k, of any sign. q_offset: the position of the first query. data: the tensors that
    masks read, by name: those that the user names, and the operands of traced functions. score_mod:
    bound to its operands. offsets: the position of the first query of each entry of the batch,
    (B,), in place of q_offset.
    """

    scale: float
    q_offset: int = 0
    data: Mapping[str, Tensor] = field(default_factory=dict)
    score_mod: Mod | None = None
    offsets: Tensor | None = None
