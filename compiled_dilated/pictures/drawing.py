"""`show`: figures from programs.

Heads that see the same pairs share a panel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import arguments, checks, text
from ..masks import Mask
from ..masks.binding import with_data
from ..orders import Order, identity
from ..programs import Program, as_program, check_data, query_names_of
from .figures import Figure, Panel
from .pixels import pixels

# Heads that differ are drawn side by side, up to this many kinds.
_MOST_KINDS = 4
_MOST_CHARACTERS = 50

# Branches of a head: their numbers and masks.
Branches = tuple[tuple[int, Mask], ...]


@dataclass(frozen=True)
class _View:
    """The part of the pairs that a figure shows.

    data: data tensors, (batch or 1, tokens).
    batch: the entry of the data's batch.
    order: the order in whose places the pairs are drawn.
    """

    q_len: int
    kv_len: int
    q_offset: int
    data: Mapping[str, Tensor]
    batch: int
    order: Order

    def panel(self, title: str, masks: Sequence[Mask]) -> Panel:
        """The panel of a head, by its mask in each branch."""
        bound = [with_data(mask, self.data, self.batch) for mask in masks]
        counts = pixels(bound, self.q_len, self.kv_len, self.q_offset, self.order)
        return Panel(title, counts, len(masks))


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
    """Draw which keys each query sees, for any number of tokens.

    Up to 256 tokens a pixel is one pair; beyond, it is a block of pairs, coloured by the share
    that is allowed. A million tokens take seconds and some MiB.

    q_len, kv_len: numbers of queries and of keys, as many as queries by default.
    data: the tensors that the masks read, (batch or 1, tokens), as at a call.
    head: the head to draw; by default up to four kinds of heads, of more kinds head 0.
    heads: number of heads, for masks that differ by head.
    batch: the entry of the data's batch to draw.
    q_offset: position of the first query, for decoding.
    order: draw in the places of an order, as `hilbert(64, 64)`, instead of positions.
    branches: draw each branch of the head too, in front of their sum.

    >>> figure = show(masks.causal() & masks.window(4), 32)
    >>> figure.save("mask.svg")
    """
    program = as_program(program)
    q_len = arguments.integer("q_len", q_len, 1)
    kv_len = q_len if kv_len is None else arguments.integer("kv_len", kv_len, 1)
    heads = arguments.integer("heads", heads, 1)
    q_offset = arguments.integer("q_offset", q_offset, 0)
    _check_head(head, heads)
    arguments.flag("branches", branches)
    view = _view(program, q_len, kv_len, q_offset, data, batch, order)
    operands: list[Tensor] = []  # captured by the program's functions; alive until they were called
    _, traced = text.traced(program, operands)
    kinds = _kinds(traced, heads)
    panels = _panels(view, traced, kinds, head, heads, branches)
    return Figure(_heading(program), tuple(panels), heads, len(kinds), view.order)


def _check_head(head: int | None, heads: int) -> None:
    """Raise unless the head is absent, or one of the heads."""
    if head is not None and arguments.integer("head", head, 0) >= heads:
        raise ValueError(
            f"head must be one of {heads} heads, 0 to {heads - 1}; got {head}. "
            "Say how many there are by heads="
        )


def _view(
    program: Program,
    q_len: int,
    kv_len: int,
    q_offset: int,
    data: Mapping[str, Tensor] | None,
    batch: int,
    order: object,
) -> _View:
    """The view of checked arguments."""
    in_order = _order(order)
    # The program's own orders are checked as at a call, the picture's order like them.
    program.check(q_len, kv_len, q_offset)
    branches = tuple(replace(branch, order=in_order) for branch in program.branches)
    Program(branches).check(q_len, kv_len, q_offset)
    tensors = _data(program, data, q_offset + q_len, kv_len, batch)
    return _View(q_len, kv_len, q_offset, tensors, batch, in_order)


def _order(order: object) -> Order:
    """The order of the picture, the identity by default."""
    if order is None:
        return identity()
    if not isinstance(order, Order):
        raise TypeError(
            f"order must be an order; got {arguments.kind_and_text(order)}. "
            "Use one of compiled_dilated.orders"
        )
    return order


def _data(
    program: Program, data: Mapping[str, Tensor] | None, q_end: int, kv_len: int, batch: object
) -> dict[str, Tensor]:
    """The data tensors on the CPU, checked as at a call."""
    entry = arguments.integer("batch", batch, 0)
    tensors = data
    sizes: list[int] = []
    # Anything that is no mapping of tensors is refused by the checks below.
    if isinstance(data, Mapping) and data:
        on_cpu: dict[str, Tensor] = {}
        for name, x in data.items():
            if isinstance(x, Tensor):
                x = x.cpu()
                sizes += x.shape[:1]
            on_cpu[name] = x
        tensors = on_cpu
    entries = max(sizes, default=1)
    shape = checks.Shape(entries, q_end, kv_len, torch.device("cpu"))
    checks.data(program.names, query_names_of(program), tensors, shape)
    check_data(program, tensors or {})
    if entry >= entries and sizes:
        raise ValueError(f"batch must be an entry of the data, 0 to {entries - 1}; got {entry}")
    return dict(tensors or {})


def _branches(program: Program, head: int, heads: int) -> Branches:
    """The branches of a head, with its mask in each."""
    branches = []
    for number, branch in enumerate(program.branches):
        if head in branch.head_range(heads):
            branches.append((number, branch.mask_at(head, heads)))
    return tuple(branches)


def _kinds(program: Program, heads: int) -> list[tuple[int, ...]]:
    """Groups of heads with equal branches, by their first heads."""
    by_branches: dict[Branches, tuple[int, ...]] = {}
    for head in range(heads):
        key = _branches(program, head, heads)
        by_branches[key] = (*by_branches.get(key, ()), head)
    return list(by_branches.values())


def _panels(
    view: _View,
    program: Program,
    kinds: list[tuple[int, ...]],
    head: int | None,
    heads: int,
    is_split: bool,
) -> list[Panel]:
    """The panels of all kinds of heads, or of one kind.

    One kind: for a head that was passed, for split branches, or of too many kinds.
    """
    single = head is not None or is_split or len(kinds) > _MOST_KINDS
    panels: list[Panel] = []
    for kind in kinds:
        if single and (head or 0) not in kind:
            continue
        title = _title(kind, heads, len(kinds))
        panels += _panels_of_kind(view, title, _branches(program, kind[0], heads), is_split)
    return panels


def _panels_of_kind(view: _View, title: str, branches: Branches, is_split: bool) -> list[Panel]:
    """The panel of a kind of heads.

    is_split: whether a panel for each branch is in front of it.
    """
    panels = []
    if is_split and len(branches) > 1:
        for number, mask in branches:
            panels.append(view.panel(f"branch {number}: {_shortened(str(mask))}", [mask]))
    if not branches:
        title = f"{title}: in no branch"
    panels.append(view.panel(title, [mask for _, mask in branches]))
    return panels


def _title(kind: tuple[int, ...], heads: int, kinds: int) -> str:
    """The heads of a kind in words."""
    if kinds == 1:
        return "every head"
    numbers = ", ".join(map(str, kind[:6]))
    if len(kind) > 6:
        numbers += ", ..."
    return f"head{'s' * (len(kind) > 1)} {numbers} of {heads}"


def _heading(program: Program) -> str:
    """The branches joined by +: a heading, not code."""
    names = []
    for branch in program.branches:
        name = str(branch.mask)
        if branch.heads is not None:
            name += f" for heads {branch.heads}"
        if branch.order != identity():
            name += f" in {branch.order!r}"
        names.append(name)
    if len(names) == 1:
        return names[0]
    return " + ".join(f"[{name}]" for name in names)


def _shortened(words: str) -> str:
    """Words cut to the length of a title."""
    if len(words) <= _MOST_CHARACTERS:
        return words
    return words[: _MOST_CHARACTERS - 3] + "..."
