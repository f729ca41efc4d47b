"""A figure as text for a terminal."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from .pixels import Pixels

if TYPE_CHECKING:
    from .figures import Figure, Panel

_ROWS = 32
_MOST_COLUMNS = 80
# By the allowed share of a cell's pairs, from none to all; shares between _BORDERS.
_SHADES, _ASCII_SHADES = "·░▒▓█", ".:+%#"
_MEANING = "none, below 1%, below 30%, below all, all"
_BORDERS = (0.01, 0.3, 1.0)
_DIGITS, _ASCII_DIGITS = "·123456789", ".123456789"


def text(figure: Figure, columns: int, unicode: bool) -> str:
    """Heading, then caption and picture of each panel.

    columns: width of the text in characters, at least 20.
    unicode: whether the terminal prints block characters.
    """
    width = max(columns, 20)
    heading = textwrap.wrap(figure.heading, width) + textwrap.wrap(figure.subheading, width)
    blocks = ["\n".join(heading)]
    for panel in figure.panels:
        caption = textwrap.wrap(figure.caption_of(panel), width)
        blocks.append("\n".join([*caption, *_picture(panel, width, unicode)]))
    return "\n\n".join(blocks)


def _picture(panel: Panel, columns: int, unicode: bool) -> list[str]:
    """Lines of the picture, and its legend."""
    pixels = panel.pixels
    # Pixels that are no single pairs, or too many for the terminal, are merged to shaded cells.
    if not pixels.is_single or pixels.counts.shape[1] > min(columns, _MOST_COLUMNS):
        return _shaded(pixels, columns, _SHADES if unicode else _ASCII_SHADES, panel.branches)
    # Several branches may link a pair: digits.
    if pixels.counts.max(initial=0) > 1:
        digits = np.array([*(_DIGITS if unicode else _ASCII_DIGITS), "+"])
        lines = _lines(digits[np.minimum(pixels.counts, 10).astype(np.int64)])
        return [*lines, "a digit: how many branches link the pair; +: more than 9"]
    if unicode:
        return _half_blocks(pixels)
    return _lines(np.array([".", "#"])[(pixels.counts > 0).astype(np.int64)])


def _half_blocks(pixels: Pixels) -> list[str]:
    """Two rows of pairs to a line."""
    allowed = pixels.counts > 0
    # An empty row behind an odd number of rows.
    padding = np.zeros((len(allowed) % 2, allowed.shape[1]), dtype=np.bool_)
    allowed = np.vstack([allowed, padding])
    return _lines(np.array(list(" ▀▄█"))[allowed[::2] + 2 * allowed[1::2]])


def _shaded(pixels: Pixels, columns: int, glyphs: str, branches: int) -> list[str]:
    """Cells of two characters, by the allowed share of their pairs."""
    cells = pixels.merged(_ROWS, max(1, min(columns, _MOST_COLUMNS) // 2))
    share = cells.means / max(branches, 1)
    level = np.where(share > 0, 1 + np.searchsorted(_BORDERS, share, side="right"), 0)
    # Doubled, as a character is about twice as high as wide.
    lines = _lines(np.array([glyph * 2 for glyph in glyphs])[level])
    height, width = cells.size
    pairs = "pairs"
    if branches > 1:
        pairs = "pairs of all branches"
    meaning = f"{_MEANING} of a cell's {pairs}; a cell is {height:,} x {width:,} tokens"
    return [*lines, *textwrap.wrap(f"{' '.join(glyphs)}  {meaning}", columns)]


def _lines(characters: npt.NDArray[np.str_]) -> list[str]:
    """Rows of characters as lines."""
    return ["".join(row) for row in characters]
