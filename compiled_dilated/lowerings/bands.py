"""Bands cut into tiles: along a line of tokens, or along one axis of a grid, which keys the queries of each tile see.

window(2), tiles of 4 queries       runs: one clipped at the start, one in the middle, one at the end
# # # . . . . . . . . .             queries [0, 4)    keys [0, 6)
# # # # . . . . . . . .             queries [4, 8)    keys [2, 10), and all further tiles like it
# # # # # . . . . . . .
. # # # # # . . . . . .
"""

from __future__ import annotations

from dataclasses import dataclass, replace

# A tile holds at most this many queries, so that its result stays small beside the tensors of a long sequence.
MOST_ROWS = 4096
# Of longer sequences it holds more, so that there are at most this many tiles with a geometry of their own.
_MOST_ALONE = 256


@dataclass(frozen=True)
class Band:
    """Query t of q_len stands at key coordinate shift + t and sees keys from `left` before it to `right` after it (None: all).

    clamped: windows that stick out are moved inwards instead of cut.
    """

    q_len: int
    k_len: int
    shift: int
    left: int | None
    right: int | None
    clamped: bool = False


@dataclass(frozen=True)
class Run:
    """`count` tiles, `stride` coordinates apart: queries [q_start, + q_rows) see keys [k_start, + k_rows).

    full: they see all of them.
    """

    count: int
    stride: int
    q_start: int
    q_rows: int
    k_start: int
    k_rows: int
    full: bool
    causal: bool = False
    first: bool = True


def cut(band: Band, tile: int) -> list[Run]:
    """Tiles of `tile` queries along a band, those of one geometry together."""
    seeing, inner = _seeing(band, tile), _inner(band, tile)
    groups = [range(number, number + 1) for number in range(seeing.start, inner.start)]
    groups += [inner] if inner else []
    groups += [range(number, number + 1) for number in range(inner.stop, seeing.stop)]
    runs = [_run(band, tile, group) for group in groups]
    return [run for run in runs if run.k_rows > 0]  # a short last tile may see nothing


def whole_parts(band: Band, run: Run) -> list[Run]:
    """The run by its keys: those that all its queries see apart from those that some of them do not see."""
    if run.full or band.clamped:
        return [run]
    first, last = run.q_start + band.shift, run.q_start + run.q_rows - 1 + band.shift
    stop = run.k_start + run.k_rows
    whole_start = run.k_start if band.left is None else min(max(last - band.left, run.k_start), stop)
    whole_stop = stop if band.right is None else min(max(first + band.right + 1, run.k_start), stop)
    if whole_start >= whole_stop:
        return [run]
    borders = [(run.k_start, whole_start, False), (whole_start, whole_stop, True), (whole_stop, stop, False)]
    parts = [replace(run, k_start=low, k_rows=high - low, full=full) for low, high, full in borders if high > low]
    return [parts[0], *(replace(part, first=False) for part in parts[1:])]


def alone(band: Band, tile: int) -> int:
    """Number of tiles that no other tile has the geometry of: those at an end of the keys."""
    return len(_seeing(band, tile)) - len(_inner(band, tile))


def rows_at_once(queries: int) -> int:
    """Queries of a tile that is as large as tiles may be: of a long sequence a small share."""
    return max(MOST_ROWS, -(-queries // _MOST_ALONE))


def _seeing(band: Band, tile: int) -> range:
    """Numbers of the tiles that see any key."""
    start, stop = 0, -(-band.q_len // tile)
    if not band.clamped and band.right is not None:
        # The last query of the tile sees key 0 or a later one.
        start = max(start, -(-(1 - band.right - band.shift) // tile) - 1)
    if not band.clamped and band.left is not None:
        # The first one sees key k_len - 1 or an earlier one.
        stop = min(stop, (band.k_len - 1 + band.left - band.shift) // tile + 1)
    return range(start, max(start, stop))


def _inner(band: Band, tile: int) -> range:
    """Numbers of the tiles of full size whose keys are cut at neither end; behind all others where there are none."""
    seeing = _seeing(band, tile)
    start, stop = seeing.start, min(seeing.stop, band.q_len // tile)
    if band.left is None or band.right is None:
        stop = start
    else:
        last_key = band.k_len - 1
        if band.clamped:
            # Where the window of 2 * left + 1 keys would stick out, it is moved instead.
            last_key = max(last_key, 2 * band.left)
        start = max(start, -(-(band.left - band.shift) // tile))
        stop = min(stop, (last_key + 1 - band.right - band.shift) // tile)
    return range(start, stop) if start < stop else range(seeing.stop, seeing.stop)


def _run(band: Band, tile: int, numbers: range) -> Run:
    start = numbers.start * tile
    stop = min(start + tile, band.q_len)
    low, high, whole = _reach(band, start + band.shift, stop - 1 + band.shift)
    low, high = max(low, 0), min(high, band.k_len)
    return Run(len(numbers), tile, start, stop - start, low, high - low, whole)


def _reach(band: Band, first: int, last: int) -> tuple[int, int, bool]:
    """Keys [low, high) that queries first .. last see, and whether all queries see all of them."""
    if band.clamped:
        assert band.left is not None
        assert band.left == band.right
        width = 2 * band.left + 1
        most = max(band.k_len - width, 0)
        low, low_of_last = (min(max(at - band.left, 0), most) for at in (first, last))
        return low, low_of_last + width, low == low_of_last
    low = 0 if band.left is None else max(first - band.left, 0)
    high = band.k_len if band.right is None else min(last + band.right + 1, band.k_len)
    whole = (band.left is None or low >= last - band.left) and (band.right is None or high <= first + band.right + 1)
    return low, high, whole


def cut_causal(band: Band) -> list[Run]:
    """A band that sees everything up to the query: per tile a dense block before it and a triangle, which the kernel knows."""
    runs = []
    tile = rows_at_once(band.q_len)
    for start in range(0, band.q_len, tile):
        rows = min(tile, band.q_len - start)
        diagonal = band.shift + start
        triangle = min(rows, band.k_len - diagonal)
        if triangle > 0:
            # Rows past the last key see the whole triangle's columns: the kernel's top-left causal rule says the same.
            runs.append(Run(1, rows, start, rows, diagonal, triangle, full=True, causal=True))
        before = min(diagonal, band.k_len)
        if before > 0:
            runs.append(Run(1, rows, start, rows, 0, before, full=True, first=triangle <= 0))
    return runs
