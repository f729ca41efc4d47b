"""Random masks, orders, programs and regions for hypothesis; dense masks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from compiled_dilated import Branch, Program, masks, orders
from compiled_dilated.masks import Mask
from compiled_dilated.masks.neighborhoods import Neighborhood
from compiled_dilated.orders import Order
from compiled_dilated.regions import Regions

Dense = npt.NDArray[np.bool_]


def dense(
    mask: Mask, q_len: int, kv_len: int, q_offset: int = 0, head: int = 0, data: Any = None
) -> Dense:
    """All pairs of the mask, (q_len, kv_len), for batch entry 0."""
    q, kv = np.arange(q_len)[:, None] + q_offset, np.arange(kv_len)[None, :]
    return np.broadcast_to(mask.allows(np.int64(0), np.int64(head), q, kv, data), (q_len, kv_len))


def every_third(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return (q + kv) % 3 == 0


def by_head(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return (q + kv) % 3 == h % 3


@st.composite
def grids(draw: st.DrawFn, most: int = 64) -> tuple[int, ...]:
    """Sizes of a grid of 2 or 3 axes.

    most: cells, at most.
    """
    rows = draw(st.integers(1, 8))
    columns = draw(st.integers(1, max(1, most // rows // 2)))
    depth = draw(st.integers(1, max(1, min(5, most // rows // columns))))
    return (rows, columns) if draw(st.booleans()) else (depth, rows, columns)


def rates() -> st.SearchStrategy[int]:
    """Dilation rates: small, and beyond the classes that a tile visits."""
    return st.integers(1, 7) | st.sampled_from((49, 64, 97, 100))


_LINE_MASKS = (
    *("causal", "window", "segments", "congruent", "documents", "sinks", "prefix", "global"),
    *("tiles", "full", "block window", "global positions", "random blocks", "placed grid"),
)


@st.composite
def line_masks(draw: st.DrawFn, most: int = 64) -> Mask:
    """A mask of one kind, for any length.

    most: the largest position, length or count.
    """
    number = st.integers(0, most)
    kind = draw(st.sampled_from(_LINE_MASKS))
    if kind == "window":
        return masks.window(draw(number), draw(number), draw(rates()))
    if kind == "segments":
        return masks.segments(draw(st.integers(1, most)))
    if kind == "congruent":
        modulus = draw(rates())
        offset, period = st.integers(0, modulus - 1), st.none() | st.integers(1, most)
        return masks.congruent(modulus, draw(offset), draw(period))
    if kind == "documents":
        lengths = st.lists(st.integers(0, most // 2), min_size=1, max_size=5)
        return masks.documents(lengths=tuple(draw(lengths)))
    if kind == "tiles":
        pairs = draw(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12))
        block, columns = draw(st.integers(1, 16)), draw(st.none() | st.integers(6, 8))
        return masks.tiles(pairs, block=block, columns=columns)
    if kind == "block window":
        reach = st.integers(0, 3)
        return masks.block_window(draw(st.integers(1, 16)), draw(reach), draw(reach))
    if kind == "global positions":
        return masks.global_tokens(positions=draw(st.lists(number, max_size=8)))
    if kind == "random blocks":
        block = draw(st.integers(1, 16))
        return masks.random_blocks(block, draw(st.integers(0, most // block)), most, draw(number))
    if kind == "placed grid":
        return placed(draw(grid_masks(draw(grids(most)))), draw(number))
    leading = {"sinks": masks.sinks, "prefix": masks.prefix, "global": masks.global_tokens}
    if kind in leading:
        return leading[kind](draw(number))
    return masks.causal() if kind == "causal" else masks.full()


@st.composite
def grid_masks(draw: st.DrawFn, grid: tuple[int, ...]) -> Mask:
    """A neighborhood on a grid."""
    radius = draw(st.tuples(*[st.integers(0, 4)] * len(grid)))
    dilation = draw(st.tuples(*[st.integers(1, 3)] * len(grid)))
    causal = draw(st.tuples(*[st.booleans()] * len(grid)))
    edges = draw(st.sampled_from(("cut", "shift")))
    return masks.neighborhood(grid, radius, dilation, causal, edges)


def placed(mask: Mask, offset: int) -> Mask:
    """The neighborhood with its grid at an offset."""
    assert isinstance(mask, Neighborhood)
    shape = mask.grid, mask.radius, mask.dilation
    return masks.neighborhood(*shape, mask.causal, mask.edges, offset)


def expressions(leaves: st.SearchStrategy[Mask]) -> st.SearchStrategy[Mask]:
    """Masks joined by &, | and ~."""
    return st.recursive(
        leaves,
        lambda parts: st.one_of(
            st.builds(lambda a, b: a & b, parts, parts),
            st.builds(lambda a, b: a | b, parts, parts),
            st.builds(lambda a: ~a, parts),
        ),
        max_leaves=4,
    )


def mods() -> st.SearchStrategy[Mask]:
    """Masks of functions."""
    within = st.none() | st.builds(masks.window, st.integers(0, 20))
    return st.builds(masks.from_mod, st.sampled_from((every_third, by_head)), within)


@st.composite
def masks_and_orders(draw: st.DrawFn, most: int = 64) -> tuple[Mask, Order, int]:
    """A mask, an order, and a length that both accept.

    There may be a grid, of all tokens or with other tokens before and after it.
    """
    grid = draw(grids(most))
    on_grid = draw(st.sampled_from(("no", "all", "within")))
    n, offset = draw(st.integers(1, most)), None
    leaves = [line_masks(most), mods()]
    if on_grid == "all":
        n = math.prod(grid)
        leaves.append(grid_masks(grid))
    elif on_grid == "within":
        offset, after = draw(st.integers(0, 9)), draw(st.integers(0, 9))
        n = offset + math.prod(grid) + after
        leaves.append(st.builds(placed, grid_masks(grid), st.just(offset)))
    residues = st.builds(orders.residue, st.integers(1, 6), st.none() | st.integers(1, most))
    kinds = [st.just(orders.identity()), residues]
    if on_grid != "no":
        kinds.append(st.just(orders.hilbert(*grid, offset=offset)))
    order = draw(st.one_of(*kinds))
    return draw(expressions(st.one_of(*leaves))), order, n


def line_expressions(most: int = 64) -> st.SearchStrategy[Mask]:
    """Expressions of masks for any length, functions among them."""
    return expressions(line_masks(most) | mods())


@st.composite
def programs(draw: st.DrawFn, most: int = 150) -> tuple[Program, int]:
    """A program of 3 heads, and a length.

    One to three branches, with a mask, heads and an order each.
    """
    mask, order, n = draw(masks_and_orders(most))
    heads = st.sampled_from([None, (0, 2), (1, 3), (2, 3), (1, 1), "0/2", "1/2"])
    residues = st.builds(orders.residue, st.integers(1, 6), st.none() | st.integers(1, 60))
    branches = [Branch(mask, draw(heads), order)]
    for _ in range(draw(st.integers(0, 2))):
        order = draw(residues | st.just(orders.identity()))
        branches.append(Branch(draw(line_expressions(most)), draw(heads), order))
    return Program(tuple(branches)), n


@st.composite
def regions(draw: st.DrawFn, n: int, count: int, grid: tuple[int, ...] | None = None) -> Regions:
    """`count` regions within n positions.

    They are runs, strided runs, or strided boxes of a grid.
    """
    if grid is not None and draw(st.booleans()):
        strides = [math.prod(grid[axis + 1 :]) for axis in range(len(grid))]
        base, extent, stride = [], [], []
        for _ in range(count):
            low = [draw(st.integers(0, size - 1)) for size in grid]
            gaps = [draw(st.sampled_from((1, 1, 2, 3))) for _ in grid]
            base.append(sum(at * unit for at, unit in zip(low, strides, strict=True)))
            # As many cells as fit between the low corner and the end of each axis, at most.
            cells = []
            for size, at, gap in zip(grid, low, gaps, strict=True):
                cells.append(draw(st.integers(1, (size - 1 - at) // gap + 1)))
            extent.append(cells)
            stride.append([gap * unit for gap, unit in zip(gaps, strides, strict=True)])
        return Regions(np.array(base), np.array(extent), np.array(stride))
    starts = [draw(st.integers(0, n - 1)) for _ in range(count)]
    steps = [draw(st.sampled_from((1, 1, 2, 3, 5, 6))) for _ in range(count)]
    counts = []
    for start, step in zip(starts, steps, strict=True):
        counts.append(draw(st.integers(1, (n - 1 - start) // step + 1)))
    return Regions.strided(starts, counts, steps)
