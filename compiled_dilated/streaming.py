"""What passes.StreamQKV is told of attention by a program: how to ask for some of its queries, with keys and values whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from passes.rows.attentions import attention

from . import operators
from .orders import identity
from .programs import PerLength


def tell() -> None:
    """Once in a process; a compiled graph asks for it by the operator's name."""
    attention(
        torch.ops.compiled_dilated.attend.default, read=_read, reach=lambda start, stop, tokens, **_: (0, tokens), part=_part
    )


def _read(
    q: Any, k: Any, v: Any, data: Sequence[Any], handle: str, scale: float, q_offset: Any, training: bool
) -> dict[str, Any] | None:
    """The call's options; None of what needs all queries: orders, rings, a score_mod, data, a lowering or an offset by hand."""
    found = operators.meaning_of(handle)
    if found.ring is not None or found.score_mod is not None or isinstance(found.program, PerLength):
        return None
    ordered = any(branch.order != identity() for branch in found.program.branches)
    by_hand = found.lowering != "auto" or not isinstance(q_offset, int) or q_offset != 0
    return None if ordered or by_hand or data else {"handle": handle, "scale": scale}


def _part(q: Tensor, k: Tensor, v: Tensor, start: int, first: int, *, handle: str, scale: float) -> Tensor:
    assert first == 0  # masks count keys from the first
    return operators.part(q, k, v, start, handle, scale)
