"""Figures of masks for notebooks, files and terminals."""

from __future__ import annotations

import html
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

from ..orders import Order, identity
from . import characters, plots, vectors
from .pixels import Pixels
from .shades import Shades

_MOST_CHARACTERS = 100
ENDINGS = (".png", ".pdf", ".svg", ".html", ".txt")


@dataclass(frozen=True, eq=False)
class Panel:
    """The picture of heads that see the same pairs.

    title: which heads, and which branch.
    pixels: their allowed pairs.
    branches: number of branches that are summed.
    """

    title: str
    pixels: Pixels
    branches: int

    @property
    def caption(self) -> str:
        """The number of allowed pairs in words."""
        total = int(self.pixels.areas.sum())
        share = f"{self.pixels.counts.sum() / total:.3%}"
        if self.pixels.pairs is None:
            return f"about {share} of {total:,} pairs, estimated from a sample"
        unit = "pairs allowed"
        if self.branches > 1:
            unit = "pairs allowed, summed over branches"
        return f"{self.pixels.pairs:,} {unit} ({share} of {total:,})"


@dataclass(frozen=True, eq=False)
class Figure:
    """A picture of a mask, for notebooks, terminals and files.

    program: the program as text.
    kinds: number of groups of equal heads among `heads`.
    order: the order in whose places it is drawn.
    """

    program: str
    panels: tuple[Panel, ...]
    heads: int
    kinds: int
    order: Order

    @property
    def heading(self) -> str:
        """The program, cut to one line."""
        if len(self.program) <= _MOST_CHARACTERS:
            return self.program
        return self.program[: _MOST_CHARACTERS - 3] + "..."

    @property
    def subheading(self) -> str:
        """Tokens, heads and the size of a pixel in words."""
        first = self.panels[0].pixels
        queries, keys = int(first.q_cuts[-1] - first.q_cuts[0]), int(first.kv_cuts[-1])
        if queries == keys:
            tokens = f"{keys:,} token{'s' * (keys != 1)}"
        else:
            query_word = "query" if queries == 1 else "queries"
            tokens = f"{queries:,} {query_word}, {keys:,} key{'s' * (keys != 1)}"
        size = f"{first.size[0]:,} x {first.size[1]:,} tokens"
        if first.is_single:
            size = "one pair"
        kinds = "all heads alike"
        if self.kinds > 1:
            kinds = f"{self.kinds} kinds of heads among {self.heads}"
        return f"{tokens}; {kinds}; a pixel is {size}"

    @property
    def axes(self) -> tuple[str, str]:
        """Names of the vertical and the horizontal axis."""
        unit = "position"
        if self.order != identity():
            unit = f"place in {self.order!r}"
        return f"query ({unit})", f"key ({unit})"

    @cached_property
    def shades(self) -> Shades:
        """The colours, the same in all panels."""
        return Shades(
            max(1, *(panel.branches for panel in self.panels)),
            all(panel.pixels.is_single for panel in self.panels),
        )

    def caption_of(self, panel: Panel) -> str:
        """The caption of a panel, with its title where panels differ."""
        if self.kinds > 1 or len(self.panels) > 1:
            return f"{panel.title}: {panel.caption}"
        return panel.caption

    def text(self, columns: int = 80, unicode: bool = True) -> str:
        """The figure in at most so many columns of a terminal."""
        return characters.text(self, columns, unicode)

    def __str__(self) -> str:
        return self.text()

    def __repr__(self) -> str:
        return f"Figure({self.heading}; {self.subheading})"

    def _repr_html_(self) -> str:
        return f'<figure style="margin:0">{self._svg}</figure>'

    def png(self) -> bytes:
        """The bytes of a PNG file; ImportError without matplotlib."""
        return plots.draw(self, "png")

    def _repr_png_(self) -> bytes | None:
        """None without matplotlib: a notebook then displays the HTML."""
        if not plots.is_installed():
            return None
        return self.png()

    @cached_property
    def _svg(self) -> str:
        return vectors.svg(self)

    def save(self, path: str | PathLike[str]) -> None:
        """Write a file in the format of its ending.

        path: ends in .png or .pdf (drawn by matplotlib), .svg, .html or .txt.

        Raises ValueError for another ending, ImportError if matplotlib is needed and missing.
        """
        file = Path(path)
        ending = file.suffix.lower()
        if ending not in ENDINGS:
            raise ValueError(f"path must end in one of {', '.join(ENDINGS)}; got {str(file)!r}")
        if ending in (".png", ".pdf"):
            file.write_bytes(plots.draw(self, ending[1:]))
        elif ending == ".svg":
            file.write_text(self._svg + "\n", encoding="utf-8")
        elif ending == ".html":
            file.write_text(_page(self.heading, self._repr_html_()), encoding="utf-8")
        else:
            file.write_text(self.text() + "\n", encoding="utf-8")

    def to_json(self) -> dict[str, Any]:
        """The captions as plain values."""
        first = self.panels[0].pixels
        return {
            "program": self.program,
            "q_len": int(first.q_cuts[-1] - first.q_cuts[0]),
            "kv_len": int(first.kv_cuts[-1]),
            "heads": self.heads,
            "kinds_of_heads": self.kinds,
            "pixel": list(first.size),
            "panels": [
                {
                    "title": panel.title,
                    "branches": panel.branches,
                    "allowed_pairs": panel.pixels.pairs,
                    "share": float(panel.pixels.counts.sum() / panel.pixels.areas.sum()),
                }
                for panel in self.panels
            ],
        }


def _page(title: str, body: str) -> str:
    """An HTML page for light and dark displays."""
    lines = [
        "<!doctype html>",
        '<html lang="en">',
        '<meta charset="utf-8">',
        '<meta name="color-scheme" content="light dark">',
        f"<title>{html.escape(title)}</title>",
        body,
        "</html>",
    ]
    return "\n".join(lines) + "\n"
