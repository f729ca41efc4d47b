"""Lists for the kernels of lanes: tiles of rows, runs of columns.

The runs of a tile are the columns that its rows see.

A row is a query and a column a key, or the other way round for the gradients of keys and values.

    tile    first row, step, number of rows; start of its FULL runs, of its PARTIAL ones, and stop
    run     first column, step, number of columns; least and most of row - column;
            low and high: rows low to before high of the tile see it
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...masks.ranges import intersection
from .lanes import Lane, Residue

Run = tuple[int, int, int, int, int, int, int]
# Numbers of a tile and of a run.
TILE, RUN = 6, 7


@dataclass(frozen=True)
class Tiling:
    """Tiles of `rows` rows, `step` apart, that see blocks of `columns` columns."""

    rows: int
    columns: int
    step: int

    def tiles(self, positions: range) -> Iterator[range]:
        """The positions of each tile, in the order of its first."""
        for base in range(positions.start, positions.stop, self.group):
            stop = min(positions.stop, base + self.group)
            for first in range(base, min(stop, base + self.step)):
                yield range(first, stop, self.step)

    @property
    def group(self) -> int:
        """Positions of `step` tiles that interleave."""
        return self.rows * self.step

    def reach(self, stop: int) -> range:
        """Positions of whole groups from 0 to at least before `stop`.

        Their tiles, cut to the rows and columns of a call, are those of every call within.
        """
        return range(-(-stop // self.group) * self.group)

    def span(self, first: int, positions: int) -> tuple[int, int]:
        """First tile of `reach` with some positions, and number of tiles.

        first, positions: also symbolic.
        """
        start = first // self.group * self.step
        stop = ((first + positions - 1) // self.group + 1) * self.step
        return start, stop - start

    def count(self, positions: range) -> int:
        """Number of tiles."""
        # `step` tiles of `rows` rows interleave; the last of these groups may be short.
        groups, remaining = divmod(len(positions), self.group)
        return groups * self.step + min(remaining, self.step)


@dataclass(frozen=True, eq=False)
class Lists:
    """Tiles and runs of all classes of heads.

    tiles: (classes, tiles, TILE).
    runs: (runs, RUN).
    """

    tiles: npt.NDArray[np.int32]
    runs: npt.NDArray[np.int32]


def step_of(classes: Sequence[Sequence[Lane]]) -> int:
    """Least step at which rows see equal residues, in all lanes."""
    periods: list[int] = []
    for lanes in classes:
        for lane in lanes:
            periods += lane.periods
    return math.lcm(*periods)


def build(classes: Sequence[Sequence[Lane]], rows: range, columns: range, tiling: Tiling) -> Lists:
    """The lists of all tiles of the rows.

    classes: lanes by class.
    rows, columns: positions.
    """
    tiles: list[tuple[int, ...]] = []
    runs: list[Run] = []
    for lanes in classes:
        for tile in tiling.tiles(rows):
            full, partial = _runs_of_tile(lanes, tile, columns, tiling.columns)
            start, middle = len(runs), len(runs) + len(full)
            runs += full + partial
            tiles.append((tile.start, tile.step, len(tile), start, middle, len(runs)))
    shape = len(classes), tiling.count(rows), TILE
    of_runs = np.array(runs, dtype=np.int32).reshape(-1, RUN)
    return Lists(np.array(tiles, dtype=np.int32).reshape(shape), of_runs)


def computed_pairs(
    lanes: Sequence[Lane], rows: range, columns: range, tiling: Tiling, most: int = 128
) -> tuple[int, int]:
    """Computed pairs of FULL and of PARTIAL blocks, for one head.

    Exact for up to `most` tiles, else an estimate from a sample of them.
    """
    count = tiling.count(rows)
    stride = max(1, count // most)
    # An odd stride samples all residues of a step that is a power of two.
    stride += 1 - stride % 2
    full = partial = sampled = 0
    for number, tile in enumerate(tiling.tiles(rows)):
        if number % stride:
            continue
        sampled += 1
        of_full, of_partial = _runs_of_tile(lanes, tile, columns, tiling.columns)
        full += sum(run[2] for run in of_full)
        partial += sum(-(-run[2] // tiling.columns) * tiling.columns for run in of_partial)
    scale = tiling.rows * count / max(1, sampled)
    return round(full * scale), round(partial * scale)


def _runs_of_tile(
    lanes: Sequence[Lane], tile: range, columns: range, block: int
) -> tuple[list[Run], list[Run]]:
    """FULL runs, of whole blocks that every row sees, and PARTIAL ones."""
    full: list[Run] = []
    partial: list[Run] = []
    for lane in lanes:
        for low, high in _spans(lane, tile):
            for seen in _columns(lane, tile[low:high], columns):
                for run, is_full in _cut(lane, tile, low, high, seen, block):
                    if is_full:
                        full.append(run)
                    else:
                        partial.append(run)
    return full, partial


def _spans(lane: Lane, tile: range) -> Iterator[tuple[int, int]]:
    """Runs of a tile's rows within one group of every grouping.

    Yields (low, high): rows low to before high of the tile, all of them in the lane.
    """
    low = 0
    while low < len(tile):
        position = tile[low]
        # 1. Rows up to the next end of a group, or of a period within which residues count.
        high = len(tile)
        for end in _ends_after(lane, position):
            high = min(high, _rows_before(tile, end))
        # 2. Those of the lane; residues are equal in all rows of a tile, within a period.
        first = max(low, _rows_before(tile, lane.rows.start))
        last = min(high, _rows_before(tile, lane.rows.stop))
        if first < last and all(_contains(residue, position) for residue in lane.rows.residues):
            yield first, last
        low = high


def _ends_after(lane: Lane, position: int) -> Iterator[int]:
    """Ends of the groups and residue periods that contain a position."""
    for grouping in lane.groupings:
        yield grouping.group_of(position)[1]
    for residue in lane.rows.residues:
        if residue.within:
            yield (position // residue.within + 1) * residue.within


def _rows_before(tile: range, position: int) -> int:
    """Number of a tile's rows before a position, not clipped."""
    return -(-(position - tile.start) // tile.step)


def _contains(residue: Residue, position: int) -> bool:
    """Whether a position is in the residue."""
    if residue.within:
        position %= residue.within
    return position % residue.modulus == residue.offset


def _columns(lane: Lane, rows: range, columns: range) -> Iterator[range]:
    """Runs of the columns that some rows see.

    rows: within one group of every grouping.
    """
    # 1. The columns near enough, on the visible side of every grouping.
    start = max(columns.start, lane.columns.start, rows[0] - lane.most)
    stop = min(columns.stop, lane.columns.stop, rows[-1] - lane.least + 1)
    for grouping in lane.groupings:
        side = grouping.columns(rows[0])
        start, stop = max(start, side.start), min(stop, side.stop)
    # 2. Those at a multiple of the dilation, and in every residue.
    run = range(start, stop)
    if run and lane.dilation > 1:
        run = intersection(run, range(rows[0] % lane.dilation, stop, lane.dilation))
    if not run:
        return
    runs = [run]
    for residue in lane.columns.residues:
        runs = _in_residue(residue, runs)
    yield from runs


def _in_residue(residue: Residue, runs: Sequence[range]) -> list[range]:
    """Non-empty parts of some runs whose positions are in the residue."""
    out = []
    for run in runs:
        for lattice in _lattices(residue, run):
            part = intersection(run, lattice)
            if part:
                out.append(part)
    return out


def _lattices(residue: Residue, run: range) -> Iterator[range]:
    """Positions of a residue, as ranges that cover a run."""
    if not residue.within or residue.within % residue.modulus == 0:
        yield range(residue.offset, run[-1] + 1, residue.modulus)
        return
    for start in range(run[0] // residue.within * residue.within, run[-1] + 1, residue.within):
        yield range(
            start + residue.offset, min(start + residue.within, run[-1] + 1), residue.modulus
        )


def _cut(
    lane: Lane, tile: range, low: int, high: int, seen: range, block: int
) -> Iterator[tuple[Run, bool]]:
    """Cut the columns that some rows see into runs.

    low, high: the rows, low to before high of the tile.
    seen: the columns.
    block: columns per block.

    Yields each run, and whether it is FULL: whole blocks that every row of the tile sees. At most
    one run is FULL.
    """
    start = stop = 0
    if low == 0 and high == len(tile):
        # Whole blocks of columns that are near enough to the first and to the last row.
        start = max(0, -(-(tile[-1] - lane.most - seen.start) // seen.step))
        stop = min(len(seen), (tile[0] - lane.least - seen.start) // seen.step + 1)
        stop = start + max(0, stop - start) // block * block
    if start >= stop:
        start = stop = 0
    for part, is_full in ((seen[:start], False), (seen[start:stop], True), (seen[stop:], False)):
        if part:
            yield (part.start, part.step, len(part), lane.least, lane.most, low, high), is_full
