"""Programs: branches of (heads, mask, order) merged by log-sum-exp."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NoReturn, TypeVar

from . import arguments, masks
from .masks import Mask
from .masks.functions import functions_of
from .mods import MaskMod
from .orders import Order, hilbert, identity

HEADS = ("all", "split")
KINDS = ("local", "global_local", "dilated")


class _NoMask:
    """Rejects `&`, `|` and `~`, which join only masks."""

    # Also part of the error of a mask's operator with such an operand.
    how_to_join = (
        "Join masks before a program is made of them, as masks.neighborhood((64, 64), 7) | masks.sinks(4); "
        "an order is given by Program((Branch(mask, order=orders.hilbert(64, 64)),))"
    )

    def _refuse(self, other: object = None) -> NoReturn:
        raise TypeError(
            f"`&`, `|` and `~` join masks; got {type(self).__name__} {self}. {self.how_to_join}",
        )

    __and__ = __or__ = __rand__ = __ror__ = __invert__ = _refuse


@dataclass(frozen=True, repr=False)
class Branch(_NoMask):
    """Some heads, their mask, and the order of execution, which never changes a result.

    heads: None for all, (start, stop), or "i/k": the i-th of k shares of the heads. A share has
        heads // k heads; the first heads % k shares have one more.
    """

    mask: Mask
    heads: tuple[int, int] | str | None = None
    order: Order = identity()

    def __post_init__(self) -> None:
        if not isinstance(self.mask, Mask):
            raise TypeError(
                f"a branch needs a mask; got {type(self.mask).__name__} {self.mask}. Use compiled_dilated.masks",
            )
        if not isinstance(self.order, Order):
            raise TypeError(
                f"order must be an order; got {type(self.order).__name__} {self.order!r}. Use compiled_dilated.orders"
            )
        share = isinstance(self.heads, str) and re.fullmatch(
            r"([0-9]{1,9})/([0-9]{1,9})", self.heads
        )
        span = (
            isinstance(self.heads, tuple)
            and len(self.heads) == 2
            and all(type(head) is int for head in self.heads)
        )
        if not (self.heads is None or span or (share and int(share[1]) < int(share[2]))):
            raise ValueError(
                f"heads must be None, (start, stop) or a share 'i/k' with i < k; got {self.heads!r}",
            )

    def head_range(self, heads: int) -> range:
        """Query heads of this branch, out of `heads`."""
        if self.heads is None:
            return range(heads)
        if isinstance(self.heads, tuple):
            start, stop = self.heads
            if not 0 <= start <= stop <= heads:
                raise ValueError(
                    f"the branch {self} names heads {start} to {stop}; the query has {heads}",
                )
            return range(start, stop)
        share, shares = map(int, self.heads.split("/"))
        size, extra = heads // shares, heads % shares
        start = share * size + min(share, extra)
        return range(start, start + size + (share < extra))

    def mask_at(self, head: int, heads: int) -> Mask:
        """Mask of one query head, out of `heads`."""
        return self.mask.at_head(head, heads)

    def __repr__(self) -> str:
        return self._written(repr)

    def __str__(self) -> str:
        return self._written(str)

    def _written(self, write: Callable[[Mask], str]) -> str:
        heads = "" if self.heads is None else f", heads={self.heads!r}"
        order = "" if self.order == identity() else f", order={self.order!r}"
        return f"Branch({write(self.mask)}{heads}{order})"


@dataclass(frozen=True, repr=False)
class Program(_NoMask):
    """Branches joined by one softmax; a key that two branches link counts twice.

    Hashable; `repr` is the code that creates it.
    """

    branches: tuple[Branch, ...]

    def __post_init__(self) -> None:
        is_tuple = isinstance(self.branches, tuple) and len(self.branches) > 0
        if not is_tuple or not all(isinstance(branch, Branch) for branch in self.branches):
            raise TypeError(
                f"a program needs a non-empty tuple of Branch; got {_shown(self.branches)}. Write Program((Branch(mask),))",
            )

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the data tensors that the program reads, sorted."""
        return tuple(sorted({name for branch in self.branches for name in branch.mask.names}))

    def check(self, q_len: int, kv_len: int, q_offset: int = 0) -> None:
        """Raise ValueError if a mask or an order is undefined for these lengths."""
        for branch in self.branches:
            branch.mask.check(range(q_offset, q_offset + q_len), kv_len)
            if branch.order != identity():
                if q_len != kv_len or q_offset:
                    raise ValueError(
                        f"{branch.order!r} orders one sequence; got {q_len} queries at offset {q_offset} and {kv_len} keys. "
                        "Cross attention and decoding need order=identity()"
                    )
                branch.order.check(kv_len)

    def map(self, change: Callable[[Mask], Mask]) -> Program:
        """The program with `change` applied to its masks."""
        return Program(tuple(replace(branch, mask=change(branch.mask)) for branch in self.branches))

    @cached_property
    def _hash(self) -> int:
        return hash(self.branches)

    def __hash__(self) -> int:
        # Cached: a mask may list thousands of numbers, and every call looks up its plan.
        return self._hash

    def __reduce__(self) -> tuple[Any, ...]:
        return Program, (self.branches,)  # without the hash, which differs between processes

    def __repr__(self) -> str:
        return f"Program(({', '.join(map(repr, self.branches))},))"

    def __str__(self) -> str:
        return f"Program(({', '.join(map(str, self.branches))},))"


Builder = TypeVar("Builder", bound=Callable[..., Program])
BUILDERS: dict[str, Callable[..., Program]] = {}


def builder(build: Builder) -> Builder:
    """Register a function by name, so that a `PerLength` of it can be written as text."""
    BUILDERS[build.__name__] = build
    return build


@dataclass(frozen=True, repr=False)
class PerLength(_NoMask):
    """A program that depends on the number of tokens: `build(*settings, tokens)`.

    build: a function marked with `builder`.
    names: data tensors that it reads, at every length.
    """

    build: Callable[..., Program]
    settings: tuple[Any, ...]
    names: tuple[str, ...] = ()

    def at(self, tokens: int) -> Program:
        """The program for `tokens` tokens."""
        return self.build(*self.settings, tokens)

    def map(self, change: Callable[[Mask], Mask]) -> PerLength:
        """The `PerLength` with `change` applied to the masks of programs among its settings."""
        return replace(self, settings=tuple(_mapped(setting, change) for setting in self.settings))

    def __repr__(self) -> str:
        return f"per_length({self.build.__name__!r}, {self.settings!r}, {self.names!r})"

    def __str__(self) -> str:
        settings = ", ".join(
            str(setting) if isinstance(setting, (Program, PerLength)) else repr(setting)
            for setting in self.settings
        )
        return f"per_length({self.build.__name__!r}, ({settings}), {self.names!r})"


def per_length(build: str, settings: tuple[Any, ...], names: tuple[str, ...]) -> PerLength:
    """The `PerLength` of a registered builder."""
    return PerLength(BUILDERS[arguments.choice("build", build, tuple(BUILDERS))], settings, names)


def _shown(branches: object) -> str:
    """What came instead of branches, their masks by `str`."""
    return (
        f"({', '.join(map(str, branches))},)"
        if isinstance(branches, tuple) and branches
        else repr(branches)
    )


def _mapped(setting: Any, change: Callable[[Mask], Mask]) -> Any:
    if isinstance(setting, (Program, PerLength)):
        return setting.map(change)
    return setting


def mask_mods_of(program: Program | PerLength) -> tuple[MaskMod, ...]:
    """Functions of the program's `from_mod` masks, in the order of tracing."""
    return tuple(function for mask in masks_of(program) for function in functions_of(mask))


def query_names_of(program: Program | PerLength) -> tuple[str, ...]:
    """Data tensors that are read at query positions too."""
    return tuple({name for mask in masks_of(program) for name in mask.query_names})


def check_data(program: Program | PerLength, data: Mapping[str, Any]) -> None:
    """Raise TypeError if a data tensor has the wrong dtype."""
    for mask in masks_of(program):
        mask.check_data(data)


def masks_of(program: Program | PerLength) -> tuple[Mask, ...]:
    """Masks of the branches in order; for a `PerLength`, those of programs in its settings."""
    if isinstance(program, Program):
        return tuple(branch.mask for branch in program.branches)
    inner = (setting for setting in program.settings if isinstance(setting, (Program, PerLength)))
    return tuple(mask for setting in inner for mask in masks_of(setting))


def as_program(value: Program | Mask) -> Program:
    """A program; a bare mask becomes a program of one branch."""
    if isinstance(value, Program):
        return value
    if isinstance(value, Mask):
        return Program((Branch(value),))
    raise TypeError(
        f"expected a Program or a mask; got {type(value).__name__}. "
        "Build one with compiled_dilated.masks, longnet(...), local_window(...) or Program((Branch(mask),))"
    )


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
    offsets: "cyclic", head % rate (the paper), or "grouped", head // ceil(heads / rate) (its authors'
        code).
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
    branches = []
    for i, (length, rate) in enumerate(zip(lengths, rates, strict=True)):
        parts: tuple[Mask, ...] = (masks.segments(length),)
        if rate > 1:
            parts += (
                masks.congruent(
                    rate,
                    i % rate if heads == "split" else offsets,
                    period=length,
                ),
            )
        if arguments.flag("causal", causal):
            parts += (masks.causal(),)
        branches.append(
            Branch(masks.conjunction(parts), f"{i}/{len(lengths)}" if heads == "split" else None),
        )
    return Program(tuple(branches))


def local_window(
    left: int,
    right: int | None = None,
    causal: bool = False,
    dilation: int = 1,
) -> Program:
    """A sliding window, every `dilation`-th key (Longformer, arXiv 2004.05150).

    left, right: tokens before and after the query. `right` defaults to `left`, to 0 if causal.
    """
    if arguments.flag("causal", causal):
        if right not in (None, 0):
            raise ValueError(
                f"a causal window has nothing to its right; got right={right!r}. Leave right out, or causal=False",
            )
        right = 0
    return as_program(masks.window(left, right, dilation))


def hilbert_window(
    grid: Sequence[int],
    radius: int | Sequence[int],
    edges: str = "cut",
    offset: int | None = None,
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
    return Program((Branch(mask, order=hilbert(*shape, offset=offset)),))


def big_bird(
    window: int,
    global_tokens: int,
    random: int,
    block: int,
    tokens: int,
    seed: int = 0,
) -> Program:
    """BigBird's block attention (arXiv 2007.14062): window, global and random blocks.

    window: tokens visible on each side of a block; a multiple of `block`.
    global_tokens: the first tokens, visible to all, and they see all; a multiple of `block`.
    random: key blocks per query block, drawn from all blocks by `seed`; one that falls into the window
        or on a global token adds nothing.
    block: tokens per block.
    tokens: the length that random blocks are drawn for.

    >>> big_bird(64, 128, 3, 64, tokens=4096)
    Program((Branch(block_window(64, 1) | global_tokens(128) | random_blocks(64, 3, tokens=4096, seed=0)),))
    """
    block = arguments.integer("block", block, 1)
    for name, value in (("window", window), ("global_tokens", global_tokens)):
        if arguments.integer(name, value, 0) % block:
            raise ValueError(
                f"{name} must be a multiple of the block of {block} tokens; got {value}. "
                "A window of single tokens is masks.window(...) | masks.global_tokens(...) | masks.random_blocks(...)"
            )
    random_blocks = masks.random_blocks(block, arguments.integer("random", random, 0), tokens, seed)
    return as_program(
        masks.block_window(block, window // block)
        | masks.global_tokens(global_tokens)
        | random_blocks,
    )


def block_sparse(
    density: float,
    kind: str = "local",
    block: int = 64,
    tokens: int | None = None,
    tiles: Sequence[tuple[int, int]] | None = None,
    causal: bool = False,
) -> Program:
    """A mask that keeps the share `density` of all pairs: "0.9 sparse" is density 0.1.

    density: share of the pairs, before `causal`; met to within one token of window.
    kind: "local": a window; "global_local": the first `block` tokens are global, and a window keeps the
        other pairs; "dilated": every (1 / density)-th block; "tiles": the listed `tiles`.
    block: tokens per block or tile.
    tokens: the length that the share refers to; required for all kinds except "dilated".
    tiles: (query tile, key tile) pairs.

    Raises ValueError if the share cannot be met: a density outside (0, 1], or tiles of another
    density.
    """
    if isinstance(density, bool) or not isinstance(density, (int, float)):
        raise TypeError(
            f"density must be a number in (0, 1]; got {type(density).__name__} {density!r}",
        )
    if not 0 < density <= 1:
        raise ValueError(
            f"density must be in (0, 1], the share of pairs kept; got {density!r}. A sparsity of 0.9 is density 0.1",
        )
    arguments.choice("kind", kind, (*KINDS, "tiles"))
    block = arguments.integer("block", block, 1)
    if (tiles is not None) != (kind == "tiles"):
        raise ValueError(
            f"tiles are for kind='tiles', which needs them; got kind={kind!r}, tiles={tiles!r}",
        )
    if kind == "dilated":
        mask = _dilated(density, block)
    else:
        if tokens is None:
            raise ValueError(
                f"kind={kind!r} keeps a share of N x N pairs; say how many: block_sparse({density}, {kind!r}, tokens=N)"
            )
        tokens = arguments.integer("tokens", tokens, 1)
        if kind == "tiles":
            mask = masks.tiles(tiles or (), block)
            _check_tile_density(mask, density, tokens)
        elif kind == "local":
            mask = masks.window(_window_for(density * tokens**2, tokens))
        else:
            mask = _global_local(density, min(block, tokens), tokens)
    if arguments.flag("causal", causal):
        mask = masks.conjunction((mask, masks.causal()))
    return as_program(mask)


def _dilated(density: float, block: int) -> Mask:
    """Every n-th block, for a density of 1 / n."""
    if density < 1 / arguments.MOST:
        raise ValueError(f"density must be at least 2**-60 for kind='dilated'; got {density!r}")
    stride = round(1 / density)
    if abs(1 / stride - density) > 0.01 * density:
        near = sorted({1 / max(1, math.floor(1 / density)), 1 / math.ceil(1 / density)})
        raise ValueError(
            f"kind='dilated' keeps one block in a whole number: density {near[0]:.4g} or {near[-1]:.4g}; got {density!r}"
        )
    return masks.dilated_blocks(block, stride)


def _global_local(density: float, count: int, tokens: int) -> Mask:
    """`count` global tokens, and a window over the others that meets the density."""
    rest = density * tokens**2 - (2 * count * tokens - count**2)
    if rest < tokens - count:
        raise ValueError(
            f"{count} global tokens and the diagonal alone keep more than "
            f"density {density!r} of {tokens} tokens; take a smaller block or kind='local'"
        )
    return masks.global_tokens(count) | masks.window(_window_for(rest, tokens - count))


def _window_for(pairs: float, tokens: int) -> int:
    """The window w whose tokens + 2 w tokens - w (w + 1) pairs are nearest to `pairs`."""
    half = tokens - 0.5
    root = half - math.sqrt(max(half**2 - max(pairs - tokens, 0), 0))
    return max(min(round(root), tokens - 1), 0)


def _check_tile_density(mask: Mask, density: float, tokens: int) -> None:
    assert isinstance(mask, masks.Tiles)
    visible = sum(
        max(0, min(mask.block, tokens - key // mask.columns * mask.block))
        * max(0, min(mask.block, tokens - key % mask.columns * mask.block))
        for key in mask.keys
    )
    if abs(visible / tokens**2 - density) > 0.01 * density:
        raise ValueError(
            f"the tiles keep {visible / tokens**2:.4g} of the pairs of {tokens} tokens; density says {density!r}. Pass that share"
        )
