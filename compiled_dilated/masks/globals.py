"""Global tokens: visible to all queries, and they see all keys.

Longformer, arXiv 2004.05150; BigBird, arXiv 2007.14062.

global_tokens(2)                    the first two
global_tokens(positions=(0, 5))     # # # # # # #      fixed positions
                                    # . . . . # .
                                    ...
global_tokens(data="is_global")     by a bool tensor (B, positions) of the call
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from .. import arguments
from ..regions import EMPTY, FULL, PARTIAL, IntArray, Regions, Verdicts
from .core import MOST_RANGES, Data, Mask, Positions
from .data import OfFlags, row_of
from .leading import GlobalTokens
from .lookup import as_tensor, rank, runs
from .ranges import NOTHING, clip
from .summaries import brief


@dataclass(frozen=True, repr=False)
class GlobalPositions(Mask):
    """q or kv is one of `positions` (ascending)."""

    positions: tuple[int, ...]
    table: Any = field(default=None, compare=False)

    def allows(
        self, b: Positions, h: Positions, q: Positions, kv: Positions, data: Data | None = None
    ) -> Any:
        return self._contains(q) | self._contains(kv)

    def _contains(self, x: Positions) -> Any:
        return rank(self.positions, x, self.table) > rank(self.positions, x - 1, self.table)

    def on(self, device: Any) -> Mask:
        return replace(self, table=as_tensor(self.positions, device))

    @cached_property
    def _listed(self) -> IntArray:
        return np.asarray(self.positions, dtype=np.int64)

    def classify(self, q: Regions, kv: Regions) -> Verdicts:
        return np.maximum(self._classify_side(q), self._classify_side(kv))

    def _classify_side(self, side: Regions) -> Verdicts:
        """FULL, PARTIAL or EMPTY: whether all, some or no positions are global.

        Counted over first .. last of a region, gaps included, which is sound.
        """
        count = np.searchsorted(self._listed, side.last, side="right")
        count -= np.searchsorted(self._listed, side.first)
        is_full = count == side.last - side.first + 1
        return np.where(count == 0, EMPTY, np.where(is_full, FULL, PARTIAL))

    @property
    def period(self) -> int | None:
        return None

    def keys_of(self, q: int, kv_len: int) -> tuple[range, ...] | None:
        if len(self._within(range(q, q + 1))):
            return (range(kv_len),)
        keys = runs(self._within(range(kv_len)))
        if len(keys) > MOST_RANGES:
            return None
        return tuple(keys)

    def shrink(self, q: range, kv: range) -> tuple[range, range]:
        queries, keys = self._within(q), self._within(kv)
        if not len(queries) and not len(keys):
            return NOTHING
        # Without global keys only global queries have pairs, and the other way round.
        if not len(keys):
            q = clip(q, int(queries[0]), int(queries[-1]) + 1)
        if not len(queries):
            kv = clip(kv, int(keys[0]), int(keys[-1]) + 1)
        if not q or not kv:
            return NOTHING
        return q, kv

    def _within(self, span: range) -> IntArray:
        """Global positions from the start to the stop of a range."""
        return self._listed[slice(*np.searchsorted(self._listed, (span.start, span.stop)))]

    def pairs(self, q: range, kv: range) -> int | None:
        queries, keys = len(self._within(q)), len(self._within(kv))
        return queries * (kv.stop - kv.start) + (q.stop - q.start) * keys - queries * keys

    def __repr__(self) -> str:
        return f"global_tokens(positions={self.positions!r})"

    def __str__(self) -> str:
        if not isinstance(self.positions, tuple):  # a placeholder: the text has the numbers apart
            return repr(self)
        positions = brief(self.positions, "positions", repr(self.positions))
        return f"global_tokens(positions={positions})"


@dataclass(frozen=True, repr=False)
class GlobalData(OfFlags):
    """Pairs of a global query or key, by the bool tensor `name`.

    flags[b, q] or flags[b, kv], for flags (B, positions).
    """

    true_where = "a token is global"
    conversion = "If your mask is 1 where a token is global, pass mask == 1"

    @property
    def query_names(self) -> tuple[str, ...]:
        return (self.name,)

    def allows(
        self, b: Positions, h: Positions, q: Positions, kv: Positions, data: Data | None = None
    ) -> Any:
        flags = self.tensor(data)
        row = row_of(flags, b)
        return flags[row, q] | flags[row, kv]

    def __repr__(self) -> str:
        return f"global_tokens(data={self.name!r})"


def global_tokens(
    count: int | None = None,
    *,
    positions: Iterable[int] | None = None,
    data: str | None = None,
) -> Mask:
    """Tokens that see every key and that every query sees.

    Longformer, arXiv 2004.05150; BigBird, arXiv 2007.14062. Exactly one argument is passed.

    count: the first `count` tokens.
    positions: fixed positions in any order; those past the sequence have no effect.
    data: name of a bool data tensor (B, positions) passed at the call, True where a token is
        global; new values never cause a new plan.

    >>> global_tokens(positions=(17, 0))
    global_tokens(positions=(0, 17))
    """
    if sum(argument is not None for argument in (count, positions, data)) != 1:
        raise ValueError(
            "global_tokens needs one of count (the first tokens), positions, "
            "or data (the name of a data tensor); "
            f"got count={count!r}, positions={positions!r}, data={data!r}"
        )
    if count is not None:
        # global_tokens((0, 5)): positions in the place of the count.
        if arguments.is_iterable(count):
            raise TypeError(
                f"count must be an integer; got {type(count).__name__}. "
                "Write global_tokens(positions=...)"
            )
        return GlobalTokens(arguments.integer("count", count, 0))
    if positions is not None:
        # An iterator is read once; an empty list of positions is allowed.
        if arguments.is_iterable(positions) and not isinstance(positions, (str, bytes)):
            positions = tuple(positions)
        if positions == ():
            return GlobalPositions(())
        return GlobalPositions(tuple(sorted(set(arguments.integers("positions", positions, 0)))))
    if not isinstance(data, str):
        raise TypeError(
            f"data must be the name of a data tensor; got {type(data).__name__}. "
            "Write global_tokens(data='is_global') and pass data={'is_global': flags} at the call"
        )
    return GlobalData(data)
