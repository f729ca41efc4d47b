"""Block-sparse programs that keep a share of all pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .. import arguments, masks
from ..masks import Mask
from .core import Program, as_program

KINDS = ("local", "global_local", "dilated")


def block_sparse(
    density: float,
    kind: str = "local",
    block: int = 64,
    tokens: int | None = None,
    tiles: Sequence[tuple[int, int]] | None = None,
    causal: bool = False,
) -> Program:
    """A mask that keeps the share `density` of all pairs.

    "0.9 sparse" is density 0.1.

    density: share of the pairs, before `causal`; met to within one token of window.
    kind: "local": a window; "global_local": the first `block` tokens are global, and a window keeps
        the other pairs; "dilated": every (1 / density)-th block; "tiles": the listed `tiles`.
    block: tokens per block or tile.
    tokens: the length that the share refers to; required for all kinds except "dilated".
    tiles: (query tile, key tile) pairs.

    Raises ValueError if the share cannot be met: a density outside (0, 1], or tiles of another
    density.
    """
    _check_density(density)
    arguments.choice("kind", kind, (*KINDS, "tiles"))
    block = arguments.integer("block", block, 1)
    if (tiles is not None) != (kind == "tiles"):
        raise ValueError(
            f"tiles are for kind='tiles', which needs them; got kind={kind!r}, tiles={tiles!r}"
        )
    # Dilated blocks keep their share at every length; the other kinds are sized for `tokens`.
    if kind != "dilated":
        tokens = _check_tokens(density, kind, tokens)
        mask = _share_of(density, kind, block, tokens, tiles)
    else:
        mask = _dilated(density, block)
    if arguments.flag("causal", causal):
        mask = masks.conjunction((mask, masks.causal()))
    return as_program(mask)


def _check_density(density: object) -> None:
    if isinstance(density, bool) or not isinstance(density, (int, float)):
        came = arguments.kind_and_text(density)
        raise TypeError(f"density must be a number in (0, 1]; got {came}")
    if not 0 < density <= 1:
        raise ValueError(
            f"density must be in (0, 1], the share of pairs kept; got {density!r}. "
            "A sparsity of 0.9 is density 0.1"
        )


def _check_tokens(density: float, kind: str, tokens: object) -> int:
    if tokens is None:
        raise ValueError(
            f"kind={kind!r} keeps a share of N x N pairs; say how many: "
            f"block_sparse({density}, {kind!r}, tokens=N)"
        )
    return arguments.integer("tokens", tokens, 1)


def _share_of(
    density: float, kind: str, block: int, tokens: int, tiles: Sequence[tuple[int, int]] | None
) -> Mask:
    """The mask of a kind that keeps a share of all pairs."""
    if kind == "tiles":
        mask = masks.tiles(tiles or (), block)
        _check_tile_density(mask, density, tokens)
        return mask
    if kind == "local":
        return masks.window(_window_for(density * tokens**2, tokens))
    return _global_local(density, min(block, tokens), tokens)


def _dilated(density: float, block: int) -> Mask:
    """Every n-th block, for a density of 1 / n."""
    if density < 1 / arguments.MOST:
        raise ValueError(f"density must be at least 2**-60 for kind='dilated'; got {density!r}")
    # The mask keeps 1 / stride of the pairs: other densities have no stride.
    stride = round(1 / density)
    # To one percent; the error names the nearest densities below and above.
    if abs(1 / stride - density) > 0.01 * density:
        near = sorted({1 / max(1, math.floor(1 / density)), 1 / math.ceil(1 / density)})
        raise ValueError(
            f"kind='dilated' keeps one block in a whole number: density {near[0]:.4g} or "
            f"{near[-1]:.4g}; got {density!r}"
        )
    return masks.dilated_blocks(block, stride)


def _global_local(density: float, count: int, tokens: int) -> Mask:
    """`count` global tokens, and a window that meets the density."""
    # Pairs of the window: all that the density allows, less those of global rows and columns.
    pairs = density * tokens**2 - (2 * count * tokens - count**2)
    if pairs < tokens - count:
        raise ValueError(
            f"{count} global tokens and the diagonal alone keep more than "
            f"density {density!r} of {tokens} tokens; take a smaller block or kind='local'"
        )
    return masks.global_tokens(count) | masks.window(_window_for(pairs, tokens - count))


def _window_for(pairs: float, tokens: int) -> int:
    """The window whose number of pairs is nearest to `pairs`.

    A window w has tokens + 2 w tokens - w (w + 1) pairs.
    """
    # The smaller root of w**2 - 2 (tokens - 1 / 2) w + pairs - tokens = 0.
    half = tokens - 0.5
    root = half - math.sqrt(max(half**2 - max(pairs - tokens, 0), 0))
    return max(min(round(root), tokens - 1), 0)


def _check_tile_density(mask: Mask, density: float, tokens: int) -> None:
    """Raise ValueError unless tiles keep the density, to one percent."""
    assert isinstance(mask, masks.Tiles)
    visible = 0
    for tile in mask.keys:
        row, column = divmod(tile, mask.columns)
        # The last row and column of tiles may be short, or past the last token.
        height = max(0, min(mask.block, tokens - row * mask.block))
        width = max(0, min(mask.block, tokens - column * mask.block))
        visible += height * width
    share = visible / tokens**2
    if abs(share - density) > 0.01 * density:
        raise ValueError(
            f"the tiles keep {share:.4g} of the pairs of {tokens} tokens; density says "
            f"{density!r}. Pass that share"
        )
