"""What a mask is, and how masks join: `&`, `|`, `~`."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from ..regions import FULL, Regions, Verdicts, both, either, negate

# Positions are torch tensors in kernels and in the reference, numpy arrays while planning: `allows` uses operators alone.
Positions = Any
Data = Mapping[str, Any]

# Lists of more numbers are shown to people by their count.
MOST_SHOWN = 12


class Mask(ABC):
    """Which keys a query may attend to, as an expression over token positions.

    Two views of one truth: `allows` answers for single pairs, `classify` for whole tiles. A mask is hashable and equal by value.
    `repr` is the code that makes it; `str` is for people, long lists of numbers as their count and a digest. Positions are
    original token positions, whatever the order of execution.
    """

    @abstractmethod
    def allows(self, b: Positions, h: Positions, q: Positions, kv: Positions, data: Data | None = None) -> Any:
        """Elementwise over broadcast batch index, head index, query position and key position: True where q may see kv.

        This is FlexAttention's `mask_mod` with the named data tensors as an extra argument.
        """

    @abstractmethod
    def classify(self, q: Regions, kv: Regions) -> Verdicts:
        """EMPTY, PARTIAL or FULL for each pair of regions (same length); EMPTY and FULL are promises, PARTIAL is always right."""

    @property
    @abstractmethod
    def period(self) -> int | None:
        """The mask is unchanged when query and key both move by a multiple of this; 1: by anything; None: by nothing known."""

    @property
    def side_periods(self) -> tuple[int | None, int | None]:
        """The same where the query alone moves, and where the key alone does."""
        return None, None

    def expanded(self) -> Mask:
        """The same pairs as an expression of masks with more symmetries, for counting and cutting."""
        return self._map(lambda part: part.expanded())

    @property
    def parts(self) -> tuple[Mask, ...]:
        """The masks that this one is made of."""
        return ()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the data tensors that the mask reads, sorted."""
        return tuple(sorted({name for part in self.parts for name in part.names}))

    @property
    def query_names(self) -> tuple[str, ...]:
        """Those of `names` that are read at the query's position too, not at the key's alone."""
        return tuple(sorted({name for part in self.parts for name in part.query_names}))

    def check_data(self, data: Data) -> None:
        """Raise TypeError where a data tensor is not of the dtype that the mask reads."""
        for part in self.parts:
            part.check_data(data)

    @property
    def per_call(self) -> bool:
        """Whether the mask may differ from call to call, or inside a batch: it reads data, or the batch index."""
        return bool(self.names) or any(part.per_call for part in self.parts)

    def at_head(self, head: int, heads: int) -> Mask:
        """The mask of one query head out of `heads`: equal for heads that see the same pairs."""
        return self._map(lambda part: part.at_head(head, heads))

    def for_heads(self, heads: int) -> Mask:
        """The same mask with every rule over heads written out for `heads` of them, so that `allows` needs no more to answer."""
        return self._map(lambda part: part.for_heads(heads))

    def on(self, device: Any) -> Mask:
        """The same mask with its lookup tables as tensors on a device: compiled kernels can read such, not make them."""
        return self._map(lambda part: part.on(device))

    def _map(self, change: Callable[[Mask], Mask]) -> Mask:
        """The same expression over its changed parts."""
        return self

    def keys_of(self, q: int, kv_len: int) -> tuple[range, ...] | None:
        """The keys below kv_len that the query at position q sees, as disjoint ranges; None where they are no few ranges."""
        return None

    def shrink(self, q: range, kv: range) -> tuple[range, range]:
        """Parts of q and of kv that hold every allowed pair of theirs: what has to be moved and computed. May be too large."""
        return q, kv

    def pairs(self, q: range, kv: range) -> int | None:
        """Number of allowed pairs of two runs of positions (step 1), where there is a formula; None elsewhere."""
        return None

    @property
    def is_bounded(self) -> bool:
        """Whether there are positions of which the mask says nothing, so that `check` may fail."""
        return type(self).check is not Mask.check or any(part.is_bounded for part in self.parts)

    def check(self, queries: range, keys: int) -> None:
        """Raise ValueError if the mask says nothing about the positions `queries` or about keys below `keys`."""
        for part in self.parts:
            part.check(queries, keys)

    def __and__(self, other: Mask) -> Mask:
        return And(_flat(And, self, _mask(other, "&")))

    def __or__(self, other: Mask) -> Mask:
        return Or(_flat(Or, self, _mask(other, "|")))

    def __invert__(self) -> Mask:
        return Not(self)

    def __bool__(self) -> NoReturn:
        raise TypeError(
            f"the mask {self} has no truth value: `and`, `or`, `not` and `if` cannot combine masks. "
            "Write `a & b`, `a | b` or `~a`"
        )


def _mask(value: object, operator: str) -> Mask:
    if not isinstance(value, Mask):
        way = getattr(value, "how_to_join", "Use one of compiled_dilated.masks")
        raise TypeError(f"`{operator}` joins two masks; got {type(value).__name__} {value}. {way}")
    return value


def _flat(kind: type[And] | type[Or], *masks: Mask) -> tuple[Mask, ...]:
    return tuple(part for mask in masks for part in (mask.parts if isinstance(mask, kind) else (mask,)))


def _common_period(masks: tuple[Mask, ...]) -> int | None:
    periods = [mask.period for mask in masks]
    known = [period for period in periods if period is not None]
    return math.lcm(*known) if len(known) == len(periods) else None


def _operand(mask: Mask, write: Callable[[Mask], str]) -> str:
    return f"({write(mask)})" if isinstance(mask, (And, Or)) else write(mask)


def brief(numbers: Sequence[int], unit: str, code: str) -> str:
    """A long list of numbers as their count and a digest, for people; of a short one the code."""
    if len(numbers) <= MOST_SHOWN:
        return code
    digest = hashlib.blake2b(np.asarray(numbers, dtype=np.int64).tobytes(), digest_size=4).hexdigest()
    return f"<{len(numbers):,} {unit}, digest {digest}>"


@dataclass(frozen=True, repr=False)
class _Joined(Mask):
    """Several masks as one."""

    masks: tuple[Mask, ...]

    @property
    def period(self) -> int | None:
        return _common_period(self.masks)

    @property
    def parts(self) -> tuple[Mask, ...]:
        return self.masks

    def _map(self, change: Callable[[Mask], Mask]) -> Mask:
        return type(self)(tuple(change(mask) for mask in self.masks))


@dataclass(frozen=True, repr=False)
class And(_Joined):
    """Pairs that every part allows. Made by `a & b`."""

    def allows(self, b: Positions, h: Positions, q: Positions, kv: Positions, data: Data | None = None) -> Any:
        out = self.masks[0].allows(b, h, q, kv, data)
        for mask in self.masks[1:]:
            out = out & mask.allows(b, h, q, kv, data)
        return out

    def classify(self, q: Regions, kv: Regions) -> Verdicts:
        out = self.masks[0].classify(q, kv)
        for mask in self.masks[1:]:
            out = both(out, mask.classify(q, kv))
        return out

    def keys_of(self, q: int, kv_len: int) -> tuple[range, ...] | None:
        out = self.masks[0].keys_of(q, kv_len)
        for mask in self.masks[1:]:
            seen = mask.keys_of(q, kv_len)
            if out is None or seen is None:
                return None
            if len(out) == len(seen) == 1:  # once for every token that is decoded, so without a loop
                out = (intersection(out[0], seen[0]),)
            else:
                out = tuple(common for a in out for b in seen if (common := intersection(a, b)))
        return out

    def shrink(self, q: range, kv: range) -> tuple[range, range]:
        # Twice: what one mask leaves of the queries may leave fewer keys to another.
        for mask in self.masks * 2:
            q, kv = mask.shrink(q, kv)
            if not q or not kv:
                return NOTHING
        return q, kv

    def __repr__(self) -> str:
        return " & ".join(_operand(mask, repr) for mask in self.masks)

    def __str__(self) -> str:
        return " & ".join(_operand(mask, str) for mask in self.masks)


@dataclass(frozen=True, repr=False)
class Or(_Joined):
    """Pairs that any part allows. Made by `a | b`."""

    def allows(self, b: Positions, h: Positions, q: Positions, kv: Positions, data: Data | None = None) -> Any:
        out = self.masks[0].allows(b, h, q, kv, data)
        for mask in self.masks[1:]:
            out = out | mask.allows(b, h, q, kv, data)
        return out

    def classify(self, q: Regions, kv: Regions) -> Verdicts:
        out = self.masks[0].classify(q, kv)
        for mask in self.masks[1:]:
            out = either(out, mask.classify(q, kv))
        return out

    def keys_of(self, q: int, kv_len: int) -> tuple[range, ...] | None:
        found = [mask.keys_of(q, kv_len) for mask in self.masks]
        spans = [span for seen in found if seen is not None for span in seen if span]
        if None in found or any(span.step != 1 for span in spans):
            return None
        out: list[range] = []
        for span in sorted(spans, key=lambda span: span.start):
            if out and span.start <= out[-1].stop:
                out[-1] = range(out[-1].start, max(out[-1].stop, span.stop))
            else:
                out.append(span)
        return tuple(out)

    def shrink(self, q: range, kv: range) -> tuple[range, range]:
        found = [part for mask in self.masks if all(part := mask.shrink(q, kv))]
        return (hull([part[0] for part in found]), hull([part[1] for part in found])) if found else NOTHING

    def __repr__(self) -> str:
        return " | ".join(_operand(mask, repr) for mask in self.masks)

    def __str__(self) -> str:
        return " | ".join(_operand(mask, str) for mask in self.masks)


@dataclass(frozen=True, repr=False)
class Not(Mask):
    """Pairs that the mask forbids. Made by `~a`."""

    mask: Mask

    def allows(self, b: Positions, h: Positions, q: Positions, kv: Positions, data: Data | None = None) -> Any:
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
        borders = [
            0,
            *(at for span in sorted(seen, key=lambda span: span.start) if span for at in (span.start, span.stop)),
            kv_len,
        ]
        return tuple(range(a, b) for a, b in zip(borders[::2], borders[1::2], strict=True) if a < b)

    def __repr__(self) -> str:
        return f"~{_operand(self.mask, repr)}"

    def __str__(self) -> str:
        return f"~{_operand(self.mask, str)}"


@dataclass(frozen=True, repr=False)
class Full(Mask):
    """Every pair."""

    def allows(self, b: Positions, h: Positions, q: Positions, kv: Positions, data: Data | None = None) -> Any:
        return q - q == kv - kv

    def classify(self, q: Regions, kv: Regions) -> Verdicts:
        return np.full(len(q), FULL)

    @property
    def period(self) -> int | None:
        return 1

    @property
    def side_periods(self) -> tuple[int | None, int | None]:
        return 1, 1

    def keys_of(self, q: int, kv_len: int) -> tuple[range, ...] | None:
        return (range(kv_len),)

    def pairs(self, q: range, kv: range) -> int | None:
        return (q.stop - q.start) * (kv.stop - kv.start)

    def __repr__(self) -> str:
        return "full()"


def full() -> Mask:
    """Every query sees every key."""
    return Full()


NOTHING = (range(0), range(0))


def clip(span: range, low: int, high: int) -> range:
    """What of a range (step positive) lies in low <= x < high."""
    start = span.start + max(0, -((span.start - low) // span.step)) * span.step
    return range(start, min(span.stop, high), span.step)


def hull(spans: Sequence[range]) -> range:
    """The smallest range that holds some non-empty ranges."""
    first = min(span[0] for span in spans)
    step = math.gcd(*(span.step for span in spans if len(span) > 1), *(span[0] - first for span in spans))
    return range(first, max(span[-1] for span in spans) + 1, step or 1)


def intersection(a: range, b: range) -> range:
    """The numbers in both ranges (steps positive), by the Chinese remainder theorem."""
    if a.step == b.step == 1:
        return range(max(a.start, b.start), min(a.stop, b.stop))
    shared = math.gcd(a.step, b.step)
    if (b.start - a.start) % shared:
        return range(0)
    step = a.step // shared * b.step
    ahead = (b.start - a.start) // shared * pow(a.step // shared, -1, b.step // shared) % (b.step // shared)
    first = a.start + ahead * a.step
    start = max(a.start, b.start)
    return range(first + -(-(start - first) // step) * step, min(a.stop, b.stop), step)


def conjuncts(mask: Mask) -> tuple[Mask, ...]:
    """The masks whose `&` is this mask; `full()` is the empty conjunction."""
    if isinstance(mask, And):
        return tuple(part for each in mask.masks for part in conjuncts(each))
    return () if isinstance(mask, Full) else (mask,)


def conjunction(masks: tuple[Mask, ...]) -> Mask:
    """The mask whose `conjuncts` these are."""
    return Full() if not masks else masks[0] if len(masks) == 1 else And(masks)


def disjoint(mask: Mask) -> list[Mask]:
    """Masks without common pairs whose union is the mask: `a & (b | c)` is `a & b` and `a & c & ~b`."""
    parts = conjuncts(mask)
    for i, part in enumerate(parts):
        if isinstance(part, Or):
            rest = parts[:i] + parts[i + 1 :]
            return [
                conjunction((*rest, *conjuncts(each), *(~before for before in part.masks[:number])))
                for number, each in enumerate(part.masks)
            ]
    return [mask]
