"""Line charts as SVG with logarithmic axes.

Lines differ by dash and mark, not by colour alone.
"""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from harness.cases import label

Points = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT = 720, 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 76, 16, 16, 44
_DASHES = ("", "8 4", "2 3", "10 3 2 3")
_MARKS = ("circle", "square", "triangle", "diamond", "cross")
_MARK_SIZE = 4.5


@dataclass(frozen=True)
class Chart:
    """Lines over a length.

    title: what is drawn.
    x, y: titles of the axes, with units.
    lines: points (x, y) by the line's name; both positive.
    """

    title: str
    x: str
    y: str
    lines: Mapping[str, Points]

    def svg(self) -> str:
        """The chart as one <figure>, its legend below.

        It has a text for readers who cannot see it.
        """
        axes = _Axes.around(list(itertools.chain.from_iterable(self.lines.values())))
        parts = [*axes.grid()]
        for index, points in enumerate(self.lines.values()):
            parts += _line(axes, points, index)
        parts.append(_text(_LEFT + axes.width / 2, _HEIGHT - 6, self.x, "middle"))
        parts.append(
            f'<text class="axis" text-anchor="middle" '
            f'transform="translate(14 {_TOP + axes.height / 2}) rotate(-90)">'
            f"{html.escape(self.y)}</text>"
        )
        title = html.escape(self.title)
        return (
            f'<figure><figcaption>{title}</figcaption><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" '
            f'role="img" aria-label="{title}">{"".join(parts)}</svg>{self._legend()}</figure>'
        )

    def _legend(self) -> str:
        """The lines' names, each beside its dash and mark."""
        entries = []
        for index, name in enumerate(self.lines):
            sample = (
                f'<svg class="key" viewBox="0 0 36 12"><path class="line s{index % 6}" '
                f'stroke-dasharray="{_DASHES[index % len(_DASHES)]}" d="M0 6H36"/>'
                f"{_mark(18, 6, index)}</svg>"
            )
            entries.append(f"<li>{sample} {html.escape(name)}</li>")
        return f'<ul class="legend">{"".join(entries)}</ul>'


@dataclass(frozen=True)
class _Axes:
    """Two logarithmic axes.

    Their bounds are exponents: of 2 for x, of 10 for y.
    """

    x_low: float
    x_high: float
    y_low: int
    y_high: int

    @staticmethod
    def around(points: Points) -> _Axes:
        """Axes that show all points; powers of ten bound the vertical one."""
        xs = [math.log2(x) for x, _ in points]
        ys = [math.log10(y) for _, y in points]
        low, high = math.floor(min(ys)), math.ceil(max(ys))
        return _Axes(min(xs) - 0.25, max(xs) + 0.25, low, max(high, low + 1))

    @property
    def width(self) -> float:
        return _WIDTH - _LEFT - _RIGHT

    @property
    def height(self) -> float:
        return _HEIGHT - _TOP - _BOTTOM

    def at(self, x: float, y: float) -> tuple[float, float]:
        """The place of a point in the picture."""
        across = (math.log2(x) - self.x_low) / (self.x_high - self.x_low)
        up = (math.log10(y) - self.y_low) / (self.y_high - self.y_low)
        return _LEFT + across * self.width, _TOP + (1 - up) * self.height

    def grid(self) -> list[str]:
        """Lines and labels of the axes.

        They mark powers of ten upwards, and at most ten powers of two across.
        """
        parts = []
        for exponent in range(self.y_low, self.y_high + 1):
            _, y = self.at(2**self.x_low, 10.0**exponent)
            parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>')
            parts.append(_text(_LEFT - 6, y + 4, f"{10.0**exponent:g}", "end"))
        powers = range(math.ceil(self.x_low), math.floor(self.x_high) + 1)
        step = max(1, math.ceil(len(powers) / 10))
        for exponent in powers[::step]:
            x, _ = self.at(2.0**exponent, 10.0**self.y_low)
            parts.append(f'<path class="grid" d="M{x:.1f} {_TOP}V{_HEIGHT - _BOTTOM}"/>')
            parts.append(_text(x, _HEIGHT - _BOTTOM + 16, short(2**exponent), "middle"))
        return parts


def short(tokens: int) -> str:
    """A length as 4K or 1M; others as they are."""
    return label(tokens).upper()


def _line(axes: _Axes, points: Points, index: int) -> list[str]:
    """A line through points in the order of x, with marks."""
    corners, marks = [], []
    for point in sorted(points):
        x, y = axes.at(*point)
        corners.append(f"{x:.1f} {y:.1f}")
        marks.append(_mark(x, y, index))
    dash, path = _DASHES[index % len(_DASHES)], "L".join(corners)
    return [f'<path class="line s{index % 6}" stroke-dasharray="{dash}" d="M{path}"/>', *marks]


def _mark(x: float, y: float, index: int) -> str:
    """One of five shapes around a place."""
    s, kind = _MARK_SIZE, _MARKS[index % len(_MARKS)]
    shapes = {
        "circle": f"M{x - s:.1f} {y:.1f}a{s} {s} 0 1 0 {2 * s} 0a{s} {s} 0 1 0 {-2 * s} 0z",
        "square": f"M{x - s:.1f} {y - s:.1f}h{2 * s}v{2 * s}h{-2 * s}z",
        "triangle": f"M{x:.1f} {y - s:.1f}l{s} {2 * s}h{-2 * s}z",
        "diamond": f"M{x:.1f} {y - s:.1f}l{s} {s}l{-s} {s}l{-s} {-s}z",
        "cross": f"M{x - s:.1f} {y - s:.1f}l{2 * s} {2 * s}m0 {-2 * s}l{-2 * s} {2 * s}",
    }
    return f'<path class="mark s{index % 6}" d="{shapes[kind]}"/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}"'
    return f'<text class="axis" {place} text-anchor="{anchor}">{html.escape(text)}</text>'
