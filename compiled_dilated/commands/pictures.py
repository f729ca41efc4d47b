"""Masks and their tiles as pictures: PNG by matplotlib, and text for a terminal. Work grows with the tiles that are seen."""

from __future__ import annotations

import io
import math
import textwrap
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from .. import counting
from ..masks import Mask
from ..orders import Order, identity
from ..programs import Program
from ..regions import EMPTY, FULL, PARTIAL
from ..tiles import TileMap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.patches import Patch

Counts = npt.NDArray[np.int64]

# Up to so many tokens a picture shows every pair; past so many, pairs are not counted either.
MOST_TOKENS_IN_PAIRS = 256
_MOST_TOKENS_COUNTED = 2**16
# Tiles a side, in the picture and in what is planned for it.
_DRAWN_TILES = 256
_PLANNED_TILES = 2048
_TEXT_ROWS = 32
_TEXT_PAIRS = 80
_DPI, _DPI_OF_PAIRS = 110, 200

_COLORS = {EMPTY: "#f2f2f2", PARTIAL: "#efb16d", FULL: "#1f4e79"}
_FORBIDDEN, _ALLOWED = "#fbe6cf", "#d2691e"  # pairs within a partial tile
_NAMES = {EMPTY: "empty", PARTIAL: "partial", FULL: "full"}
_BLOCKS = {EMPTY: "··", PARTIAL: "▒▒", FULL: "██"}
_ASCII = {EMPTY: "..", PARTIAL: "++", FULL: "##"}


@dataclass(frozen=True, eq=False)
class Panel:
    """One branch as one head sees it. `seen` (tokens, tokens): the pairs allowed, by place in the order; None for many tokens."""

    title: str
    tiles: TileMap
    seen: npt.NDArray[np.bool_] | None
    allowed_pairs: int | None

    @property
    def tokens(self) -> int:
        return self.tiles.q_len

    @property
    def counts(self) -> dict[str, int]:
        """Tiles by verdict."""
        listed, full = len(self.tiles.indices), int(self.tiles.full.sum())
        return {"full": full, "partial": listed - full, "empty": self.tiles.rows * self.tiles.columns - listed}

    @property
    def caption(self) -> str:
        """The counts in words."""
        counts = self.counts
        tiles = ", ".join(f"{number:,} {name}" for name, number in counts.items())
        out = f"{sum(counts.values()):,} tiles of {self.tiles.q_tile} x {self.tiles.kv_tile} tokens: {tiles}"
        if self.allowed_pairs is None:
            return out
        return f"{out}; {self.allowed_pairs:,} pairs allowed ({self.allowed_pairs / self.tokens**2:.1%})"

    def to_json(self) -> dict[str, Any]:
        """What the caption says, as plain values."""
        sizes = {"q_tile": self.tiles.q_tile, "kv_tile": self.tiles.kv_tile}
        return {"branch": self.title, **sizes, "tiles": self.counts, "allowed_pairs": self.allowed_pairs}


def default_tile(tokens: int) -> int:
    """Tokens a tile: 128 as the kernels like it, fewer where pairs can be seen, more where tiles would be too many to draw."""
    tile = 128
    while tile > 1 and tile * 16 > tokens and tokens <= MOST_TOKENS_IN_PAIRS:
        tile //= 2
    while tile * _PLANNED_TILES < tokens:
        tile *= 2
    return tile


def panels(program: Program, tokens: int, heads: int, head: int, tile: int, order: Order | None = None) -> list[Panel]:
    """A panel for each branch that the head takes part in; `order` in place of the branches' own."""
    branches = [branch if order is None else replace(branch, order=order) for branch in program.branches]
    Program(tuple(branches)).check(tokens, tokens)
    out = []
    for i, branch in enumerate(branches):
        if head in branch.head_range(heads):
            mask = branch.mask_at(head, heads)
            ordered = "" if branch.order == identity() else f" in the order {branch.order!r}"
            title = f"branch {i}: {mask!r}{ordered}" if len(branches) > 1 else f"{mask!r}{ordered}"
            tiles = TileMap.build(mask, tokens, tokens, q_tile=tile, kv_tile=tile, order=branch.order)
            counted = tokens <= _MOST_TOKENS_COUNTED and not mask.names
            out.append(
                Panel(
                    title,
                    tiles,
                    _seen(mask, tokens, branch.order),
                    counting.pairs(mask, tokens, tokens) if counted else None,
                )
            )
    return out


def _seen(mask: Mask, tokens: int, order: Order) -> npt.NDArray[np.bool_] | None:
    """Which pairs are allowed; None for many tokens, or where that is in data that only a call has."""
    if tokens > MOST_TOKENS_IN_PAIRS or mask.names:
        return None
    permutation, zero = order.permutation(tokens), torch.zeros((), dtype=torch.int64)
    at = torch.arange(tokens) if permutation is None else torch.from_numpy(permutation.astype(np.int64))
    seen: npt.NDArray[np.bool_] = mask.allows(zero, zero, at[:, None], at[None, :]).numpy()
    return seen


def _drawn(tiles: TileMap, most_rows: int, most_columns: int) -> TileMap:
    """The tiles, or larger ones where there are too many."""
    factor = max(1, -(-tiles.rows // most_rows), -(-tiles.columns // most_columns))
    return tiles if factor == 1 else tiles.coarsen(factor)


def multiplicity(drawn: list[Panel]) -> Counts | None:
    """How many branches allow each pair, (tokens, tokens); None for one branch, many tokens, or differing orders."""
    seen = [panel.seen for panel in drawn]
    if len(drawn) < 2 or any(each is None for each in seen) or len({panel.tiles.order for panel in drawn}) > 1:
        return None
    counts: Counts = np.sum([each for each in seen if each is not None], axis=0, dtype=np.int64)
    return counts


def text(panel: Panel, columns: int, unicode: bool = True) -> str:
    """The panel in at most so many columns of a terminal: every pair where they fit, two lines of them to a row; else tiles."""
    heading = "\n".join(textwrap.wrap(panel.title, max(columns, 20)) + textwrap.wrap(panel.caption, max(columns, 20)))
    if unicode and panel.seen is not None and panel.tokens <= min(columns, _TEXT_PAIRS):
        above, below = (
            np.vstack([panel.seen, np.zeros((1, panel.tokens), dtype=np.bool_)])[first : first + panel.tokens : 2]
            for first in (0, 1)
        )
        picture = "\n".join("".join(row) for row in np.array(list(" ▀▄█"))[above + 2 * below])
        return f"{heading}\n{picture}"
    glyphs = _BLOCKS if unicode else _ASCII
    tiles = _drawn(panel.tiles, _TEXT_ROWS, max(1, columns // 2))
    picture = "\n".join("".join(glyphs[verdict] for verdict in row) for row in tiles.verdicts())
    legend = "  ".join(f"{glyphs[verdict]} {_NAMES[verdict]}" for verdict in (FULL, PARTIAL, EMPTY))
    return f"{heading}\n{picture}\n{legend}  (a cell is {tiles.q_tile} x {tiles.kv_tile} tokens)"


def png(title: str, drawn: list[Panel]) -> bytes:
    """All panels side by side, and how many branches link each pair where that can be seen."""
    from matplotlib.figure import Figure

    counts = multiplicity(drawn)
    number = len(drawn) + (counts is not None)
    columns = number if number <= 3 else math.ceil(math.sqrt(number))
    rows = -(-number // columns)
    figure = Figure(figsize=(max(5.2 * columns, 7), 5.9 * rows + 0.8), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).reshape(-1)
    for panel, ax in zip(drawn, axes, strict=False):
        _draw(panel, ax)
    if counts is not None:
        _draw_counts(counts, drawn[0].tiles.order, axes[len(drawn)])
    for ax in axes[number:]:
        ax.set_axis_off()
    figure.suptitle(textwrap.fill(title, 42 * columns + 20), fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI_OF_PAIRS if any(panel.seen is not None for panel in drawn) else _DPI)
    return buffer.getvalue()


def _draw(panel: Panel, ax: Axes) -> None:
    from matplotlib.patches import Patch

    colors = {verdict: _rgb(color) for verdict, color in _COLORS.items()}
    handles = [
        Patch(facecolor=_COLORS[each], edgecolor="#888888", label=f"{_NAMES[each]} {panel.counts[_NAMES[each]]:,}")
        for each in (FULL, PARTIAL, EMPTY)
    ]
    tiles = _drawn(panel.tiles, _DRAWN_TILES, _DRAWN_TILES)
    verdict = tiles.verdicts()
    image = np.stack([colors[EMPTY], colors[PARTIAL], colors[FULL]])[verdict]
    if panel.seen is not None:
        spread = verdict.repeat(tiles.q_tile, axis=0).repeat(tiles.kv_tile, axis=1)[: panel.tokens, : panel.tokens]
        image = np.stack([colors[EMPTY], _rgb(_FORBIDDEN), colors[FULL]])[spread]
        image[(spread == PARTIAL) & panel.seen] = _rgb(_ALLOWED)
        handles[1] = Patch(facecolor=_FORBIDDEN, edgecolor="#888888", label=handles[1].get_label())
        handles.append(Patch(facecolor=_ALLOWED, label="pair in a partial tile"))
    # A last tile may be short: the image reaches past it, the axes do not.
    height, width = (
        (panel.tokens, panel.tokens) if panel.seen is not None else (tiles.rows * tiles.q_tile, tiles.columns * tiles.kv_tile)
    )
    ax.imshow(image, extent=(0, width, height, 0), interpolation="nearest")
    _label(ax, panel.tokens, panel.tiles.order)
    ax.set_title(textwrap.fill(panel.title, 58) + "\n" + textwrap.fill(panel.caption, 62), fontsize=8)
    _legend(ax, handles)


def _draw_counts(counts: Counts, order: Order, ax: Axes) -> None:
    from matplotlib import colormaps
    from matplotlib.patches import Patch

    values = np.unique(counts)
    shades = colormaps["viridis_r"](np.linspace(0.0, 1.0, int(counts.max()) + 1))[:, :3]
    shades[0] = _rgb(_COLORS[EMPTY])
    ax.imshow(shades[counts], extent=(0, len(counts), len(counts), 0), interpolation="nearest")
    _label(ax, len(counts), order)
    ax.set_title("branches that link a pair: as often it counts in the softmax", fontsize=8)
    _legend(ax, [Patch(facecolor=shades[value], edgecolor="#888888", label=str(value)) for value in values])


def _label(ax: Axes, tokens: int, order: Order) -> None:
    unit = "tokens" if order == identity() else f"place in {order!r}"
    ax.set(xlim=(0, tokens), ylim=(tokens, 0), xlabel=f"key ({unit})", ylabel=f"query ({unit})")
    ax.tick_params(labelsize=7)


def _legend(ax: Axes, handles: list[Patch]) -> None:
    """Below the axes, where it hides nothing."""
    ax.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.11), ncols=4, fontsize=7, frameon=False)


def _rgb(color: str) -> npt.NDArray[np.float64]:
    return np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
