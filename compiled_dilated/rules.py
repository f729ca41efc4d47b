"""Rules of attention as text: program, lowering, ring and functions.

    Rule  -- text -->  '["Program((...),))","auto",null,null,[]]'  -- read_rule, operands -->  Rule

A graph with such a text computes the same in every process that imports this package. All tables
here are caches by value.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from . import arguments, planner, text
from .calls import Call
from .masks.contents import slot_name
from .masks.traced import traced_parts, with_contents
from .mods import Graph, MaskMod, Mod, ScoreMod, trace_score_mod, zero_sums
from .parsing import ExpressionError
from .programs import PerLength, Program, mask_mods_of, masks_of
from .ring.distributed import Distributed
from .ring.rings import Ring


@dataclass(frozen=True)
class Rule:
    """A parsed rule.

    slots: numbers of the operands that the score_mod reads.
    """

    program: Program | PerLength
    lowering: str
    ring: Ring | None = None
    score_mod: Graph | None = None
    slots: tuple[int, ...] = ()

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The data tensors that the program reads."""
        return self.program.names

    @cached_property
    def mask_slots(self) -> tuple[int, ...]:
        """The operands that the masks read, ascending."""
        slots: set[int] = set()
        for mask in masks_of(self.program):
            for part in traced_parts(mask):
                slots.update(part.slots)
        return tuple(sorted(slots))

    def call(
        self,
        data: Sequence[Tensor] | None,
        operands: Sequence[Tensor] | None,
        scale: float,
        q_offset: int,
        learned: Sequence[int] = (),
    ) -> Call:
        """The options of a call, with zeroed gradients of learned operands.

        data: the tensors that the program reads, then optionally one (B, 1), the position of
            each batch entry's first query.
        operands: of the rule.
        learned: numbers of operands that the score_mod reads.
        """
        tensors = tuple(data or ())
        operands = operands or ()
        # One tensor more than the program reads: the positions of the first queries.
        offsets = None
        if len(tensors) == len(self.names) + 1:
            tensors, offsets = tensors[:-1], tensors[-1].squeeze(1)
        by_name = dict(zip(self.names, tensors[: len(self.names)], strict=True))
        if operands:
            by_name |= {slot_name(slot): operands[slot] for slot in self.mask_slots}
        if self.score_mod is None:
            return Call(scale, q_offset, by_name, offsets=offsets)
        # The score_mod numbers its own operands.
        score_operands = tuple(operands[slot] for slot in self.slots)
        numbers = tuple(self.slots.index(slot) for slot in learned)
        sums = zero_sums(score_operands, numbers)
        score_mod = Mod(self.score_mod, score_operands, numbers, sums)
        return Call(scale, q_offset, by_name, score_mod, offsets)


class Skeleton:
    """A rule's text with placeholders for its functions.

    Functions are traced anew at every call.

    frame: program, lowering and ring as text.
    literals: operands with the program's long lists.
    mask_mods: the program's functions, in the order of their placeholders.
    plain: the complete rule of a program without functions.
    """

    def __init__(self, program: Program | PerLength, lowering: str, ring: Ring | None) -> None:
        literals: list[Tensor] = []
        program_text = text.write(program, literals)
        self.literals = tuple(literals)
        self.mask_mods = mask_mods_of(program)
        self.frame = json.dumps([program_text, lowering, None if ring is None else ring.written])
        rule = "" if self.mask_mods else bind(self.frame, (), (), None, torch.float32).rule
        self.plain = Bound(rule, self.literals)


@dataclass(frozen=True)
class Bound:
    """A rule's text with its operands.

    slots: numbers of the operands that the score_mod reads.
    """

    rule: str
    operands: tuple[Tensor, ...]
    slots: tuple[int, ...] = ()


def bind(
    frame: str,
    literals: Sequence[Tensor],
    mask_mods: Sequence[MaskMod],
    score_mod: ScoreMod | None,
    dtype: torch.dtype,
) -> Bound:
    """Trace the functions and insert them into a frame.

    frame, literals: of a `Skeleton`.
    mask_mods: in the order of their placeholders.
    dtype: of the scores.
    """
    # 1. The program's functions, whose captured tensors follow the literals.
    program, lowering, ring = json.loads(frame)
    operands = list(literals)
    program = text.fill(program, mask_mods, operands)
    if lowering == "flex":
        _check_flex(program, operands)
    if score_mod is None:
        return Bound(json.dumps([program, lowering, ring, None, ()]), tuple(operands))
    # 2. The score_mod, whose captured tensors are the last operands.
    graph, captured = trace_score_mod(score_mod, dtype)
    if lowering == "flex" and not graph.is_elementwise:
        raise ValueError(_NOT_FOR_FLEX.format("score_mod"))
    slots = text.append(captured, operands)
    rule = json.dumps([program, lowering, ring, graph.text, slots])
    return Bound(rule, tuple(operands), slots)


_NOT_FOR_FLEX = (
    "lowering 'flex' takes functions of single numbers alone, and this {} reduces vectors "
    "(sum, dot, all, table[i][j]), which torch's template does not compile. "
    "Use lowering='auto', 'strided' or 'tiled'"
)


def _check_flex(program: str, operands: Sequence[Tensor]) -> None:
    """Raise ValueError for functions that torch's template does not compile."""
    for mask in masks_of(text.read(program, operands)):
        if any(not part.graph.is_elementwise for part in traced_parts(mask)):
            raise ValueError(_NOT_FOR_FLEX.format("mask_mod"))


def read_rule(rule: str, operands: Sequence[Tensor] | None) -> Rule:
    """Parse a rule for a call with these operands.

    Raises ExpressionError for a text that is not a rule.
    """
    frame = _frame(rule)
    tensors = operands or ()
    if any(not 0 <= slot < len(tensors) for slot in frame.slots):
        raise ExpressionError(
            f"the rule's score_mod reads the operands {frame.slots} of {len(tensors)}"
        )
    # Without operands the rule was parsed once, with the text.
    if frame.complete is not None:
        return frame.complete
    program = text.read(frame.program, tensors).map(lambda mask: with_contents(mask, tensors))
    return Rule(program, frame.lowering, frame.ring, frame.score_mod, frame.slots)


def reads_contents(rule: str) -> bool:
    """Whether the rule depends on the contents of its operands."""
    return "stored(" in _frame(rule).program


def score_slots(rule: str) -> tuple[int, ...]:
    """Numbers of the operands that the rule's score_mod reads."""
    return _frame(rule).slots


@dataclass(frozen=True)
class _Frame:
    """The parts of a rule's text.

    complete: the rule, if its program reads no operands.
    """

    program: str
    lowering: str
    ring: Ring | None
    score_mod: Graph | None
    slots: tuple[int, ...]
    complete: Rule | None


@lru_cache(maxsize=256)
def _frame(rule: str) -> _Frame:
    """The checked parts of a rule's text."""
    try:
        # The text may come from a file: every field is checked before it is used.
        program, lowering, ring, score_mod, slots = json.loads(rule)
        graph = None if score_mod is None else Graph(score_mod).check()
        arguments.choice("lowering", lowering, planner.LOWERINGS)
        parts = lowering, _ring(ring), graph, tuple(slots)
        if not isinstance(program, str) or not all(type(slot) is int for slot in parts[3]):
            raise ValueError("its program must be a text and its slots numbers")
        if graph is not None and graph.operands != len(parts[3]):
            raise ValueError(
                f"its score_mod reads {graph.operands} operands, and {len(parts[3])} are named"
            )
    except (ValueError, TypeError, RecursionError) as error:
        raise ExpressionError(f"{rule[:200]!r} is no rule of attention: {error}") from None
    if text.needs_operands(program):
        return _Frame(program, *parts, None)
    return _Frame(program, *parts, Rule(text.read(program, ()), *parts))


def _ring(fields: Any) -> Ring | None:
    """The ring of its three fields in a rule's text."""
    if fields is None:
        return None
    ranks, layout, group = fields
    if group is None:
        return Ring(ranks, layout)
    return Ring(ranks, layout, Distributed(group))
