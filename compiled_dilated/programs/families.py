"""Published patterns as programs: LongNet, windows, neighborhoods and BigBird."""

from __future__ import annotations

from collections.abc import Sequence

from .. import arguments, masks
from ..masks import Mask
from ..orders import hilbert
from .core import Branch, Program, as_program

HEADS = ("all", "split")


def longnet(
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    causal: bool = False,
    offsets: str = "cyclic",
    heads: str = "all",
) -> Program:
    """LongNet's dilated attention (arXiv 2307.02486).

    Branch i links tokens in one segment of segment_lengths[i] whose position within it, modulo
    dilation_rates[i], equals the head's offset.

    segment_lengths: in tokens, one per branch.
    dilation_rates: one per branch.
    offsets: "cyclic", head % rate (the paper), or "grouped", head // ceil(heads / rate) (its
        authors' code).
    heads: "all" heads in every branch, or "split": heads distributed over the branches, with offset
        i % rate in branch i.
    """
    lengths = arguments.integers("segment_lengths", segment_lengths, 1)
    rates = arguments.integers("dilation_rates", dilation_rates, 1)
    if len(lengths) != len(rates):
        raise ValueError(
            "segment_lengths and dilation_rates must be of one length; "
            f"got {len(lengths)} and {len(rates)}: {lengths} and {rates}"
        )
    arguments.choice("offsets", offsets, masks.OFFSET_RULES)
    arguments.choice("heads", heads, HEADS)
    arguments.flag("causal", causal)
    branches = []
    for i, (length, rate) in enumerate(zip(lengths, rates, strict=True)):
        offset: int | str = offsets
        share: str | None = None
        # Heads of a split branch share its offset.
        if heads == "split":
            offset, share = i % rate, f"{i}/{len(lengths)}"
        branches.append(Branch(_dilated_segments(length, rate, offset, causal), share))
    return Program(tuple(branches))


def _dilated_segments(length: int, rate: int, offset: int | str, causal: bool) -> Mask:
    """The mask of one LongNet branch."""
    parts: tuple[Mask, ...] = (masks.segments(length),)
    # A rate of 1 has one residue class, which hides nothing.
    if rate > 1:
        parts += (masks.congruent(rate, offset, period=length),)
    if causal:
        parts += (masks.causal(),)
    return masks.conjunction(parts)


def local_window(
    left: int, right: int | None = None, causal: bool = False, dilation: int = 1
) -> Program:
    """A sliding window, every `dilation`-th key (Longformer, arXiv 2004.05150).

    left, right: tokens before and after the query. `right` defaults to `left`, to 0 if causal.
    """
    # A causal window ends at the query.
    if arguments.flag("causal", causal):
        if right not in (None, 0):
            raise ValueError(
                f"a causal window has nothing to its right; got right={right!r}. "
                "Leave right out, or causal=False"
            )
        right = 0
    return as_program(masks.window(left, right, dilation))


def hilbert_window(
    grid: Sequence[int], radius: int | Sequence[int], edges: str = "cut", offset: int | None = None
) -> Program:
    """A neighborhood on a 2-D or 3-D grid, computed in Hilbert order.

    grid: sizes; tokens in row-major order.
    radius: in cells, one number or one per axis.
    offset: None if the sequence is the grid, else the position of the grid's first token, as in
        `masks.neighborhood`. Other tokens see nothing unless another mask is joined:
        Program((Branch(masks.neighborhood((64, 64), 7, offset=1) | masks.global_tokens(1),
        order=orders.hilbert(64, 64, offset=1)),)).
    """
    shape = arguments.integers("grid", grid, 1)
    if len(shape) not in (2, 3):
        raise ValueError(f"grid must have 2 or 3 axes; got {shape!r}")
    mask = masks.neighborhood(shape, radius, edges=edges, offset=offset)
    # In Hilbert order a tile is a box of cells, which sees few other boxes.
    return Program((Branch(mask, order=hilbert(*shape, offset=offset)),))


def big_bird(
    window: int, global_tokens: int, random: int, block: int, tokens: int, seed: int = 0
) -> Program:
    """BigBird's block attention (arXiv 2007.14062): window, global and random blocks.

    window: tokens visible on each side of a block; a multiple of `block`.
    global_tokens: number of first tokens that see every key and that every query sees; a multiple
        of `block`.
    random: key blocks per query block, drawn from all blocks by `seed`; a block inside the window,
        or of global tokens, adds nothing.
    block: tokens per block.
    tokens: the length that random blocks are drawn for.

    >>> big_bird(64, 128, 3, 64, tokens=4096)
    Program((Branch(block_window(64, 1) | global_tokens(128)
        | random_blocks(64, 3, tokens=4096, seed=0)),))
    """
    block = arguments.integer("block", block, 1)
    # Complete blocks, so that every tile of `block` tokens is either full or empty.
    for name, value in (("window", window), ("global_tokens", global_tokens)):
        if arguments.integer(name, value, 0) % block:
            raise ValueError(
                f"{name} must be a multiple of the block of {block} tokens; got {value}. "
                "A window of single tokens is masks.window(...) | masks.global_tokens(...) "
                "| masks.random_blocks(...)"
            )
    random_blocks = masks.random_blocks(block, arguments.integer("random", random, 0), tokens, seed)
    leading, band = masks.global_tokens(global_tokens), masks.block_window(block, window // block)
    return as_program(band | leading | random_blocks)
