"""Branches and programs, as values."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NoReturn

from .. import arguments
from ..masks import Mask
from ..orders import Order, identity


class NoMask:
    """Rejects `&`, `|` and `~`, which join only masks."""

    # Also part of the error of a mask's operator with such an operand.
    how_to_join = (
        "Join masks before a program is made of them, as "
        "masks.neighborhood((64, 64), 7) | masks.sinks(4); "
        "an order is given by Program((Branch(mask, order=orders.hilbert(64, 64)),))"
    )

    def _refuse(self, operand: object = None) -> NoReturn:
        kind = type(self).__name__
        raise TypeError(f"`&`, `|` and `~` join masks; got {kind} {self}. {self.how_to_join}")

    __and__ = __or__ = __rand__ = __ror__ = __invert__ = _refuse


@dataclass(frozen=True, repr=False)
class Branch(NoMask):
    """Some heads, their mask, and the order of execution.

    heads: None for all, (start, stop), or "i/k": the i-th of k shares of the heads. A share has
        heads // k heads; the first heads % k shares have one more.
    """

    mask: Mask
    heads: tuple[int, int] | str | None = None
    order: Order = identity()

    def __post_init__(self) -> None:
        if not isinstance(self.mask, Mask):
            came = arguments.kind_and_text(self.mask)
            raise TypeError(f"a branch needs a mask; got {came}. Use compiled_dilated.masks")
        if not isinstance(self.order, Order):
            came = arguments.kind_and_text(self.order)
            raise TypeError(f"order must be an order; got {came}. Use compiled_dilated.orders")
        if not _are_heads(self.heads):
            raise ValueError(
                "heads must be None, (start, stop) or a share 'i/k' with i < k; "
                f"got {arguments.shown(self.heads)}"
            )

    def head_range(self, heads: int) -> range:
        """Query heads of this branch, out of `heads`."""
        if self.heads is None:
            return range(heads)
        if isinstance(self.heads, tuple):
            start, stop = self.heads
            if not 0 <= start <= stop <= heads:
                raise ValueError(
                    f"the branch {self} names heads {start} to {stop}; the query has {heads}"
                )
            return range(start, stop)
        share, shares = map(int, self.heads.split("/"))
        # Earlier shares have `size` heads, the first `extra` of them one more.
        size, extra = heads // shares, heads % shares
        start = share * size + min(share, extra)
        return range(start, start + size + (share < extra))

    def mask_at(self, head: int, heads: int) -> Mask:
        """Mask of one query head, out of `heads`."""
        return self.mask.at_head(head, heads)

    def __repr__(self) -> str:
        return self._written(repr)

    def __str__(self) -> str:
        return self._written(str)

    def _written(self, write: Callable[[Mask], str]) -> str:
        options = ""
        if self.heads is not None:
            options += f", heads={self.heads!r}"
        if self.order != identity():
            options += f", order={self.order!r}"
        return f"Branch({write(self.mask)}{options})"


def _are_heads(heads: object) -> bool:
    """Whether a value is None, (start, stop) or a share "i/k"."""
    if isinstance(heads, str):
        share = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", heads)
        return share is not None and int(share[1]) < int(share[2])
    if isinstance(heads, tuple):
        return len(heads) == 2 and all(type(head) is int for head in heads)
    return heads is None


@dataclass(frozen=True, repr=False)
class Program(NoMask):
    """Branches joined by one softmax.

    A key that two branches link counts twice. Hashable; `repr` is the code that creates it.
    """

    branches: tuple[Branch, ...]

    def __post_init__(self) -> None:
        is_tuple = isinstance(self.branches, tuple) and len(self.branches) > 0
        if not is_tuple or not all(isinstance(branch, Branch) for branch in self.branches):
            raise TypeError(
                f"a program needs a non-empty tuple of Branch; got {_shown(self.branches)}. "
                "Write Program((Branch(mask),))"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the data tensors that the program reads, sorted."""
        names: set[str] = set()
        for branch in self.branches:
            names.update(branch.mask.names)
        return tuple(sorted(names))

    def masks_at(self, head: int, heads: int) -> tuple[Mask, ...]:
        """Masks of one query head, out of `heads`, one per branch.

        Branches without the head are left out.
        """
        masks = []
        for branch in self.branches:
            if head in branch.head_range(heads):
                masks.append(branch.mask_at(head, heads))
        return tuple(masks)

    def check(self, q_len: int, kv_len: int, q_offset: int = 0) -> None:
        """Raise ValueError if a mask or order is undefined for these lengths."""
        for branch in self.branches:
            branch.mask.check(range(q_offset, q_offset + q_len), kv_len)
            # An order permutes queries and keys alike, so it needs equal positions of both.
            if branch.order != identity():
                if q_len != kv_len or q_offset:
                    raise ValueError(
                        f"{branch.order!r} orders one sequence; got {q_len} queries at offset "
                        f"{q_offset} and {kv_len} keys. "
                        "Cross attention and decoding need order=identity()"
                    )
                branch.order.check(kv_len)

    def map(self, change: Callable[[Mask], Mask]) -> Program:
        """The program with `change` applied to its masks."""
        return Program(tuple(replace(branch, mask=change(branch.mask)) for branch in self.branches))

    @cached_property
    def _hash(self) -> int:
        return hash(self.branches)

    def __hash__(self) -> int:
        # Cached: a mask may list thousands of numbers, and every call looks up its plan.
        return self._hash

    def __reduce__(self) -> tuple[Any, ...]:
        return Program, (self.branches,)  # without the hash, which differs between processes

    def __repr__(self) -> str:
        return f"Program(({', '.join(map(repr, self.branches))},))"

    def __str__(self) -> str:
        return f"Program(({', '.join(map(str, self.branches))},))"


def _shown(value: object) -> str:
    """An invalid value of branches for an error, masks by `str`."""
    if isinstance(value, tuple) and value:
        return f"({', '.join(map(str, value))},)"
    return repr(value)


def as_program(value: Program | Mask) -> Program:
    """A program; a bare mask becomes a program of one branch."""
    if isinstance(value, Program):
        return value
    if isinstance(value, Mask):
        return Program((Branch(value),))
    remedy = (
        "Build one with compiled_dilated.masks, longnet(...), local_window(...) "
        "or Program((Branch(mask),))"
    )
    if callable(value):
        remedy = "Pass masks.from_mod(fn) for a function of FlexAttention; call masks.causal()"
    raise TypeError(f"expected a Program or a mask; got {type(value).__name__}. {remedy}")
