"""What a mask of a call says: masks of this library that are known before any data, data that joins them, and the rest by pairs.

    (kv <= q) & seen[b, kv]  ->  causal() & padding("padding"), "padding" being ~seen[b, kv] for every key

Nothing is left out: a condition that no mask says hides pairs one by one, what is added to scores is added.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .. import masks
from ..masks import Mask
from ..masks.bands import Causal, Window
from ..masks.blocks import BlockWindow
from ..masks.functions import MOST_PAIRS_WITHOUT_WITHIN
from ..masks.leading import LeadingQueries
from .expressions import (
    TRUE,
    Apply,
    Entry,
    Expression,
    Index,
    Number,
    apply,
    evaluate,
    indices_of,
    negated,
    slots_of,
    values_of,
)

# A window without an end, beyond any sequence.
FAR = 2**30


@dataclass
class Structure:
    """What a mask says.

    masks: seen pairs are those of all of them. data: by the names of data tensors their entries, of "b" and "kv".
    pairs: a condition that is left; bias: what is added to scores.
    """

    masks: list[Mask] = field(default_factory=list)
    data: dict[str, Expression] = field(default_factory=dict)
    pairs: Expression = TRUE
    bias: Expression | None = None

    def __str__(self) -> str:
        said = [repr(mask) for mask in self.masks] + ["a mask"] * (self.pairs != TRUE)
        return " & ".join(said or ["full()"]) + (" + a bias" if self.bias is not None else "")


@dataclass
class _Joins:
    """Data that joins masks, and whether there are as many queries as keys."""

    square: bool
    data: dict[str, Expression] = field(default_factory=dict)


def structure_of(mask: Expression, q_len: Any, kv_len: Any) -> Structure:
    """What a mask of bool (True: seen) or of numbers (added to scores) says.

    q_len, kv_len: of the call; symbolic where they vary.
    """
    square = bool(statically_known_true(q_len == kv_len))
    conditions, bias = (mask, None) if mask.dtype == torch.bool else _split(mask, square)
    said = Structure(bias=bias)
    for condition in _conjuncts(conditions):
        joins = _Joins(square, dict(said.data))
        found = _mask_of(condition, joins)
        if found is None:
            said.pairs = apply("and", (said.pairs, condition), torch.bool)
            continue
        said.data = joins.data
        said.masks.append(found)
    # Those of positions first.
    said.masks = sorted(merged(said.masks), key=lambda mask: bool(mask.names))
    if (
        isinstance(q_len, int)
        and isinstance(kv_len, int)
        and q_len * kv_len <= MOST_PAIRS_WITHOUT_WITHIN
    ):
        _plan_arithmetic(said)
    return said


def _plan_arithmetic(said: Structure) -> None:
    """Make a mask of those conditions left that are arithmetic of positions alone: tiles without a pair are left out then."""
    rest = _conjuncts(said.pairs)
    arithmetic = [each for each in rest if not slots_of(each) and "b" not in indices_of(each)]
    if not arithmetic:
        return
    within = masks.conjunction(tuple(said.masks))
    said.masks = [masks.from_mod(MaskOfCall(_all(arithmetic)), within)]
    said.pairs = _all([each for each in rest if each not in arithmetic])


def _all(conditions: Sequence[Expression]) -> Expression:
    joined: Expression = TRUE
    for condition in conditions:
        joined = apply("and", (joined, condition), torch.bool)
    return joined


@dataclass(frozen=True)
class MaskOfCall:
    """A condition as a mask_mod."""

    condition: Expression

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        seen: Tensor = evaluate(self.condition, {"b": b, "h": h, "q": q_idx, "kv": kv_idx}, ())
        return seen


def _conjuncts(condition: Expression) -> list[Expression]:
    """Conditions that all have to be true."""
    if isinstance(condition, Apply) and condition.operator == "and":
        return [part for operand in condition.operands for part in _conjuncts(operand)]
    if isinstance(condition, Apply) and condition.operator == "not":
        inner = condition.operands[0]
        if isinstance(inner, Apply) and inner.operator == "or":
            return [part for operand in inner.operands for part in _conjuncts(negated(operand))]
    return [] if condition == TRUE else [condition]


# Numbers added to scores ------------------------------------------------------------------------------------------------------


def _split(mask: Expression, square: bool) -> tuple[Expression, Expression | None]:
    """Numbers added to scores as a condition, outside of which they are -inf, and what is added inside; None for 0."""
    values = values_of(mask)
    if values is not None and values.keys() <= {0.0, -math.inf}:
        return values.get(0.0, negated(TRUE)), None
    if (
        values is not None
        and values.keys() <= {0.0, _least(mask.dtype)}
        and _shows_itself(values.get(0.0, TRUE), square)
    ):
        # Each row has a key at 0, beside which the least number of a dtype is as good as -inf.
        return values.get(0.0, TRUE), None
    if isinstance(mask, Apply) and mask.operator == "add":
        (first, one), (second, other) = (_split(operand, square) for operand in mask.operands)
        biases = [bias for bias in (one, other) if bias is not None]
        bias = (
            apply("add", biases, mask.dtype) if len(biases) == 2 else biases[0] if biases else None
        )
        return apply("and", (first, second), torch.bool), bias
    if isinstance(mask, Apply) and mask.operator == "where":
        condition, *sides = mask.operands
        for side, other, seen in (
            (sides[1], sides[0], condition),
            (sides[0], sides[1], negated(condition)),
        ):
            if isinstance(side, Number) and side.value == -math.inf:
                inner, bias = _split(other, square)
                return apply("and", (seen, inner), torch.bool), bias
    return TRUE, mask


def _least(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).min if dtype.is_floating_point else -math.inf


def _shows_itself(condition: Expression, square: bool) -> bool:
    """Whether every query is known to see the key of its own position."""
    if not square:
        return False
    for part in _conjuncts(condition):
        found = _mask_of(part, _Joins(square))
        if not isinstance(found, (Causal, Window)):
            return False
    return True


# Conditions as masks ----------------------------------------------------------------------------------------------------------


def _mask_of(condition: Expression, joins: _Joins) -> Mask | None:
    """The mask of a condition, and the data that it reads added to `joins`; None where there is none."""
    if isinstance(condition, Number):
        return masks.full() if condition.value else ~masks.full()
    if indices_of(condition) <= {"b", "kv"} and slots_of(condition):
        return masks.padding(_named("padding", negated(condition), joins))
    if isinstance(condition, Apply) and condition.operator in ("and", "or", "not"):
        parts = [_mask_of(operand, joins) for operand in condition.operands]
        known = [part for part in parts if part is not None]
        if len(known) == len(parts):
            if condition.operator == "not":
                return ~known[0]
            return known[0] & known[1] if condition.operator == "and" else known[0] | known[1]
    if isinstance(condition, Apply) and condition.operator in ("eq", "ne", "lt", "le", "gt", "ge"):
        found = _compared(condition, joins)
        if found is not None:
            return found
    if indices_of(condition) <= {"b", "kv"}:
        return masks.padding(_named("padding", negated(condition), joins))
    return None


def _named(kind: str, entry: Expression, joins: _Joins) -> str:
    """The name of a data tensor with such entries."""
    name, number = kind, 1
    while joins.data.setdefault(name, entry) != entry:
        number += 1
        name = f"{kind}{number}"
    return name


def _compared(condition: Apply, joins: _Joins) -> Mask | None:
    """The mask of a comparison of whole numbers."""
    x, y = condition.operands
    if x.dtype.is_floating_point or y.dtype.is_floating_point or torch.bool in (x.dtype, y.dtype):
        return None
    name = condition.operator
    if name in ("eq", "ne"):
        found = _equal(x, y, joins)
        return found if found is None or name == "eq" else ~found
    # x >= y and its like as x - y - least >= 0.
    greater, less = (x, y) if name in ("ge", "gt") else (y, x)
    difference = _difference(greater, less)
    if difference is None:
        return None
    terms, number = difference
    return _not_negative(terms, number - (name in ("gt", "lt")))


def _equal(x: Expression, y: Expression, joins: _Joins) -> Mask | None:
    documents = _documents(x, y, joins)
    if documents is not None:
        return documents
    if isinstance(x, Apply) and x.operator == "mod" and isinstance(x.operands[1], Number):
        return _congruent(x, y)
    difference = _difference(x, y)
    if difference is None:
        return None
    terms, number = difference
    blocks = [
        term.operands[1]
        for term in terms
        if isinstance(term, Apply) and term.operator == "floordiv"
    ]
    if (
        len(blocks) == 2
        and number == 0
        and terms == {_block("q", blocks[0]): 1, _block("kv", blocks[0]): -1}
    ):
        return masks.segments(int(_value(blocks[0])))
    if (
        len(blocks) == 2
        and number == 0
        and terms == {_block("q", blocks[0]): -1, _block("kv", blocks[0]): 1}
    ):
        return masks.segments(int(_value(blocks[0])))
    least = _not_negative(terms, number)
    most = _not_negative({term: -factor for term, factor in terms.items()}, -number)
    return (
        None if least is None or most is None else masks.conjunction(tuple(merged([least, most])))
    )


def _documents(x: Expression, y: Expression, joins: _Joins) -> Mask | None:
    """ids[b, q] == ids[b, kv]."""
    if not (joins.square and isinstance(x, Entry) and isinstance(y, Entry) and x.slot == y.slot):
        return None
    for of_query, of_key in ((x, y), (y, x)):
        moved = tuple(Index("kv") if index == Index("q") else index for index in of_query.indices)
        known = indices_of(of_query) <= {"b", "q"} and indices_of(of_key) <= {"b", "kv"}
        if known and moved == of_key.indices and of_key.indices[-1] == Index("kv"):
            return masks.documents(ids=_named("documents", of_key, joins))
    return None


def _congruent(x: Apply, y: Expression) -> Mask | None:
    """(q - kv) % r == 0, q % r == kv % r."""
    inner, modulus = x.operands
    rate = int(_value(modulus))
    if isinstance(y, Apply) and y.operator == "mod" and y.operands[1] == modulus:
        difference = _difference(inner, y.operands[0])
    elif isinstance(y, Number) and y.value == 0:
        difference = _difference(inner, y)
    else:
        return None
    apart = ({Index("q"): 1, Index("kv"): -1}, {Index("q"): -1, Index("kv"): 1})
    if rate < 1 or difference is None or difference[0] not in apart or difference[1] % rate:
        return None
    return masks.window(FAR, FAR, rate)


Terms = Mapping[Expression, int]


def _difference(x: Expression, y: Expression) -> tuple[dict[Expression, int], int] | None:
    """x - y as the sum of factors times terms, and a number."""
    first, second = _sum_of(x), _sum_of(y)
    if first is None or second is None:
        return None
    terms = dict(first[0])
    for term, factor in second[0].items():
        terms[term] = terms.get(term, 0) - factor
    return {term: factor for term, factor in terms.items() if factor}, first[1] - second[1]


def _sum_of(x: Expression) -> tuple[dict[Expression, int], int] | None:
    """Indices, blocks and distances that a whole number is the sum of, and a constant."""
    if isinstance(x, Number):
        return {}, int(x.value)
    if isinstance(x, Index):
        return {x: 1}, 0
    if not isinstance(x, Apply) or x.dtype not in (
        torch.int32,
        torch.int64,
    ):  # narrower numbers may overflow
        return None
    if x.operator == "to":
        return _sum_of(x.operands[0]) if not x.operands[0].dtype.is_floating_point else None
    if (
        x.operator == "floordiv"
        and isinstance(x.operands[0], Index)
        and isinstance(x.operands[1], Number)
    ):
        block = Apply("floordiv", x.operands, torch.int64)  # one term, whatever the dtype
        return ({block: 1}, 0) if x.operands[1].value >= 1 else None
    if x.operator == "abs":
        return None if _sum_of(x.operands[0]) is None else ({x: 1}, 0)
    sums = [_sum_of(operand) for operand in x.operands]
    if x.operator not in ("add", "sub", "neg", "mul") or any(each is None for each in sums):
        return None
    return _joined(x.operator, [each for each in sums if each is not None])


def _joined(
    name: str, sums: list[tuple[dict[Expression, int], int]]
) -> tuple[dict[Expression, int], int] | None:
    if name == "neg":
        return {term: -factor for term, factor in sums[0][0].items()}, -sums[0][1]
    (one, number), (two, other) = sums
    if name == "mul":
        if one and two:
            return None
        terms, by = (one, other) if one else (two, number)
        return {term: factor * by for term, factor in terms.items() if by}, number * other
    sign = 1 if name == "add" else -1
    joined = {term: one.get(term, 0) + sign * two.get(term, 0) for term in {**one, **two}}
    return {term: factor for term, factor in joined.items() if factor}, number + sign * other


def _not_negative(terms: Terms, number: int) -> Mask | None:
    """The mask of a sum of terms and a number that is at least 0."""
    q, kv = Index("q"), Index("kv")
    if not terms:
        return masks.full() if number >= 0 else ~masks.full()
    if terms == {q: 1, kv: -1}:
        return _up_to(number)
    if terms == {q: -1, kv: 1}:
        return _from(number)
    if terms == {kv: -1}:
        return masks.sinks(number + 1) if number >= 0 else ~masks.full()
    if terms == {kv: 1}:
        return masks.full() if number >= 0 else ~masks.sinks(-number)
    if terms == {q: -1}:
        return LeadingQueries(number + 1) if number >= 0 else ~masks.full()
    if terms == {q: 1}:
        return masks.full() if number >= 0 else ~LeadingQueries(-number)
    found = _of_blocks(terms, number)
    return _of_distance(terms, number) if found is None else found


def _up_to(number: int) -> Mask:
    """kv - q <= number."""
    if number == 0:
        return masks.causal()
    return masks.window(FAR, number) if number > 0 else ~masks.window(-number - 1, FAR)


def _from(number: int) -> Mask:
    """kv - q >= -number."""
    return masks.window(number, FAR) if number >= 0 else ~masks.window(FAR, -number - 1)


def _of_blocks(terms: Terms, number: int) -> Mask | None:
    """Differences of q // block and kv // block."""
    blocks = {
        term.operands[1]
        for term in terms
        if isinstance(term, Apply) and term.operator == "floordiv"
    }
    if len(terms) != 2 or len(blocks) != 1:
        return None
    (size,) = blocks
    block = int(_value(size))
    if terms == {_block("q", size): 1, _block("kv", size): -1}:
        return (
            masks.block_window(block, FAR, number)
            if number >= 0
            else ~masks.block_window(block, -number - 1, FAR)
        )
    if terms == {_block("q", size): -1, _block("kv", size): 1}:
        return (
            masks.block_window(block, number, FAR)
            if number >= 0
            else ~masks.block_window(block, FAR, -number - 1)
        )
    return None


def _of_distance(terms: Terms, number: int) -> Mask | None:
    """abs(x) <= number, abs(x) >= -number."""
    ((term, factor),) = terms.items() if len(terms) == 1 else [(TRUE, 0)]
    if not isinstance(term, Apply) or term.operator != "abs" or factor not in (1, -1):
        return None
    inner = _sum_of(term.operands[0])
    if inner is None:
        return None
    signed = [
        ({each: sign * times for each, times in inner[0].items()}, number + sign * inner[1])
        for sign in (factor, -factor)
    ]
    first, second = (_not_negative(*each) for each in signed)
    if first is None or second is None:
        return None
    return masks.conjunction(tuple(merged([first, second]))) if factor < 0 else first | second


def _block(name: str, size: Expression) -> Expression:
    return Apply("floordiv", (Index(name), size), torch.int64)


def _value(number: Expression) -> bool | int | float:
    assert isinstance(number, Number)
    return number.value


def merged(conjuncts: Sequence[Mask]) -> list[Mask]:
    """Masks that allow together what these do: causal and windows as one, each mask once."""
    flat = dict.fromkeys(part for mask in conjuncts for part in masks.conjuncts(mask))
    others: dict[Mask | int, Mask] = {}
    for part in flat:
        span = _span_of(part)
        if span is None:
            others[part] = part
            continue
        block, left, right = span
        before = _span_of(others[block]) if block in others else None
        if before is not None:
            left, right = min(left, before[1]), min(right, before[2])
        others[block] = _of_span(block, left, right)
    return list(others.values())


def _span_of(mask: Mask) -> tuple[int, int, int] | None:
    """The block of a window, 1 of one of single tokens, and how many it reaches to the left and to the right."""
    if isinstance(mask, Causal):
        return 1, FAR, 0
    if isinstance(mask, Window) and mask.dilation == 1:
        return 1, mask.left, mask.right
    return (mask.block, mask.left, mask.right) if isinstance(mask, BlockWindow) else None


def _of_span(block: int, left: int, right: int) -> Mask:
    if block > 1:
        return masks.block_window(block, left, right)
    return masks.causal() if left >= FAR and right == 0 else masks.window(left, right)
