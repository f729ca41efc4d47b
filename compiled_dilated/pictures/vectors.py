"""A figure as SVG: the same bytes on every machine, read on light and dark pages."""

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

# Of a panel, and around it: left of it ticks and the name of the axis, above it titles, below it ticks, name and legend.
_SIDE, _LEFT, _TOP, _BOTTOM, _GAP = 240, 58, 62, 84, 24
# A long side is drawn at most so many times as long as a short one.
_MOST_STRETCH = 4
_LINE = 13
_CHARACTER = 5.6  # the width of one, at the font's size


def svg(figure: Figure) -> str:
    """The whole figure as one element."""
    height = max(round(_shape(panel.pixels)[0]) for panel in figure.panels)
    width = len(figure.panels) * (_LEFT + _SIDE) + _GAP
    lines = _fit(figure.heading, width - _GAP) + _fit(figure.subheading, width - _GAP)
    top = _LINE * len(lines) + 8
    titled = len(figure.panels) > 1 or figure.kinds > 1
    total = top + 2 * _LINE + height + _BOTTOM
    words = html.escape(f"{figure.heading}; {figure.subheading}")
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {total}" width="{width}" role="img" aria-label="{words}" '
        f'font-family="sans-serif" font-size="10" fill="{INK}">'
    ]
    parts += [_text(6, _LINE * (number + 1), line) for number, line in enumerate(lines)]
    for number, panel in enumerate(figure.panels):
        x = _LEFT + number * (_LEFT + _SIDE)
        parts += _panel(figure, panel, x, top + 2 * _LINE, titled)
    parts += _legend(figure, _LEFT, top + 2 * _LINE + height + 46)
    return "\n".join([*parts, "</svg>"])


def _shape(pixels: Pixels) -> tuple[float, float]:
    """Height and width of a panel."""
    queries, keys = (float(cuts[-1] - cuts[0]) for cuts in (pixels.q_cuts, pixels.kv_cuts))
    stretch = min(max(queries / keys, 1 / _MOST_STRETCH), _MOST_STRETCH)
    return _SIDE * stretch, _SIDE


def _panel(figure: Figure, panel: Panel, x: int, y: int, titled: bool) -> list[str]:
    """The picture of some heads with its axes, its upper left corner at x, y."""
    height, width = _shape(panel.pixels)
    title = f"{panel.title}: {panel.caption}" if titled else panel.caption
    lines = _fit(title, int(width) + _LEFT - 8)[:2]
    out = [
        _text(x, y - 6 - _LINE * (len(lines) - 1 - number), line)
        for number, line in enumerate(lines)
    ]
    queries, keys = (cuts - cuts[0] for cuts in (panel.pixels.q_cuts, panel.pixels.kv_cuts))
    levels = figure.shades.levels(panel.pixels.means)
    scale = f"{_number(width / keys[-1])} {_number(height / queries[-1])}"
    out.append(f'<g transform="translate({x} {y}) scale({scale})" shape-rendering="crispEdges">')
    out.append(f'<path fill="{EMPTY}" d="M0 0h{keys[-1]}v{queries[-1]}H0z"/>')
    for level, color in enumerate(figure.shades.palette):
        path = _runs(levels == level, queries, keys) if level else ""
        if path:
            out.append(f'<path fill="{color}" d="{path}"/>')
    out.append("</g>")
    q_name, kv_name = figure.axes
    for share, anchor in ((0.0, "start"), (1.0, "end")):
        at = int(panel.pixels.kv_cuts[0] + round(share * keys[-1]))
        out.append(_text(x + share * width, y + height + 12, f"{at:,}", anchor))
        at = int(panel.pixels.q_cuts[0] + round(share * queries[-1]))
        out.append(_text(x - 4, y + (8 if share == 0 else height), f"{at:,}", "end"))
    out.append(_text(x + width / 2, y + height + 26, kv_name, "middle"))
    middle = f"{_number(x - 12)} {_number(y + height / 2)}"
    out.append(
        f'<text transform="translate({middle}) rotate(-90)" text-anchor="middle">{html.escape(q_name)}</text>'
    )
    return out


def _runs(
    seen: npt.NDArray[np.bool_], queries: npt.NDArray[np.int64], keys: npt.NDArray[np.int64]
) -> str:
    """Pixels as rectangles: neighbours in a row as one, and rows that are alike as one."""
    out = []
    rows = len(seen)
    row = 0
    while row < rows:
        last = row
        while last + 1 < rows and (seen[last + 1] == seen[row]).all():
            last += 1
        edges = np.flatnonzero(np.diff(np.concatenate([[0], seen[row].astype(np.int8), [0]])))
        high = queries[last + 1] - queries[row]
        for start, stop in edges.reshape(-1, 2).tolist():
            out.append(
                f"M{keys[start]} {queries[row]}h{keys[stop] - keys[start]}v{high}H{keys[start]}z"
            )
        row = last + 1
    return "".join(out)


def _legend(figure: Figure, x: int, y: float) -> list[str]:
    """Colours and what they mean, in one line, and what is counted in a second one."""
    out = []
    at = float(x)
    for name, color in figure.shades.legend:
        out.append(
            f'<path fill="{color}" stroke="{INK}" stroke-width=".5" d="M{_number(at)} {_number(y - 8)}h9v9h-9z"/>'
        )
        out.append(_text(at + 13, y, name))
        at += 24 + _CHARACTER * len(name)
    if figure.shades.meaning:
        out.append(_text(x, y + 14, figure.shades.meaning))
    return out


def _fit(words: str, width: int) -> list[str]:
    """Words in lines that fit a width."""
    return textwrap.wrap(words, max(20, int(width / _CHARACTER)))


def _text(x: float, y: float, words: str, anchor: str = "start") -> str:
    anchored = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text x="{_number(x)}" y="{_number(y)}"{anchored}>{html.escape(words)}</text>'


def _number(value: float) -> str:
    return f"{value:.6g}"
