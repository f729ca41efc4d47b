"""Colours by the number of branches that allow a pair.

Safe for colour-blind readers, and readable on light and dark pages.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .pixels import Counts

Rgb = npt.NDArray[np.uint8]

# Viridis from light to dark (S. van der Walt, N. Smith): monotone in lightness, readable in grey.
_STOPS = ("#fde725", "#5ec962", "#21918c", "#3b528b", "#440154")
EMPTY = "#eceff1"
# Text and lines: readable on white and on black.
INK = "#6e7781"
# Colours of pixels that are blocks of pairs.
_STEPS = 32
# The shade is this power of the allowed share, so that few pairs in a large pixel are visible.
_POWER = 0.4
_SHARES = (0.001, 0.01, 0.1, 0.5, 1.0)


@dataclass(frozen=True)
class Shades:
    """The colours of a picture.

    branches: the most branches that allow one pair.
    is_single: whether pixels are single pairs, so that counts are whole numbers.
    """

    branches: int
    is_single: bool

    def levels(self, means: Counts) -> npt.NDArray[np.int64]:
        """Indices in `palette`; 0 if no pair of a pixel is allowed.

        means: branches that allow a pair, mean over each pixel.
        """
        if self.is_single:
            return np.rint(means).astype(np.int64)
        steps = np.ceil((means / self.branches) ** _POWER * _STEPS - 1e-9).astype(np.int64)
        return np.where(means > 0, np.clip(steps, 1, _STEPS), 0)

    @property
    def palette(self) -> list[str]:
        """Colours by level, that of no pair first."""
        steps = self.branches if self.is_single else _STEPS
        if steps == 1:
            return [EMPTY, _STOPS[-1]]
        colors = [_interpolated(0.1 + 0.9 * step / steps) for step in range(1, steps + 1)]
        return [EMPTY, *colors]

    def image(self, means: Counts) -> Rgb:
        """The picture, (rows, columns, 3)."""
        return np.array([_rgb(color) for color in self.palette], dtype=np.uint8)[self.levels(means)]

    @property
    def legend(self) -> list[tuple[str, str]]:
        """Labels with their colours."""
        if self.is_single and self.branches < 2:
            return list(zip(("no pair", "allowed"), self.palette, strict=True))
        if self.is_single:
            return [(str(number), color) for number, color in enumerate(self.palette)]
        entries = [("0", EMPTY)]
        levels = self.levels(np.array(_SHARES) * self.branches)
        for share, level in zip(_SHARES, levels.tolist(), strict=True):
            label = f"{share * self.branches:.3g}"
            if self.branches < 2:
                label = f"{share:.1%}".replace(".0%", "%")
            entries.append((label, self.palette[level]))
        return entries

    @property
    def meaning(self) -> str:
        """The title of the legend."""
        if self.is_single and self.branches < 2:
            return ""
        if self.is_single:
            return "branches that link the pair, as often it counts"
        if self.branches < 2:
            return "share of the pixel's pairs allowed"
        return "branches that link a pair, mean over the pixel"


def _interpolated(fraction: float) -> str:
    """The colour at a fraction of the scale, 0 to 1."""
    colors = np.array([_rgb(stop) for stop in _STOPS], dtype=np.float64)
    index = fraction * (len(colors) - 1)
    low = min(int(index), len(colors) - 2)
    mixed = np.rint(colors[low] + (index - low) * (colors[low + 1] - colors[low])).astype(int)
    return "#" + "".join(f"{part:02x}" for part in mixed)


def _rgb(color: str) -> tuple[int, int, int]:
    return int(color[1:3], 16), int(color[3:5], 16), int(color[5:7], 16)
