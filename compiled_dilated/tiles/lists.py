"""Visible columns per row of tiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..regions import EMPTY, FULL, PARTIAL, IntArray, Verdicts

TileIndices = npt.NDArray[np.int32]
AnyInts = npt.NDArray[np.signedinteger[Any]]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class TileLists:
    """Visible columns per row: indices[offsets[row] : offsets[row + 1]], ascending.

    offsets: (rows + 1,).
    indices, full: one entry per visible tile; `full` is True for FULL tiles.
    columns: number of columns.
    """

    offsets: IntArray
    indices: TileIndices
    full: Flags
    columns: int

    @staticmethod
    def of(rows: int, columns: int, row: AnyInts, column: AnyInts, full: Flags) -> TileLists:
        """Lists of distinct tiles in any order."""
        # One integer per tile: row, column, then the flag. numpy vectorises a plain sort.
        dtype = np.int32 if 2 * rows * columns < 2**31 else np.int64
        tile = np.multiply(row, columns, dtype=dtype) + column
        keys = np.sort(tile * 2 + full)
        offsets = np.searchsorted(keys, np.arange(rows + 1, dtype=np.int64) * (2 * columns)).astype(
            np.int64
        )
        indices = ((keys >> 1) % max(columns, 1)).astype(np.int32)
        return TileLists(offsets, indices, (keys & 1).astype(np.bool_), columns)

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.offsets) - 1

    @property
    def counts(self) -> IntArray:
        """Visible columns per row, (rows,)."""
        return np.diff(self.offsets)

    @property
    def row_of(self) -> TileIndices:
        """The row of each entry of `indices`."""
        return np.repeat(np.arange(self.rows, dtype=np.int32), self.counts)

    @property
    def nbytes(self) -> int:
        """Bytes of the lists."""
        return self.offsets.nbytes + self.indices.nbytes + self.full.nbytes

    def verdicts(self) -> Verdicts:
        """EMPTY, PARTIAL or FULL of every tile, (rows, columns).

        For pictures and small tests.
        """
        out = np.full((self.rows, self.columns), EMPTY)
        out[self.row_of, self.indices] = np.where(self.full, FULL, PARTIAL)
        return out
