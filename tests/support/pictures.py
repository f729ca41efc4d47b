"""The dense masks that pictures are compared with."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from compiled_dilated import Program
from compiled_dilated.masks import Mask
from compiled_dilated.programs import as_program
from compiled_dilated.reference import multiplicity

Grid = npt.NDArray[np.int64]


def dense(
    program: Program | Mask,
    heads: int,
    q_len: int,
    kv_len: int,
    data: Any = None,
    q_offset: int = 0,
) -> Grid:
    """How many branches link each pair, (2, heads, q_len, kv_len)."""
    q, k = torch.zeros(2, heads, q_len, 1), torch.zeros(2, heads, kv_len, 1)
    counts: Grid = multiplicity(as_program(program), q, k, q_offset=q_offset, data=data).numpy()
    return counts


def in_blocks(pairs: Grid, rows: int, columns: int) -> Grid:
    """Sums of blocks of so many rows and columns."""
    at = (np.arange(0, pairs.shape[0], rows), np.arange(0, pairs.shape[1], columns))
    return np.add.reduceat(np.add.reduceat(pairs, at[0], axis=0), at[1], axis=1)
