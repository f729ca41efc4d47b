"""Colours that say how many branches link a pair, safe for colour-blind readers, on a card that suits light and dark pages."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .pixels import Counts

Rgb = npt.NDArray[np.uint8]

# Viridis from light to dark (S. van der Walt, N. Smith): monotone in lightness, so that it reads in grey too.
_STOPS = ("#fde725", "#5ec962", "#21918c", "#3b528b", "#440154")
EMPTY = "#eceff1"
# Words and lines beside the card: read on white and on black.
INK = "#6e7781"
# Colours of a downsampled picture.
_STEPS = 32
# Few pairs in a large pixel are still seen: shades grow by this power of their share.
_POWER = 0.4
_SHARES = (0.001, 0.01, 0.1, 0.5, 1.0)


@dataclass(frozen=True)
class Shades:
    """The colours of a picture.

    branches: the most that link one pair. is_single: whether pixels are single pairs, so that counts are whole numbers.
    """

    branches: int
    is_single: bool

    def levels(self, means: Counts) -> npt.NDArray[np.int64]:
        """Numbers of colours in `palette`, 0 where no pair of a pixel is allowed; means of allowed pairs by pixel."""
        if self.is_single:
            return np.rint(means).astype(np.int64)
        steps = np.ceil((means / self.branches) ** _POWER * _STEPS - 1e-9).astype(np.int64)
        return np.where(means > 0, np.clip(steps, 1, _STEPS), 0)

    @property
    def palette(self) -> list[str]:
        """Colours by level."""
        steps = self.branches if self.is_single else _STEPS
        return [
            EMPTY,
            *(
                _between(0.1 + 0.9 * step / steps) if steps > 1 else _STOPS[-1]
                for step in range(1, steps + 1)
            ),
        ]

    def image(self, means: Counts) -> Rgb:
        """(rows, columns, 3)"""
        return np.array([_rgb(color) for color in self.palette], dtype=np.uint8)[self.levels(means)]

    @property
    def legend(self) -> list[tuple[str, str]]:
        """Words and the colour of each."""
        if self.is_single:
            names = (
                ["no pair", "allowed"]
                if self.branches < 2
                else [f"{number}" for number in range(self.branches + 1)]
            )
            return list(zip(names, self.palette[: len(names)], strict=True))
        levels = self.levels(np.array(_SHARES) * self.branches)
        names = [
            f"{share:.1%}".replace(".0%", "%")
            if self.branches < 2
            else f"{share * self.branches:.3g}"
            for share in _SHARES
        ]
        return [
            ("0", EMPTY),
            *(
                (name, self.palette[level])
                for name, level in zip(names, levels.tolist(), strict=True)
            ),
        ]

    @property
    def meaning(self) -> str:
        """What the legend counts."""
        if self.is_single:
            return "" if self.branches < 2 else "branches that link the pair, as often it counts"
        return (
            "share of the pixel's pairs allowed"
            if self.branches < 2
            else "branches that link a pair, mean over the pixel"
        )


def _between(place: float) -> str:
    """The colour at a place of the scale, 0 to 1."""
    colors = np.array([_rgb(stop) for stop in _STOPS], dtype=np.float64)
    at = place * (len(colors) - 1)
    low = min(int(at), len(colors) - 2)
    mixed = np.rint(colors[low] + (at - low) * (colors[low + 1] - colors[low])).astype(int)
    return "#" + "".join(f"{part:02x}" for part in mixed)


def _rgb(color: str) -> tuple[int, int, int]:
    red, green, blue = (int(color[at : at + 2], 16) for at in (1, 3, 5))
    return red, green, blue
