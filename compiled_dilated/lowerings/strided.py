"""Masks that fall apart into regular dense blocks: segments, residue classes, windows, neighbourhoods. Views, no index tensors.

A mask is first cut into *lanes*, on which it is simple: the tokens of one segment and one residue class, for which a dilated mask
is dense and a dilated window a plain one. Along a lane (or along each axis of a grid) a *band* says which keys a query sees; it
is cut into tiles, and tiles of equal shape at regular places become one batch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..arguments import MOST
from ..heads import HeadRange
from ..masks import And, Mask, Not, Or, Padding, conjunction, conjuncts
from ..masks.data import DocumentLengths
from ..masks.grids import Axis, Neighborhood, strides_of
from ..masks.positions import Causal, Congruent, DilatedBlocks, GlobalTokens, LeadingQueries, Prefix, Segments, Sinks, Window
from ..plans import Problem, Refusal
from . import costs
from .bands import MOST_ROWS, Band, Run, alone, cut, cut_causal, rows_at_once, whole_parts
from .batches import Batch
from .lattice import Lattice

_WINDOW_TILES = (64, 128, 192, 256, 320, 384, 512, 768, 1024, 1536, 2048, 4096)
_BOX_TILES = (4, 6, 8, 10, 12, 14, 16, 20, 24, 32, 48, 64)
_MOST_DOCUMENTS = 256
_MOST_ALONE = 512
_ASKED_ROWS, _ASKED_COLUMNS = 512, 2048
# Entries of the bias of a tile that is cut in parts.
_MOST_MASKED = 2**20
# A mask that falls apart into more parts than this is computed by tiles.
_MOST_CASES = 16
# Masks whose negation is made of bands and rectangles too.
_NEGATED = (Causal, Window, Sinks, LeadingQueries, Prefix, GlobalTokens)


Span = tuple[int | None, int | None]
Tiling = tuple[Lattice, Lattice, bool, bool, bool]  # queries, keys, full, causal, first


@dataclass(frozen=True)
class Lane:
    """Tokens on which the mask is a band: queries q_first, + step, ...; keys k_first, + step, ...

    All of it is repeated `count` times, `stride` apart.
    """

    count: int
    stride: int
    q_first: int
    k_first: int
    step: int
    band: Band


def propose(mask: Mask, heads: HeadRange, kv_heads: HeadRange, problem: Problem) -> list[Batch] | Refusal:
    """The batches of one head range of a branch, or why the mask is not made of regular blocks."""
    pieces = _sort(conjuncts(mask))
    if isinstance(pieces, str):
        return _refusal(pieces)
    batches: list[Batch] = []
    for number, part in enumerate(pieces.by_band(_reach(problem))):
        tilings = _tilings(part, problem)
        if isinstance(tilings, str):
            return _refusal(tilings)
        batches += [
            _batch(queries, keys, run_full, causal, first and number == 0, part, heads, kv_heads)
            for queries, keys, run_full, causal, first in tilings
        ]
    return batches


def _tilings(pieces: Pieces, problem: Problem) -> list[Tiling] | str:
    if pieces.grid is not None:
        if not _is_whole(pieces.grid, problem) and not _has_whole_lines(pieces.grid, problem):
            return "a part of a grid is not made of regular boxes"
        return list(_boxes(pieces, problem))
    if pieces.blocks is not None:
        if problem.q_offset or problem.q_len != problem.kv_len:
            return "a part of the blocks' queries or keys is not made of regular blocks"
        return list(_block_classes(pieces.blocks, problem.q_len))
    lanes = _lanes(pieces, problem)
    return lanes if isinstance(lanes, str) else list(_lines(lanes, pieces, problem))


def _reach(problem: Problem) -> int:
    """Farther than any key from any query; within 32 bits where positions are."""
    short = max(problem.q_offset + problem.q_len, problem.kv_len) < 2**30
    return 2**30 if short else 2 * MOST


def cases(mask: Mask) -> list[Mask]:
    """Conjunctions without common pairs whose union is the mask, fit for regular blocks where that is known.

    `window(4) | global_tokens(2)` is `window(4)`, the first two queries less the window, and the first two keys less both.
    """
    found = _cases(mask)
    return [mask] if len(found) > _MOST_CASES else [conjunction(case) for case in found]


def _cases(mask: Mask) -> list[tuple[Mask, ...]]:
    if isinstance(mask, And):
        return [tuple(itertools.chain(*combination)) for combination in itertools.product(*(_cases(part) for part in mask.masks))]
    if isinstance(mask, Or):
        # What comes later is cut by the negation of what comes first.
        parts = sorted(mask.masks, key=lambda part: not isinstance(part, _NEGATED))
        return [
            case
            for number, part in enumerate(parts)
            for case in _cases(And((*(_negated(before) for before in parts[:number]), part)))
        ]
    if isinstance(mask, (Prefix, GlobalTokens)):
        return _cases(mask.expanded())
    if isinstance(mask, Not) and isinstance(mask.mask, (And, Or, Prefix, GlobalTokens)):
        return _cases(_negated(mask.mask))
    return [(mask,)]


def _negated(mask: Mask) -> Mask:
    """The negation, with `~` before masks without parts alone."""
    if isinstance(mask, (Prefix, GlobalTokens)):
        return _negated(mask.expanded())
    if isinstance(mask, And):
        return Or(tuple(_negated(part) for part in mask.masks))
    if isinstance(mask, Or):
        return And(tuple(_negated(part) for part in mask.masks))
    return ~mask


def _refusal(reason: str) -> Refusal:
    return Refusal("strided", None, reason, "Use lowering='tiled' or 'auto'")


@dataclass(frozen=True)
class Pieces:
    """A conjunction, sorted by what each mask does to the cutting; `rest` is evaluated on the tiles.

    queries, keys: positions [start, stop) that the mask leaves, None where it says nothing.
    hidden: masks whose pairs it leaves out.
    in_parts: keys that all queries of a tile see are computed apart from keys that some of them see.
    """

    segments: int | None
    documents: DocumentLengths | None
    congruent: Congruent | None
    window: Window | None
    causal: bool
    grid: Neighborhood | None
    blocks: DilatedBlocks | None
    rest: tuple[Mask, ...]
    queries: Span = (None, None)
    keys: Span = (None, None)
    hidden: tuple[Causal | Window, ...] = ()
    in_parts: bool = False

    def by_band(self, reach: int) -> list[Pieces]:
        """Conjunctions without `hidden`, and without common pairs. reach: farther than any key from any query."""
        if not self.hidden:
            return [self]
        dilation = 1 if self.window is None else self.window.dilation
        bands = [(reach, 0 if self.causal else reach)]
        if self.window is not None:
            bands = [(min(left, self.window.left), min(right, self.window.right)) for left, right in bands]
        for mask in self.hidden:
            seen_left, seen_right = (reach, 0) if isinstance(mask, Causal) else (mask.left, mask.right)
            before = [(left, min(right, -seen_left - 1)) for left, right in bands]
            after = [(min(left, -seen_right - 1), right) for left, right in bands]
            bands = [(left, right) for left, right in before + after if left + right >= 0]
        windows = [Window(left, right, dilation) for left, right in bands]
        return [replace(self, causal=False, hidden=(), window=window, in_parts=True) for window in windows]

    @property
    def pairwise(self) -> bool:
        """Whether some mask has to be asked about every pair, anew for every tile."""
        return any(not isinstance(mask, Padding) for mask in self.rest)


def _anchors(masks: tuple[Mask, ...]) -> tuple[Span, Span]:
    """The positions of queries and of keys that masks of leading tokens leave."""
    hidden = [mask.mask for mask in masks if isinstance(mask, Not)]
    queries = [mask.count for mask in masks if isinstance(mask, (LeadingQueries, Prefix))]
    keys = [mask.count for mask in masks if isinstance(mask, (Sinks, Prefix))]
    hidden_queries = [mask.count for mask in hidden if isinstance(mask, LeadingQueries)]
    hidden_keys = [mask.count for mask in hidden if isinstance(mask, Sinks)]
    return (
        (max(hidden_queries, default=None), min(queries, default=None)),
        (max(hidden_keys, default=None), min(keys, default=None)),
    )


def _is_anchor(mask: Mask) -> bool:
    inner = mask.mask if isinstance(mask, Not) else mask
    return isinstance(inner, (LeadingQueries, Sinks)) or isinstance(mask, Prefix)


def _hidden(mask: Mask) -> Causal | Window | None:
    """The band whose pairs a mask leaves out; None where it is no such mask."""
    inner = mask.mask if isinstance(mask, Not) else None
    if isinstance(inner, Window):
        return inner if inner.dilation == 1 else None
    return inner if isinstance(inner, Causal) else None


def _sort(masks: tuple[Mask, ...]) -> Pieces | str:
    queries, keys = _anchors(masks)
    hidden = tuple(inner for mask in masks if (inner := _hidden(mask)) is not None)
    cut = [mask for mask in masks if _is_anchor(mask) or _hidden(mask) is not None]
    if cut and any(isinstance(mask, (Neighborhood, DilatedBlocks)) for mask in masks):
        return f"{cut[0]!r} cuts blocks that are regular on their own alone"
    masks = tuple(mask for mask in masks if mask not in cut)
    segments = [mask.length for mask in masks if isinstance(mask, Segments)]
    documents = [mask for mask in masks if isinstance(mask, DocumentLengths)]
    congruent = [mask for mask in masks if isinstance(mask, Congruent)]
    windows = [mask for mask in masks if isinstance(mask, Window)]
    grids = [mask for mask in masks if isinstance(mask, Neighborhood)]
    causal = any(isinstance(mask, Causal) for mask in masks)
    known = (Segments, DocumentLengths, Congruent, Window, Neighborhood, Causal, DilatedBlocks)
    rest = tuple(mask for mask in masks if not isinstance(mask, known))
    blocks = [mask for mask in masks if isinstance(mask, DilatedBlocks)]
    if blocks and (len(blocks) > 1 or len(masks) > 1):
        return f"{blocks[0]!r} forms regular blocks on its own alone"
    for mask in rest:
        if not mask.names:
            return f"{mask!r} is not made of regular blocks"
    if segments and any(length % min(segments) for length in segments):
        return "segments of lengths that do not divide each other do not form regular blocks"
    if len(congruent) > 1 or len(documents) > 1 or len(grids) > 1 or (documents and segments):
        return "more than one congruent, documents, neighborhood or kind of segments in one mask"
    if grids and (segments or documents or congruent or windows):
        # Still exact: the line masks are evaluated on the boxes.
        line = (Segments, DocumentLengths, Congruent, Window)
        rest += tuple(mask for mask in masks if isinstance(mask, line))
    if documents and len(documents[0].lengths) > _MOST_DOCUMENTS:
        return f"{len(documents[0].lengths)} documents are more blocks than {_MOST_DOCUMENTS}"
    window = None
    if windows:
        dilation = math.lcm(*(mask.dilation for mask in windows))
        window = Window(min(mask.left for mask in windows), min(mask.right for mask in windows), dilation)
    if causal and grids:
        rest += (Causal(),)
    return Pieces(
        min(segments) if segments else None,
        documents[0] if documents else None,
        congruent[0] if congruent else None,
        window,
        causal,
        grids[0] if grids else None,
        blocks[0] if blocks else None,
        rest,
        queries,
        keys,
        hidden,
    )


def _batch(
    queries: Lattice, keys: Lattice, full: bool, causal: bool, first: bool, pieces: Pieces, heads: HeadRange, kv_heads: HeadRange
) -> Batch:
    masks = pieces.rest
    if not full:
        masks += tuple(mask for mask in (pieces.window, pieces.grid) if mask is not None)
        masks += (Causal(),) if pieces.causal and pieces.grid is None else ()
    strides = [stride for count, stride in queries.tiles if count > 1]
    shared = all(not mask.per_call and _repeats(mask, strides) for mask in pieces.rest)
    return Batch(
        heads, kv_heads, queries, keys, (conjunction(masks),) if masks else (), causal=causal, shared=shared, first=first
    )


def _repeats(mask: Mask, strides: list[int]) -> bool:
    return not strides or (mask.period is not None and all(stride % mask.period == 0 for stride in strides))


# Lines --------------------------------------------------------------------------------------------------------------------------


def _lanes(pieces: Pieces, problem: Problem) -> list[Lane] | str:
    congruent, length = pieces.congruent, pieces.segments
    rate, offset, relative = 1, 0, False
    if congruent is not None:
        assert isinstance(congruent.offset, int)
        rate, offset = congruent.modulus, congruent.offset
        relative = congruent.within is not None and congruent.within % rate != 0
        if relative and congruent.within != length:
            return f"{congruent!r} starts anew where no segment does"
        if not relative and length is not None and length % rate:
            return f"{congruent!r} meets every segment of {length} at another residue"
    dilation = 1 if pieces.window is None else pieces.window.dilation // math.gcd(pieces.window.dilation, rate)
    lanes: list[Lane] = []
    for count, stride, start, q_span, k_span in _stretches(pieces, problem):
        first = start + (offset if relative else (offset - start) % rate)
        for residue in range(first, first + dilation * rate, rate):
            lane = _lane(count, stride, q_span, k_span, residue, rate * dilation, pieces)
            if lane is not None:
                lanes.append(lane)
    return lanes


def _lane(count: int, stride: int, q_span: range, k_span: range, residue: int, step: int, pieces: Pieces) -> Lane | None:
    q_first = q_span.start + (residue - q_span.start) % step
    k_first = k_span.start + (residue - k_span.start) % step
    right = 0 if pieces.causal else None if pieces.window is None else pieces.window.right // step
    if right is not None:
        # Queries that stand before the first key that any of them sees.
        q_first += max(0, (k_first - q_first) // step - right) * step
    q_len, k_len = len(range(q_first, q_span.stop, step)), len(range(k_first, k_span.stop, step))
    left = None if pieces.window is None else pieces.window.left // step
    if not q_len or not k_len or (left is not None and right is not None and left + right < 0):
        return None
    return Lane(count, stride, q_first, k_first, step, Band(q_len, k_len, (q_first - k_first) // step, left, right))


def _stretches(pieces: Pieces, problem: Problem) -> Iterator[tuple[int, int, int, range, range]]:
    """Stretches of tokens that see themselves alone.

    Of each: (how many alike, how far apart, the first one's start, its queries, its keys).
    """
    q_range, k_range = range(problem.q_offset, problem.q_offset + problem.q_len), range(problem.kv_len)
    q_range, k_range = _within(q_range, pieces.queries), _within(k_range, pieces.keys)
    if not q_range or not k_range:
        return
    if pieces.documents is not None:
        stops = list(itertools.accumulate(pieces.documents.lengths))
        for start, stop in zip([0, *stops], stops, strict=False):
            yield 1, 0, start, _meet(q_range, start, stop), _meet(k_range, start, stop)
        return
    length = pieces.segments
    if length is None:
        yield 1, 0, 0, q_range, k_range
        return
    clipped = {side // length for side in (q_range.start, q_range.stop - 1, k_range.start, k_range.stop)}
    segment, end = q_range.start // length, -(-q_range.stop // length)
    while segment < end:
        alike = 1 if segment in clipped else min([each for each in clipped if each > segment] + [end]) - segment
        start = segment * length
        whole = _meet(q_range, start, start + length), _meet(k_range, start, start + length)
        yield alike, length, start, *whole
        segment += alike


def _within(span: range, limits: Span) -> range:
    start, stop = limits
    return _meet(span, span.start if start is None else start, span.stop if stop is None else stop)


def _meet(span: range, start: int, stop: int) -> range:
    return range(max(span.start, start), min(span.stop, stop))


def _lines(lanes: list[Lane], pieces: Pieces, problem: Problem) -> Iterator[Tiling]:
    for lane in lanes:
        band = lane.band
        cutting = _asked_runs(band) if pieces.pairwise else _part_runs(band, problem) if pieces.in_parts else _runs(band, problem)
        for run in cutting:
            outer = ((lane.count, lane.stride),) if lane.count > 1 else ()
            tiles = (*outer, (run.count, run.stride * lane.step)) if run.count > 1 or not outer else outer
            queries = Lattice(lane.q_first + run.q_start * lane.step, tiles, ((run.q_rows, lane.step),))
            keys = Lattice(lane.k_first + run.k_start * lane.step, tiles, ((run.k_rows, lane.step),))
            yield queries, keys, run.full, run.causal, run.first


def _runs(band: Band, problem: Problem) -> list[Run]:
    last = band.shift + band.q_len - 1
    from_start = band.left is None or band.left >= last
    to_end = band.right is None or band.right >= band.k_len - 1 - band.shift
    if from_start and to_end:
        return cut(replace(band, left=None, right=None), min(band.q_len, rows_at_once(band.q_len)))
    if from_start and band.right == 0:
        return cut_causal(band)
    options = [cut(band, tile) for tile in _window_tiles(band)]
    return min(options, key=lambda runs: sum(_time(run, problem) for run in runs))


def _part_runs(band: Band, problem: Problem) -> list[Run]:
    """Tiles of which only what some queries see and some do not needs a bias, and that is small."""
    options = [[part for run in cut(band, tile) for part in whole_parts(band, run)] for tile in _window_tiles(band)]
    masked = [max((run.q_rows * run.k_rows for run in runs if not run.full), default=0) for runs in options]
    most = max(_MOST_MASKED, min(masked))
    fitting = [runs for runs, entries in zip(options, masked, strict=True) if entries <= most]
    return min(fitting, key=lambda runs: sum(_time(run, problem) for run in runs))


def _window_tiles(band: Band) -> list[int]:
    """Queries of a tile that are worth weighing: those that leave few tiles at the ends of the keys alone."""
    largest = min(band.q_len, rows_at_once(band.q_len))
    doubled = itertools.takewhile(lambda tile: tile < largest, (MOST_ROWS << power for power in itertools.count()))
    fitting = {tile for tile in (*_WINDOW_TILES, *doubled) if tile <= band.q_len and alone(band, tile) <= _MOST_ALONE}
    return sorted(fitting | {largest})


def _asked_runs(band: Band) -> list[Run]:
    """Tiles small enough that a bias of their own stays small beside the tensors."""
    runs = []
    for run in cut(band, min(_ASKED_ROWS, band.q_len)):
        for start in range(0, run.k_rows, _ASKED_COLUMNS):
            columns = min(_ASKED_COLUMNS, run.k_rows - start)
            runs.append(replace(run, k_start=run.k_start + start, k_rows=columns, first=start == 0))
    return runs


def _time(run: Run, problem: Problem) -> float:
    flops = run.count * run.q_rows * run.k_rows * 2 * (problem.head_dim + problem.value_dim)
    return costs.seconds(flops / costs.efficiency(problem, run.q_rows, run.k_rows), 0, 1)


def _block_classes(mask: DilatedBlocks, tokens: int) -> Iterator[Tiling]:
    """Blocks a multiple of `stride` blocks apart see each other.

    Per class of blocks one dense problem, classes alike together.
    """
    block, stride = mask.block, mask.stride
    whole, short = divmod(tokens, block)
    fewest, longer = divmod(whole, stride)  # the first `longer` classes have one block more than the others
    for classes, blocks in ((range(longer), fewest + 1), (range(longer, stride), fewest)):
        if classes and blocks:
            tiles = ((len(classes), block),)
            keys = Lattice(classes.start * block, tiles, ((blocks, stride * block), (block, 1)))
            at_once = max(1, rows_at_once(blocks * block) // block)
            for at in range(0, blocks, at_once):
                rows = ((min(at_once, blocks - at), stride * block), (block, 1))
                yield Lattice((classes.start + at * stride) * block, tiles, rows), keys, True, False, True
    if short:
        tail = Lattice(whole * block, ((1, 0),), ((short, 1),))
        if fewest:
            before = Lattice(longer * block, ((1, 0),), ((fewest, stride * block), (block, 1)))
            yield before, tail, True, False, False
            yield tail, before, True, False, True
        yield tail, tail, True, False, not fewest


# Grids --------------------------------------------------------------------------------------------------------------------------


def _boxes(pieces: Pieces, problem: Problem) -> Iterator[Tiling]:
    grid = pieces.grid
    assert grid is not None
    lanes = [_axis_lanes(axis) for axis in grid.axes]
    if not _is_whole(grid, problem):
        line, ((_, _, band),) = strides_of(grid.grid)[0], lanes[0]
        part = replace(band, q_len=problem.q_len // line, k_len=problem.kv_len // line, shift=problem.q_offset // line)
        lanes[0] = [(0, 1, part)]
    chosen = _best_boxes(
        [[[cut(band, tile) for _, _, band in axis] for tile in _box_tiles(axis[0][2].q_len)] for axis in lanes], problem
    )
    strides = strides_of(grid.grid)
    for corner in itertools.product(*(range(len(axis)) for axis in lanes)):
        places = [lanes[axis][lane] for axis, lane in enumerate(corner)]
        units = [step * stride for (_, step, _), stride in zip(places, strides, strict=True)]
        origin = sum(first * stride for (first, _, _), stride in zip(places, strides, strict=True))
        for runs in itertools.product(*(chosen[axis][lane] for axis, lane in enumerate(corner))):
            along = list(zip(runs, units, strict=True))
            tiles = tuple((run.count, run.stride * unit) for run, unit in along)
            q_origin = problem.q_offset + origin
            queries = Lattice(
                q_origin + sum(run.q_start * unit for run, unit in along), tiles, tuple((run.q_rows, unit) for run, unit in along)
            )
            keys = Lattice(
                origin + sum(run.k_start * unit for run, unit in along), tiles, tuple((run.k_rows, unit) for run, unit in along)
            )
            yield queries, keys, all(run.full for run in runs), False, True


def _is_whole(grid: Neighborhood, problem: Problem) -> bool:
    return problem.q_offset == 0 and problem.q_len == problem.kv_len == math.prod(grid.grid)


def _has_whole_lines(grid: Neighborhood, problem: Problem) -> bool:
    """Whether queries and keys are whole lines of the grid, along which the neighbourhood is a plain band."""
    line, axis = strides_of(grid.grid)[0], grid.axes[0]
    whole = not any(each % line for each in (problem.q_offset, problem.q_len, problem.kv_len))
    return whole and axis.dilation == 1 and (axis.causal or not axis.shift)


def _axis_lanes(axis: Axis) -> list[tuple[int, int, Band]]:
    """(first coordinate, step, band) of each residue class of a dilated axis."""
    lanes = []
    for first in range(min(axis.dilation, axis.size)):
        size = len(range(first, axis.size, axis.dilation))
        clamped = axis.shift and not axis.causal
        lanes.append((first, axis.dilation, Band(size, size, 0, axis.radius, 0 if axis.causal else axis.radius, clamped)))
    return lanes


def _box_tiles(size: int) -> list[int]:
    """Tile sizes, and those near to them that cut an axis evenly."""
    tiles = {tile for tile in _BOX_TILES if tile < size}
    return sorted(tiles | {-(-size // -(-size // tile)) for tile in tiles} | ({size} if size <= 256 else set()))


def _best_boxes(options: list[list[list[list[Run]]]], problem: Problem) -> list[list[list[Run]]]:
    """Per axis the runs of its lanes, for the box shape that computes and copies least. options[axis][tile][lane] are runs."""
    best, least = None, math.inf
    for pick in itertools.product(*options):
        runs = [lanes[0] for lanes in pick]
        rows, columns = (math.prod(max(getattr(run, name) for run in axis) for axis in runs) for name in ("q_rows", "k_rows"))
        if rows > MOST_ROWS:
            continue
        pairs = math.prod(sum(run.count * run.q_rows * run.k_rows for run in axis) for axis in runs)
        calls = math.prod(len(axis) for axis in runs)
        width = problem.head_dim + problem.value_dim
        moved = _moved_tokens(runs) * 2 * width * problem.itemsize
        time = costs.seconds(pairs * 2 * width / costs.efficiency(problem, rows, columns), moved, calls)
        if time < least:
            best, least = list(pick), time
    assert best is not None
    return best


def _moved_tokens(runs: list[list[Run]]) -> int:
    """Tokens copied for the boxes of these runs: their queries, and their keys, in strips along the first axis."""
    queries = math.prod(sum(run.count * run.q_rows for run in axis) for axis in runs)
    strips = sum((run.count - 1) * run.stride + run.k_rows for run in runs[0])
    return queries + strips * math.prod(sum(run.count * run.k_rows for run in axis) for axis in runs[1:])
