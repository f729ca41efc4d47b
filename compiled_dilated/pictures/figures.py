"""`show`: what a mask or a program lets each query see, as a figure for notebooks, files and terminals."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import arguments, checks, text
from ..masks import Mask
from ..masks.binding import with_data
from ..orders import Order, identity
from ..programs import Program, as_program, check_data, query_names_of
from . import characters, plots, vectors
from .pixels import Pixels, pixels
from .shades import Shades

# Heads that see differently are drawn side by side, up to so many kinds.
_MOST_KINDS = 4
_MOST_CHARACTERS = 100
ENDINGS = (".png", ".pdf", ".svg", ".html", ".txt")


@dataclass(frozen=True, eq=False)
class Panel:
    """What some heads see, all alike.

    title: which heads, and which branches. pixels: their allowed pairs. branches: how many branches are summed.
    """

    title: str
    pixels: Pixels
    branches: int

    @property
    def caption(self) -> str:
        """The pairs in words."""
        total = int(self.pixels.areas.sum())
        share = f"{self.pixels.counts.sum() / total:.3%}"
        if self.pixels.pairs is None:
            return f"about {share} of {total:,} pairs, estimated from a sample"
        of = "pairs allowed" if self.branches < 2 else "pairs allowed, summed over branches"
        return f"{self.pixels.pairs:,} {of} ({share} of {total:,})"


@dataclass(frozen=True, eq=False)
class Figure:
    """A picture of a mask: shows itself in notebooks, prints as text, and is saved as a file.

    program: as text. kinds: how many different kinds of heads there are among `heads`. order: in whose places it is drawn.
    """

    program: str
    panels: tuple[Panel, ...]
    heads: int
    kinds: int
    order: Order

    @property
    def heading(self) -> str:
        """The program, cut to one line."""
        return (
            self.program
            if len(self.program) <= _MOST_CHARACTERS
            else self.program[: _MOST_CHARACTERS - 3] + "..."
        )

    @property
    def subheading(self) -> str:
        """Tokens, heads and the size of a pixel in words."""
        first = self.panels[0].pixels
        queries, keys = int(first.q_cuts[-1] - first.q_cuts[0]), int(first.kv_cuts[-1])
        if queries == keys:
            tokens = f"{keys:,} token{'s' * (keys != 1)}"
        else:
            tokens = (
                f"{queries:,} quer{'ies' if queries != 1 else 'y'}, {keys:,} key{'s' * (keys != 1)}"
            )
        size = (
            "a pixel is one pair"
            if first.is_single
            else f"a pixel is {first.size[0]:,} x {first.size[1]:,} tokens"
        )
        kinds = (
            "all heads alike"
            if self.kinds == 1
            else f"{self.kinds} kinds of heads among {self.heads}"
        )
        return f"{tokens}; {kinds}; {size}"

    @property
    def axes(self) -> tuple[str, str]:
        """Names of the vertical and the horizontal axis."""
        unit = "position" if self.order == identity() else f"place in {self.order!r}"
        return f"query ({unit})", f"key ({unit})"

    @cached_property
    def shades(self) -> Shades:
        """The colours, the same in all panels."""
        return Shades(
            max(1, *(panel.branches for panel in self.panels)),
            all(panel.pixels.is_single for panel in self.panels),
        )

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
        """The bytes of a PNG file. Raises ImportError with the way to install matplotlib where it is missing."""
        return plots.draw(self, "png")

    def _repr_png_(self) -> bytes | None:
        """None without matplotlib: a notebook then shows the HTML."""
        return self.png() if plots.is_installed() else None

    @cached_property
    def _svg(self) -> str:
        return vectors.svg(self)

    def save(self, path: str | PathLike[str]) -> None:
        """Write a file, in the format that its ending names: .png or .pdf (by matplotlib), .svg, .html or .txt.

        Raises ValueError for another ending, and ImportError with the way to install matplotlib where it is needed.
        """
        place = Path(path)
        ending = place.suffix.lower()
        if ending not in ENDINGS:
            raise ValueError(f"path must end in one of {', '.join(ENDINGS)}; got {str(place)!r}")
        if ending in (".png", ".pdf"):
            place.write_bytes(plots.draw(self, ending[1:]))
        elif ending == ".svg":
            place.write_text(self._svg + "\n", encoding="utf-8")
        elif ending == ".html":
            place.write_text(_page(self.heading, self._repr_html_()), encoding="utf-8")
        else:
            place.write_text(self.text() + "\n", encoding="utf-8")

    def to_json(self) -> dict[str, Any]:
        """What the captions say, as plain values."""
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


def show(
    program: Program | Mask,
    q_len: int,
    kv_len: int | None = None,
    *,
    data: Mapping[str, Tensor] | None = None,
    head: int | None = None,
    heads: int = 8,
    batch: int = 0,
    q_offset: int = 0,
    order: Order | None = None,
    branches: bool = False,
) -> Figure:
    """A picture of which keys each query sees, for any number of tokens.

    Up to 256 tokens a pixel is one pair; past that it is a block of pairs, coloured by how many of them are allowed, which is
    counted, never listed: a million tokens take seconds and some MiB.

    q_len, kv_len: queries and keys, as many by default.
    data: the tensors that the masks read, (batch or 1, tokens), as at a call. batch: the entry of the batch to draw.
    head: the head to draw. By default up to four kinds of heads that differ are drawn side by side, else head 0.
    heads: how many heads masks that differ by head are dealt out to.
    q_offset: the position of the first query, for decoding.
    order: draw in the places of an order, as `hilbert(64, 64)`, instead of positions.
    branches: one picture for each branch of the head too, in front of their sum.

    >>> figure = show(masks.causal() & masks.window(4), 32)
    >>> figure.save("mask.svg")
    """
    program = as_program(program)
    q_len = arguments.integer("q_len", q_len, 1)
    kv_len = q_len if kv_len is None else arguments.integer("kv_len", kv_len, 1)
    heads, q_offset = (
        arguments.integer("heads", heads, 1),
        arguments.integer("q_offset", q_offset, 0),
    )
    if head is not None and arguments.integer("head", head, 0) >= heads:
        raise ValueError(
            f"head must be one of {heads} heads, 0 to {heads - 1}; got {head}. Say how many there are by heads="
        )
    arguments.flag("branches", branches)
    order = _order(order)
    # The branches' own orders are what a call would check; a picture's order is checked like them.
    program.check(q_len, kv_len, q_offset)
    Program(tuple(replace(branch, order=order) for branch in program.branches)).check(
        q_len, kv_len, q_offset
    )
    tensors = _data(program, data, q_offset + q_len, kv_len, batch)

    operands: list[Tensor] = []  # what functions capture: it lives while they are asked
    _, traced = text.traced(program, operands)
    kinds = _kinds(traced, heads)
    shown = kinds
    if head is not None or branches or len(kinds) > _MOST_KINDS:
        shown = [kind for kind in kinds if (head or 0) in kind]

    def panel(title: str, seen: list[Mask]) -> Panel:
        bound = [with_data(mask, tensors, batch) for mask in seen]
        return Panel(title, pixels(bound, q_len, kv_len, q_offset, order), len(seen))

    panels = []
    for alike in shown:
        title = _title(alike, heads, len(kinds))
        seen = _branches(traced, alike[0], heads)
        if branches and len(seen) > 1:
            panels += [
                panel(f"branch {number}: {_cut(str(mask))}", [mask]) for number, mask in seen
            ]
        panels.append(
            panel(title if seen else f"{title}: in no branch", [mask for _, mask in seen])
        )
    return Figure(_name(program), tuple(panels), heads, len(kinds), order)


def _order(order: object) -> Order:
    if order is None:
        return identity()
    if not isinstance(order, Order):
        raise TypeError(
            f"order must be an order; got {type(order).__name__} {order!r}. Use one of compiled_dilated.orders"
        )
    return order


def _data(
    program: Program, data: Mapping[str, Tensor] | None, q_end: int, kv_len: int, batch: object
) -> dict[str, Tensor]:
    """The data tensors on the CPU, checked as at a call."""
    entry = arguments.integer("batch", batch, 0)
    is_mapping = isinstance(data, Mapping)
    tensors = (
        {name: x.cpu() if isinstance(x, Tensor) else x for name, x in data.items()}
        if is_mapping and data
        else data
    )
    sizes = (
        [x.shape[0] for x in (tensors or {}).values() if isinstance(x, Tensor) and x.dim()]
        if is_mapping
        else []
    )
    entries = max(sizes, default=1)
    shape = checks.Shape(entries, q_end, kv_len, torch.device("cpu"))
    checks.data(program.names, query_names_of(program), tensors, shape)
    check_data(program, tensors or {})
    if entry >= entries and sizes:
        raise ValueError(f"batch must be an entry of the data, 0 to {entries - 1}; got {entry}")
    return dict(tensors or {})


def _branches(program: Program, head: int, heads: int) -> list[tuple[int, Mask]]:
    """Numbers of the branches that a head takes part in, and what it sees in each."""
    return [
        (number, branch.mask_at(head, heads))
        for number, branch in enumerate(program.branches)
        if head in branch.head_range(heads)
    ]


def _kinds(program: Program, heads: int) -> list[tuple[int, ...]]:
    """Heads that see the same, in the order of the first of each kind."""
    alike: dict[Any, tuple[int, ...]] = {}
    for head in range(heads):
        seen = tuple(_branches(program, head, heads))
        alike[seen] = (*alike.get(seen, ()), head)
    return list(alike.values())


def _title(alike: tuple[int, ...], heads: int, kinds: int) -> str:
    if kinds == 1:
        return "every head"
    listed = ", ".join(map(str, alike[:6])) + (", ..." if len(alike) > 6 else "")
    return f"head{'s' * (len(alike) > 1)} {listed} of {heads}"


def _name(program: Program) -> str:
    """The branches joined by +, as their pairs add up; a heading, not code."""
    names = []
    for branch in program.branches:
        heads = "" if branch.heads is None else f" for heads {branch.heads}"
        ordered = "" if branch.order == identity() else f" in {branch.order!r}"
        names.append(f"{branch.mask}{heads}{ordered}")
    return names[0] if len(names) == 1 else " + ".join(f"[{name}]" for name in names)


def _cut(words: str) -> str:
    return (
        words if len(words) <= _MOST_CHARACTERS // 2 else words[: _MOST_CHARACTERS // 2 - 3] + "..."
    )


def _page(title: str, body: str) -> str:
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<meta name="color-scheme" content="light dark">\n'
        f"<title>{html.escape(title)}</title>\n{body}\n</html>\n"
    )
