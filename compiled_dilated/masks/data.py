"""Masks that read data tensors of the call: documents and padding.

The tensors are never part of a plan.
"""

from __future__ import annotations

import bisect
import itertools
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from .. import arguments
from ..regions import EMPTY, PARTIAL, IntArray, Regions, Verdicts
from .core import Data, Mask, Positions
from .lookup import as_tensor, rank
from .ranges import NOTHING, clip
from .segments import same_group
from .summaries import brief


def row_of(x: Any, b: Positions) -> Any:
    """Row of the data for a batch index; one row serves all."""
    if x.shape[0] != 1:
        return b
    return b * 0


@dataclass(frozen=True, repr=False)
class OfData(Mask):
    """Pairs decided by the data tensor `name` (B, positions)."""

    name: str

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def tensor(self, data: Data | None) -> Any:
        """The mask's tensor among the data of a call.

        Raises ValueError if it is missing.
        """
        if data is None or self.name not in data:
            passed = "nothing"
            if data:
                passed = ", ".join(sorted(data))
            raise ValueError(
                f"{self} reads the data tensor {self.name!r}; got {passed}. "
                f"Pass data={{{self.name!r}: tensor}} at the call"
            )
        return data[self.name]

    def classify(self, q: Regions, kv: Regions) -> Verdicts:
        return np.full(len(q), PARTIAL)

    @property
    def period(self) -> int | None:
        return None


class OfFlags(OfData):
    """Pairs decided by a bool tensor."""

    # For error messages: where an entry is True, and how to convert the opposite convention.
    true_where: ClassVar[str]
    conversion: ClassVar[str]

    def tensor(self, data: Data | None) -> Any:
        flags = super().tensor(data)
        if str(flags.dtype).removeprefix("torch.") != "bool":
            raise TypeError(
                f"data[{self.name!r}] must be a bool tensor, True where {self.true_where}; "
                f"got {flags.dtype}. {self.conversion}"
            )
        return flags

    def check_data(self, data: Data) -> None:
        self.tensor(data)


@dataclass(frozen=True, repr=False)
class DocumentIds(OfData):
    """ids[b, q] == ids[b, kv], for the data tensor `name` (B, positions)."""

    @property
    def query_names(self) -> tuple[str, ...]:
        return (self.name,)

    def allows(
        self, b: Positions, h: Positions, q: Positions, kv: Positions, data: Data | None = None
    ) -> Any:
        ids = self.tensor(data)
        row = row_of(ids, b)
        return ids[row, q] == ids[row, kv]

    def __repr__(self) -> str:
        return f"documents(ids={self.name!r})"


@dataclass(frozen=True, repr=False)
class DocumentLengths(Mask):
    """q and kv in the same one of consecutive documents.

    Positions past the last document are in no document.

    lengths: in tokens, one per document.
    table: the stops as a tensor, for compiled kernels.
    """

    lengths: tuple[int, ...]
    table: Any = field(default=None, compare=False)

    @cached_property
    def _stops(self) -> tuple[int, ...]:
        return tuple(itertools.accumulate(self.lengths))

    @cached_property
    def stops(self) -> IntArray:
        """The position after each document."""
        return np.array(self._stops, dtype=np.int64)

    @property
    def starts(self) -> IntArray:
        """The first position of each document."""
        return self.stops - np.array(self.lengths, dtype=np.int64)

    def allows(
        self, b: Positions, h: Positions, q: Positions, kv: Positions, data: Data | None = None
    ) -> Any:
        # With a table, as in compiled kernels, `rank` reads only the length of its first argument.
        stops = self.lengths
        if self.table is None:
            stops = self._stops
        document = rank(stops, q, self.table)
        return (document == rank(stops, kv, self.table)) & (document < len(self.lengths))

    def on(self, device: Any) -> Mask:
        return replace(self, table=as_tensor(self._stops, device))

    def classify(self, q: Regions, kv: Regions) -> Verdicts:
        first, last = self._document_of(q.first), self._document_of(q.last)
        kv_first, kv_last = self._document_of(kv.first), self._document_of(kv.last)
        outside = np.maximum(first, kv_first) >= len(self.lengths)
        return np.where(outside, EMPTY, same_group(first, last, kv_first, kv_last))

    def _document_of(self, positions: IntArray) -> IntArray:
        """Number of each position's document; past the last, the number of documents."""
        return np.searchsorted(self.stops, positions, side="right")

    @property
    def period(self) -> int | None:
        return None

    def keys_of(self, q: int, kv_len: int) -> tuple[range, ...] | None:
        stops = self._stops
        document = bisect.bisect_right(stops, q)
        if document == len(stops):
            return ()
        stop = stops[document]
        return (range(min(stop - self.lengths[document], kv_len), min(stop, kv_len)),)

    def shrink(self, q: range, kv: range) -> tuple[range, range]:
        kv = clip(kv, *self._reach(q))
        if not kv:
            return NOTHING
        return clip(q, *self._reach(kv)), kv

    def pairs(self, q: range, kv: range) -> int | None:
        # 1. The documents that both ranges touch.
        both_start, both_stop = max(q.start, kv.start), min(q.stop, kv.stop)
        first, last = np.searchsorted(self.stops, (both_start, both_stop), side="right")
        stops = self.stops[first : last + 1]
        starts = stops - np.array(self.lengths[first : last + 1], dtype=np.int64)
        # 2. The queries and keys of each document; Python integers where 64 bits may not suffice.
        queries, keys = _overlaps(q, starts, stops), _overlaps(kv, starts, stops)
        if len(stops) and stops[-1] > 2**31:
            queries, keys = queries.astype(object), keys.astype(object)
        return int((queries * keys).sum())

    def _reach(self, span: range) -> tuple[int, int]:
        """Start and stop of the documents that a range of tokens touches."""
        starts = (0, *self._stops)
        first = bisect.bisect_right(self._stops, span[0])
        last = min(bisect.bisect_right(self._stops, span[-1]), len(self.lengths) - 1)
        return starts[first], starts[last + 1]

    def __repr__(self) -> str:
        return f"documents(lengths={self.lengths!r})"

    def __str__(self) -> str:
        if not isinstance(self.lengths, tuple):  # a placeholder: the text has the numbers apart
            return repr(self)
        unit = f"of {sum(self.lengths):,} tokens"
        return f"documents(lengths={brief(self.lengths, unit, repr(self.lengths))})"


def _overlaps(side: range, starts: IntArray, stops: IntArray) -> Any:
    """Number of positions that a contiguous range shares with each document."""
    return np.maximum(np.minimum(stops, side.stop) - np.maximum(starts, side.start), 0)


def documents(ids: str | None = None, lengths: tuple[int, ...] | None = None) -> Mask:
    """Tokens see only their own document: packed training without leaks.

    ids: name of an integer data tensor (B, positions) passed at the call; new ids never cause a new
        plan or compilation.
    lengths: tokens per consecutive document, part of the structure; tokens past their sum see
        nothing.

    Raises ValueError unless exactly one of the two is passed.
    """
    if (ids is None) == (lengths is None):
        raise ValueError(
            "documents needs either ids (the name of a data tensor) or lengths; "
            f"got ids={ids!r}, lengths={lengths!r}"
        )
    if lengths is not None:
        lengths = arguments.integers("lengths", lengths, 0)
        arguments.integer("the sum of lengths", sum(lengths))
        return DocumentLengths(lengths)
    if not isinstance(ids, str):
        raise TypeError(
            f"ids must be the name of a data tensor; got {type(ids).__name__}. "
            "Write documents(ids='documents') and pass data={'documents': ids} at the call"
        )
    return DocumentIds(ids)


@dataclass(frozen=True, repr=False)
class Padding(OfFlags):
    """Keys whose entry in the bool tensor `name` (B, keys) is False."""

    true_where = "a key is padding"
    conversion = "If your mask is 1 where a key counts, pass mask == 0"

    def allows(
        self, b: Positions, h: Positions, q: Positions, kv: Positions, data: Data | None = None
    ) -> Any:
        padding = self.tensor(data)
        return ~padding[row_of(padding, b), kv] & (q == q)

    def __repr__(self) -> str:
        if self.name == "padding":
            return "padding()"
        return f"padding({self.name!r})"


def padding(name: str = "padding") -> Mask:
    """Keys that are not padding, by a bool data tensor (B, keys).

    name: the tensor's name; it is True where a key is padding, as in `key_padding_mask`.
    """
    if not isinstance(name, str):
        raise TypeError(
            f"name must be the name of a data tensor; got {type(name).__name__}. "
            "Pass the tensor itself as data={...} at the call"
        )
    return Padding(name)
