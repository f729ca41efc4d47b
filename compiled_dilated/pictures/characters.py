"""A figure as text for a terminal."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

import numpy as np

from .pixels import Pixels

if TYPE_CHECKING:
    from .figures import Figure, Panel

_ROWS = 32
_MOST_COLUMNS = 80
# By the share of a cell's pairs that is allowed: none, some, ..., all.
_SHADES, _ASCII_SHADES = "·░▒▓█", ".:+%#"
_MEANING = "none, below 1%, below 30%, below all, all"
_BORDERS = (0.01, 0.3, 1.0)
_DIGITS = "·123456789"


def text(figure: Figure, columns: int, unicode: bool) -> str:
    """Heading, and the caption and picture of each panel, in at most so many columns."""
    width = max(columns, 20)
    blocks = [
        "\n".join(textwrap.wrap(figure.heading, width) + textwrap.wrap(figure.subheading, width))
    ]
    for panel in figure.panels:
        title = (
            f"{panel.title}: {panel.caption}"
            if figure.kinds > 1 or len(figure.panels) > 1
            else panel.caption
        )
        blocks.append("\n".join([*textwrap.wrap(title, width), *_picture(panel, width, unicode)]))
    return "\n\n".join(blocks)


def _picture(panel: Panel, columns: int, unicode: bool) -> list[str]:
    """Lines of the picture, and its legend."""
    pixels = panel.pixels
    fits = pixels.is_single and pixels.counts.shape[1] <= min(columns, _MOST_COLUMNS)
    if fits and pixels.counts.max(initial=0) > 1:
        glyphs = np.array([*(_DIGITS if unicode else "." + _DIGITS[1:]), "+"])
        lines = glyphs[np.minimum(pixels.counts, 10).astype(np.int64)]
        return [*map("".join, lines), "a digit: how many branches link the pair; +: more than 9"]
    if fits and unicode:
        return _half_blocks(pixels)
    if fits:
        return ["".join(row) for row in np.array([".", "#"])[(pixels.counts > 0).astype(np.int64)]]
    return _shaded(pixels, columns, _SHADES if unicode else _ASCII_SHADES, panel.branches)


def _half_blocks(pixels: Pixels) -> list[str]:
    """Two rows of pairs to a line."""
    seen = pixels.counts > 0
    seen = np.vstack([seen, np.zeros((len(seen) % 2, seen.shape[1]), dtype=np.bool_)])
    return ["".join(row) for row in np.array(list(" ▀▄█"))[seen[::2] + 2 * seen[1::2]]]


def _shaded(pixels: Pixels, columns: int, glyphs: str, branches: int) -> list[str]:
    """Cells of two characters, by the share of their pairs."""
    cells = pixels.merged(_ROWS, max(1, min(columns, _MOST_COLUMNS) // 2))
    share = cells.means / max(branches, 1)
    level = np.where(share > 0, 1 + np.searchsorted(_BORDERS, share, side="right"), 0)
    lines = ["".join(row) for row in np.array([glyph * 2 for glyph in glyphs])[level]]
    height, width = cells.size
    of = "pairs" if branches < 2 else "pairs of all branches"
    legend = (
        f"{' '.join(glyphs)}  {_MEANING} of a cell's {of}; a cell is {height:,} x {width:,} tokens"
    )
    return [*lines, *textwrap.wrap(legend, columns)]
