"""The base class of masks, and how masks join: `&`, `|`, `~`."""

from __future__ import annotations

import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

from .. import arguments
from ..regions import Regions, Verdicts, both, either, negate
from .ranges import NOTHING, common_ranges, gaps, hull, union

# torch tensors in kernels and in the reference, numpy arrays while planning: `allows` is limited
# to operators that both have.
Positions = Any
Data = Mapping[str, Any]
# `keys_of` returns at most this many ranges; a query with more evaluates its mask.
MOST_RANGES = 64


class Mask(ABC):
    """Keys visible to a query, as an expression over token positions.

    `allows` defines the mask for single pairs. All other methods must agree with it: `classify` and
    `period` are required; `keys_of`, `shrink`, `pairs` and `side_periods` have safe defaults and
    make planning faster. A mask is hashable and equal by value. `repr` is the code that creates it;
    `str` is for people and abbreviates long lists of numbers.

    Positions are original token positions, in every order of execution.
    """

    @abstractmethod
    def allows(
        self, b: Positions, h: Positions, q: Positions, kv: Positions, data: Data | None = None
    ) -> Any:
        """True where query position q may see key position kv.

        FlexAttention's `mask_mod` with one more argument. All four indices broadcast.

        b, h: batch index and query head.
        data: the call's data tensors by name.
        """

    @abstractmethod
    def classify(self, q: Regions, kv: Regions) -> Verdicts:
        """EMPTY, PARTIAL or FULL for pairs of regions, two equally long lists.

        EMPTY and FULL are promises; PARTIAL is always correct.
        """

    @property
    @abstractmethod
    def period(self) -> int | None:
        """Shift of query and key that leaves the mask unchanged.

        1: every shift. None: no shift, or none that is certain.
        """

    @property
    def side_periods(self) -> tuple[int | None, int | None]:
        """Periods under shifts of only the query, and of only the key."""
        return None, None

    def expanded(self) -> Mask:
        """An equal expression of masks with more symmetries, for counting and cutting."""
        return self._map(lambda part: part.expanded())

    @property
    def parts(self) -> tuple[Mask, ...]:
        """The masks that this one is composed of."""
        return ()

    def walk(self) -> Iterator[Mask]:
        """All masks of the expression, parts before the mask that joins them."""
        for part in self.parts:
            yield from part.walk()
        yield self

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the data tensors that the mask reads, sorted."""
        names: set[str] = set()
        for part in self.parts:
            names.update(part.names)
        return tuple(sorted(names))

    @property
    def query_names(self) -> tuple[str, ...]:
        """The `names` that are read at the query's position too."""
        names: set[str] = set()
        for part in self.parts:
            names.update(part.query_names)
        return tuple(sorted(names))

    def check_data(self, data: Data) -> None:
        """Raise TypeError if a data tensor has the wrong dtype."""
        for part in self.parts:
            part.check_data(data)

    @property
    def per_call(self) -> bool:
        """Whether the mask depends on data or on the batch index."""
        return bool(self.names) or any(part.per_call for part in self.parts)

    def at_head(self, head: int, heads: int) -> Mask:
        """The mask of one query head.

        Equal for heads that see the same pairs.
        """
        return self._map(lambda part: part.at_head(head, heads))

    def for_heads(self, heads: int) -> Mask:
        """The mask with its per-head rules written out for `heads` heads.

        `allows` then needs no other information.
        """
        return self._map(lambda part: part.for_heads(heads))

    def on(self, device: Any) -> Mask:
        """The mask with its lookup tables as tensors on a device.

        Compiled kernels can read such tensors but not create them.
        """
        return self._map(lambda part: part.on(device))

    def _map(self, change: Callable[[Mask], Mask]) -> Mask:
        """Rebuild the expression with `change` applied to its parts."""
        return self

    def keys_of(self, q: int, kv_len: int) -> tuple[range, ...] | None:
        """Keys below kv_len that query q sees, as disjoint ranges.

        None if they are not a few ranges.
        """
        return None

    def shrink(self, q: range, kv: range) -> tuple[range, range]:
        """Subsets of q and kv that contain all allowed pairs.

        They may be larger than necessary.
        """
        return q, kv

    def pairs(self, q: range, kv: range) -> int | None:
        """Number of allowed pairs of two contiguous ranges; None without a formula."""
        return None

    @property
    def is_bounded(self) -> bool:
        """Whether `check` may fail: the mask is undefined past some position."""
        return type(self).check is not Mask.check or any(part.is_bounded for part in self.parts)

    def check(self, queries: range, keys: int) -> None:
        """Raise ValueError if the mask is undefined for these queries or keys.

        queries: positions of the queries.
        keys: number of keys, from position 0 on.
        """
        for part in self.parts:
            part.check(queries, keys)

    def __and__(self, mask: Mask) -> Mask:
        return And(_flat(And, self, _mask(mask, "&")))

    def __or__(self, mask: Mask) -> Mask:
        return Or(_flat(Or, self, _mask(mask, "|")))

    def __invert__(self) -> Mask:
        return Not(self)

    def __bool__(self) -> NoReturn:
        raise TypeError(
            f"the mask {self} has no truth value: "
            "`and`, `or`, `not` and `if` cannot combine masks. "
            "Write `a & b`, `a | b` or `~a`"
        )


def _mask(value: object, symbol: str) -> Mask:
    """Check the right operand of `&` or `|`."""
    if not isinstance(value, Mask):
        remedy = "Use one of compiled_dilated.masks"
        if callable(value):
            remedy = "Pass masks.from_mod(fn) for a function of FlexAttention; call masks.causal()"
        remedy = getattr(value, "how_to_join", remedy)
        raise TypeError(
            f"`{symbol}` joins two masks; got {arguments.kind_and_text(value)}. {remedy}",
        )
    return value


def _flat(kind: type[And] | type[Or], *masks: Mask) -> tuple[Mask, ...]:
    """Operands of one associative join, without nested joins of the same kind."""
    out: list[Mask] = []
    for mask in masks:
        if isinstance(mask, kind):
            out += mask.parts
        else:
            out.append(mask)
    return tuple(out)


def _common_period(masks: tuple[Mask, ...]) -> int | None:
    """Least common multiple of all periods; None if one is unknown."""
    out = 1
    for mask in masks:
        period = mask.period
        if period is None:
            return None
        out = math.lcm(out, period)
    return out


def _operand(mask: Mask, write: Callable[[Mask], str]) -> str:
    """Text of an operand, in parentheses if it is a join."""
    if isinstance(mask, (And, Or)):
        return f"({write(mask)})"
    return write(mask)


@dataclass(frozen=True, repr=False)
class _Joined(Mask):
    """Several masks joined by one operator."""

    masks: tuple[Mask, ...]

    # The operator in code; on truth values of single pairs; on verdicts of regions.
    symbol: ClassVar[str]
    on_pairs: ClassVar[Callable[[Any, Any], Any]]
    on_verdicts: ClassVar[Callable[[Verdicts, Verdicts], Verdicts]]

    def allows(
        self, b: Positions, h: Positions, q: Positions, kv: Positions, data: Data | None = None
    ) -> Any:
        join = type(self).on_pairs
        out = self.masks[0].allows(b, h, q, kv, data)
        for mask in self.masks[1:]:
            out = join(out, mask.allows(b, h, q, kv, data))
        return out

    def classify(self, q: Regions, kv: Regions) -> Verdicts:
        join = type(self).on_verdicts
        out = self.masks[0].classify(q, kv)
        for mask in self.masks[1:]:
            out = join(out, mask.classify(q, kv))
        return out

    @property
    def period(self) -> int | None:
        return _common_period(self.masks)

    @property
    def parts(self) -> tuple[Mask, ...]:
        return self.masks

    def _map(self, change: Callable[[Mask], Mask]) -> Mask:
        return type(self)(tuple(change(mask) for mask in self.masks))

    def _written(self, write: Callable[[Mask], str]) -> str:
        return f" {self.symbol} ".join(_operand(mask, write) for mask in self.masks)

    def __repr__(self) -> str:
        return self._written(repr)

    def __str__(self) -> str:
        return self._written(str)


@dataclass(frozen=True, repr=False)
class And(_Joined):
    """Pairs that every part allows: `a & b`."""

    symbol = "&"
    on_pairs = operator.and_
    on_verdicts = both

    def keys_of(self, q: int, kv_len: int) -> tuple[range, ...] | None:
        out = self.masks[0].keys_of(q, kv_len)
        for mask in self.masks[1:]:
            visible = mask.keys_of(q, kv_len)
            if out is None or visible is None:
                return None
            out = common_ranges(out, visible)
        return out

    def shrink(self, q: range, kv: range) -> tuple[range, range]:
        # Twice: queries that one mask removes may remove keys of an earlier mask.
        for mask in self.masks * 2:
            q, kv = mask.shrink(q, kv)
            if not q or not kv:
                return NOTHING
        return q, kv


@dataclass(frozen=True, repr=False)
class Or(_Joined):
    """Pairs that any part allows: `a | b`."""

    symbol = "|"
    on_pairs = operator.or_
    on_verdicts = either

    def keys_of(self, q: int, kv_len: int) -> tuple[range, ...] | None:
        spans: list[range] = []
        for mask in self.masks:
            visible = mask.keys_of(q, kv_len)
            if visible is None or any(span and span.step != 1 for span in visible):
                return None
            spans += filter(None, visible)
        return union(spans)

    def shrink(self, q: range, kv: range) -> tuple[range, range]:
        queries: list[range] = []
        keys: list[range] = []
        for mask in self.masks:
            rows, columns = mask.shrink(q, kv)
            if rows and columns:
                queries.append(rows)
                keys.append(columns)
        if not queries:
            return NOTHING
        return hull(queries), hull(keys)


@dataclass(frozen=True, repr=False)
class Not(Mask):
    """Pairs that the mask forbids: `~a`."""

    mask: Mask

    def allows(
        self, b: Positions, h: Positions, q: Positions, kv: Positions, data: Data | None = None
    ) -> Any:
        return ~self.mask.allows(b, h, q, kv, data)

    def classify(self, q: Regions, kv: Regions) -> Verdicts:
        return negate(self.mask.classify(q, kv))

    @property
    def period(self) -> int | None:
        return self.mask.period

    @property
    def parts(self) -> tuple[Mask, ...]:
        return (self.mask,)

    def _map(self, change: Callable[[Mask], Mask]) -> Mask:
        return Not(change(self.mask))

    def __invert__(self) -> Mask:
        return self.mask

    def keys_of(self, q: int, kv_len: int) -> tuple[range, ...] | None:
        seen = self.mask.keys_of(q, kv_len)
        if seen is None or any(span.step != 1 for span in seen):
            return None
        return gaps(seen, kv_len)

    def __repr__(self) -> str:
        return f"~{_operand(self.mask, repr)}"

    def __str__(self) -> str:
        return f"~{_operand(self.mask, str)}"
