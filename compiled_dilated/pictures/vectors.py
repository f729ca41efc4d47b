"""A figure as SVG for light and dark pages, with reproducible bytes."""

from __future__ import annotations

import html
import textwrap
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from .pixels import Pixels
from .shades import EMPTY, INK

if TYPE_CHECKING:
    from .figures import Figure, Panel

# In pixels of the SVG: a panel's side; on its left ticks and the name of the axis; below it ticks,
# name and legend; the gap on the right.
_SIDE, _LEFT, _BOTTOM, _GAP = 240, 58, 84, 24
# The greatest ratio of the long side to the short one.
_MOST_STRETCH = 4
_LINE = 13  # height of a line of text
_CHARACTER = 5.6  # mean width of a character


def svg(figure: Figure) -> str:
    """The figure as one element."""
    height = max(round(_shape(panel.pixels)[0]) for panel in figure.panels)
    width = len(figure.panels) * (_LEFT + _SIDE) + _GAP
    # Headings above the panels.
    lines = _fit(figure.heading, width - _GAP) + _fit(figure.subheading, width - _GAP)
    top = _LINE * len(lines) + 8 + 2 * _LINE
    label = html.escape(f"{figure.heading}; {figure.subheading}")
    box = f'viewBox="0 0 {width} {top + height + _BOTTOM}" width="{width}"'
    font = f'font-family="sans-serif" font-size="10" fill="{INK}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {box} role="img" aria-label="{label}" {font}>'
    ]
    parts += [_text(6, _LINE * (number + 1), line) for number, line in enumerate(lines)]
    # Panels side by side, one legend for all below.
    for number, panel in enumerate(figure.panels):
        parts += _panel(figure, panel, _LEFT + number * (_LEFT + _SIDE), top)
    parts += _legend(figure, _LEFT, top + height + 46)
    return "\n".join([*parts, "</svg>"])


def _shape(pixels: Pixels) -> tuple[float, float]:
    """Height and width of a panel."""
    queries, keys = (float(cuts[-1] - cuts[0]) for cuts in (pixels.q_cuts, pixels.kv_cuts))
    stretch = min(max(queries / keys, 1 / _MOST_STRETCH), _MOST_STRETCH)
    return _SIDE * stretch, _SIDE


def _panel(figure: Figure, panel: Panel, x: int, y: int) -> list[str]:
    """A panel with caption and axes.

    x, y: upper left corner of the picture.
    """
    height, width = _shape(panel.pixels)
    lines = _fit(figure.caption_of(panel), int(width) + _LEFT - 8)[:2]
    # The caption's last line is just above the picture.
    out = []
    for number, line in enumerate(lines):
        out.append(_text(x, y - 6 - _LINE * (len(lines) - 1 - number), line))
    # The picture in units of tokens, one path for each colour.
    queries, keys = (cuts - cuts[0] for cuts in (panel.pixels.q_cuts, panel.pixels.kv_cuts))
    levels = figure.shades.levels(panel.pixels.means)
    scale = f"{_number(width / keys[-1])} {_number(height / queries[-1])}"
    out.append(f'<g transform="translate({x} {y}) scale({scale})" shape-rendering="crispEdges">')
    out.append(f'<path fill="{EMPTY}" d="M0 0h{keys[-1]}v{queries[-1]}H0z"/>')
    # Level 0, no pair, is the background.
    for level, color in list(enumerate(figure.shades.palette))[1:]:
        path = _runs(levels == level, queries, keys)
        if path:
            out.append(f'<path fill="{color}" d="{path}"/>')
    out.append("</g>")
    return out + _axes(figure, panel, x, y)


def _axes(figure: Figure, panel: Panel, x: int, y: int) -> list[str]:
    """Names of the axes, and ticks at both ends."""
    height, width = _shape(panel.pixels)
    q_cuts, kv_cuts = panel.pixels.q_cuts, panel.pixels.kv_cuts
    q_name, kv_name = figure.axes
    below, left = y + height + 12, x - 4
    out = [
        _text(x, below, f"{kv_cuts[0]:,}", "start"),
        _text(left, y + 8, f"{q_cuts[0]:,}", "end"),
        _text(x + width, below, f"{kv_cuts[-1]:,}", "end"),
        _text(left, y + height, f"{q_cuts[-1]:,}", "end"),
        _text(x + width / 2, below + 14, kv_name, "middle"),
    ]
    middle = f"{_number(x - 12)} {_number(y + height / 2)}"
    turned = f'transform="translate({middle}) rotate(-90)" text-anchor="middle"'
    out.append(f"<text {turned}>{html.escape(q_name)}</text>")
    return out


def _runs(
    is_drawn: npt.NDArray[np.bool_], queries: npt.NDArray[np.int64], keys: npt.NDArray[np.int64]
) -> str:
    """Pixels as rectangles; neighbours in a row, and equal rows, are merged.

    is_drawn: (rows, columns).
    queries, keys: borders of rows and columns in tokens.
    """
    out = []
    rows = len(is_drawn)
    row = 0
    while row < rows:
        last = row
        while last + 1 < rows and (is_drawn[last + 1] == is_drawn[row]).all():
            last += 1
        # Columns at which a run of drawn pixels begins or ends.
        padded = np.concatenate([[0], is_drawn[row].astype(np.int8), [0]])
        edges = np.flatnonzero(np.diff(padded))
        top, height = queries[row], queries[last + 1] - queries[row]
        for start, stop in edges.reshape(-1, 2).tolist():
            left, width = keys[start], keys[stop] - keys[start]
            out.append(f"M{left} {top}h{width}v{height}H{left}z")
        row = last + 1
    return "".join(out)


def _legend(figure: Figure, x: int, y: float) -> list[str]:
    """Colours with labels in one line, the legend's title in a second."""
    out = []
    left = float(x)
    for name, color in figure.shades.legend:
        square = f"M{_number(left)} {_number(y - 8)}h9v9h-9z"
        out.append(f'<path fill="{color}" stroke="{INK}" stroke-width=".5" d="{square}"/>')
        out.append(_text(left + 13, y, name))
        left += 24 + _CHARACTER * len(name)
    if figure.shades.meaning:
        out.append(_text(x, y + 14, figure.shades.meaning))
    return out


def _fit(words: str, width: int) -> list[str]:
    """Wrap words to a width in pixels."""
    return textwrap.wrap(words, max(20, int(width / _CHARACTER)))


def _text(x: float, y: float, words: str, anchor: str = "start") -> str:
    attribute = ""
    if anchor != "start":
        attribute = f' text-anchor="{anchor}"'
    return f'<text x="{_number(x)}" y="{_number(y)}"{attribute}>{html.escape(words)}</text>'


def _number(value: float) -> str:
    return f"{value:.6g}"
