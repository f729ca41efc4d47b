"""Conditions of a pair as masks.

q - kv <= 5 and kv <= q          window(5, 0)
ids[b, q] == ids[b, kv]          documents(ids="documents"), a data tensor
not seen[b, kv]                  padding(), a data tensor
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ... import masks
from ...masks import Mask
from ...masks.leading import LeadingQueries
from ..reading.expressions import Apply, Entry, Expression, Number, indices_of, slots_of
from ..reading.simplify import negated
from .spans import FAR, blocks_from_on, blocks_up_to, from_on, merged, up_to
from .sums import KV, Q, Sum, block, block_of, difference, sum_of


@dataclass
class DataTensors:
    """The data tensors that masks read.

    square: whether a call has as many queries as keys.
    taken: names of other data of the call.
    entries: by name, the entry of a tensor for "b" and "kv".
    """

    square: bool
    taken: tuple[str, ...] = ()
    entries: dict[str, Expression] = field(default_factory=dict)

    def name_of(self, kind: str, entry: Expression) -> str:
        """The name of a tensor with these entries: kind, kind2, ..."""
        name, number = kind, 1
        while name in self.taken or self.entries.setdefault(name, entry) != entry:
            number += 1
            name = f"{kind}{number}"
        return name

    def copy(self) -> DataTensors:
        """A copy, for an attempt that may fail."""
        return DataTensors(self.square, self.taken, dict(self.entries))


def mask_of(condition: Expression, data: DataTensors) -> Mask | None:
    """The mask of a condition; None if there is none.

    data: tensors that the mask reads are added to it.
    """
    if isinstance(condition, Number):
        return masks.full() if condition.value else ~masks.full()
    of_keys = indices_of(condition) <= {"b", "kv"}
    # A condition of keys that reads tensors depends on data: never a mask of positions.
    if of_keys and slots_of(condition):
        return _padding(condition, data)
    mask: Mask | None = None
    if isinstance(condition, Apply):
        if condition.operator in ("and", "or", "not"):
            mask = _joined(condition, data)
        elif condition.operator in ("eq", "ne", "lt", "le", "gt", "ge"):
            mask = _compared(condition, data)
    if mask is None and of_keys:
        return _padding(condition, data)
    return mask


def _padding(condition: Expression, data: DataTensors) -> Mask:
    """Keys hidden by a tensor (B, M), True where hidden."""
    return masks.padding(data.name_of("padding", negated(condition)))


def _joined(condition: Apply, data: DataTensors) -> Mask | None:
    """`and`, `or` or `not` of masks; None if an operand is none."""
    parts = []
    for operand in condition.operands:
        part = mask_of(operand, data)
        if part is None:
            return None
        parts.append(part)
    if condition.operator == "not":
        return ~parts[0]
    if condition.operator == "and":
        return parts[0] & parts[1]
    return parts[0] | parts[1]


def _compared(condition: Apply, data: DataTensors) -> Mask | None:
    """The mask of a comparison of whole numbers."""
    x, y = condition.operands
    if x.dtype.is_floating_point or y.dtype.is_floating_point or torch.bool in (x.dtype, y.dtype):
        return None
    name = condition.operator
    if name in ("eq", "ne"):
        equal = _equal(x, y, data)
        if equal is None or name == "eq":
            return equal
        return ~equal
    # x >= y as x - y >= 0, x > y as x - y - 1 >= 0.
    greater, less = (x, y) if name in ("ge", "gt") else (y, x)
    surplus = difference(greater, less)
    if surplus is None:
        return None
    if name in ("gt", "lt"):
        surplus = surplus.plus(Sum({}, -1))
    return _not_negative(surplus)


# Equations -------------------------------------------------------------------------------------


def _equal(x: Expression, y: Expression, data: DataTensors) -> Mask | None:
    documents = _documents(x, y, data)
    if documents is not None:
        return documents
    if isinstance(x, Apply) and x.operator == "mod" and isinstance(x.operands[1], Number):
        return _congruent(x, y)
    both = difference(x, y)
    if both is None:
        return None
    segment = _segment(both)
    if segment is not None:
        return masks.segments(segment)
    # x == y as x - y >= 0 and y - x >= 0.
    least, most = _not_negative(both), _not_negative(both.times(-1))
    if least is None or most is None:
        return None
    return masks.conjunction(tuple(merged([least, most])))


def _documents(x: Expression, y: Expression, data: DataTensors) -> Mask | None:
    """ids[b, q] == ids[b, kv]."""
    if not (data.square and isinstance(x, Entry) and isinstance(y, Entry) and x.slot == y.slot):
        return None
    for of_query, of_key in ((x, y), (y, x)):
        sides = indices_of(of_query) <= {"b", "q"} and indices_of(of_key) <= {"b", "kv"}
        # The same entry for a query's and a key's position.
        as_of_key: list[Expression] = []
        for index in of_query.indices:
            as_of_key.append(KV if index == Q else index)
        if sides and tuple(as_of_key) == of_key.indices and of_key.indices[-1] == KV:
            return masks.documents(ids=data.name_of("documents", of_key))
    return None


def _congruent(x: Apply, y: Expression) -> Mask | None:
    """The mask of pairs whose distance is divisible by a rate.

    x == y is (q - kv) % rate == 0, or q % rate == kv % rate.
    """
    inner, modulus = x.operands
    assert isinstance(modulus, Number)
    rate = int(modulus.value)
    if isinstance(y, Apply) and y.operator == "mod" and y.operands[1] == modulus:
        distance = difference(inner, y.operands[0])
    elif isinstance(y, Number) and y.value == 0:
        distance = sum_of(inner)
    else:
        return None
    if rate < 1 or distance is None or distance.number % rate:
        return None
    if distance.terms not in ({Q: 1, KV: -1}, {Q: -1, KV: 1}):
        return None
    return masks.window(FAR, FAR, rate)


def _segment(both: Sum) -> int | None:
    """The block size of a difference of blocks; None for other sums.

    The difference is q // size - kv // size.
    """
    size = _block_size(both)
    if size is None or both.number != 0:
        return None
    return size


def _block_size(both: Sum) -> int | None:
    """The block size of a difference of blocks plus a number."""
    for term in both.terms:
        size = block_of(term)
        if size is None:
            return None
        q_block, kv_block = block(Q, size), block(KV, size)
        if both.terms in ({q_block: 1, kv_block: -1}, {q_block: -1, kv_block: 1}):
            return size
    return None


# Inequalities ----------------------------------------------------------------------------------


def _not_negative(surplus: Sum) -> Mask | None:
    """The mask of surplus >= 0."""
    terms, number = surplus.terms, surplus.number
    if terms == {Q: 1, KV: -1}:
        return up_to(number)
    if terms == {Q: -1, KV: 1}:
        return from_on(number)
    if len(terms) <= 1:
        return _of_one_side(surplus)
    size = _block_size(surplus)
    if size is None:
        return None
    if terms[block(Q, size)] == 1:
        return blocks_up_to(size, number)
    return blocks_from_on(size, number)


def _of_one_side(surplus: Sum) -> Mask | None:
    """The mask of a bound of queries, keys or a distance."""
    terms, number = surplus.terms, surplus.number
    # A bound that every index meets, or none.
    if not terms or terms in ({KV: 1}, {Q: 1}):
        if number >= 0:
            return masks.full()
        if not terms:
            return ~masks.full()
        return ~masks.sinks(-number) if KV in terms else ~LeadingQueries(-number)
    if terms in ({KV: -1}, {Q: -1}):
        if number < 0:
            return ~masks.full()
        return masks.sinks(number + 1) if KV in terms else LeadingQueries(number + 1)
    return _of_distance(surplus)


def _of_distance(surplus: Sum) -> Mask | None:
    """abs(x) <= number, or abs(x) >= -number."""
    ((term, factor),) = surplus.terms.items()
    if not isinstance(term, Apply) or term.operator != "abs" or factor not in (1, -1):
        return None
    inner = sum_of(term.operands[0])
    if inner is None:
        return None
    # factor * abs(x) + number >= 0: of both signs of x for factor -1, of either for 1.
    number = Sum({}, surplus.number)
    first, second = (_not_negative(inner.times(sign).plus(number)) for sign in (factor, -factor))
    if first is None or second is None:
        return None
    if factor < 0:
        return masks.conjunction(tuple(merged([first, second])))
    return first | second
