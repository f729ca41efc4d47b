"""What an operator computes, as text in its arguments: a program, how it is lowered, over which ring, with which functions.

    Rule  -- text -->  '["Program((...),))","auto",null,null,[]]'  -- read_rule, operands -->  Rule

A graph that holds such a text means the same in every process that imports this package. Tables here are caches by value.
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
from .masks.functions import slot_name, traced_parts, with_contents
from .mods import Graph, MaskMod, Mod, ScoreMod, trace_score_mod, zero_sums
from .programs import PerLength, Program, mask_mods_of, masks_of
from .ring.distributed import Distributed
from .ring.rings import Ring


@dataclass(frozen=True)
class Rule:
    """All that an operator's text says. slots: the operands that the score_mod reads."""

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
        """The operands that masks read when they are asked."""
        return tuple(sorted({slot for mask in masks_of(self.program) for part in traced_parts(mask) for slot in part.slots}))

    def call(
        self,
        data: Sequence[Tensor] | None,
        operands: Sequence[Tensor] | None,
        scale: float,
        q_offset: int,
        learned: Sequence[int] = (),
    ) -> Call:
        """A call's options, with sums for the gradients of the learned operands.

        Behind the data tensors that the program reads may stand one more, (B, 1): the first position of each entry's queries.
        """
        tensors = tuple(data or ())
        offsets = tensors[-1].squeeze(1) if len(tensors) == len(self.names) + 1 else None
        named = dict(zip(self.names, tensors[: len(self.names)], strict=True))
        if operands:
            named |= {slot_name(slot): operands[slot] for slot in self.mask_slots}
        if self.score_mod is None:
            return Call(scale, q_offset, named, offsets=offsets)
        own = tuple((operands or ())[slot] for slot in self.slots)
        places = tuple(self.slots.index(slot) for slot in learned)
        return Call(scale, q_offset, named, Mod(self.score_mod, own, places, zero_sums(own, places)), offsets)


class Skeleton:
    """A program as its user holds it: a text with places for its functions, which are traced anew at every call.

    frame: the program, the lowering and the ring as text. literals: the operands that its long lists are stored in.
    mask_mods: its functions, in the order of their places. plain: the rule, where it has none.
    """

    def __init__(self, program: Program | PerLength, lowering: str, ring: Ring | None) -> None:
        literals: list[Tensor] = []
        written = text.write(program, literals)
        self.literals = tuple(literals)
        self.mask_mods = mask_mods_of(program)
        self.frame = json.dumps([written, lowering, None if ring is None else ring.written])
        rule = "" if self.mask_mods else bind(self.frame, (), (), None, torch.float32).rule
        self.plain = Bound(rule, self.literals)


@dataclass(frozen=True)
class Bound:
    """A rule's text, all its operands, and the numbers of those that its score_mod reads."""

    rule: str
    operands: tuple[Tensor, ...]
    slots: tuple[int, ...] = ()


def bind(
    frame: str, literals: Sequence[Tensor], mask_mods: Sequence[MaskMod], score_mod: ScoreMod | None, dtype: torch.dtype
) -> Bound:
    """A rule with its functions as they are now. dtype: of the scores."""
    program, lowering, ring = json.loads(frame)
    operands = list(literals)
    program = text.fill(program, mask_mods, operands)
    if lowering == "flex":
        _check_flex(program, operands)
    score_graph: str | None = None
    slots: tuple[int, ...] = ()
    if score_mod is not None:
        graph, captured = trace_score_mod(score_mod, dtype)
        if lowering == "flex" and not graph.is_elementwise:
            raise ValueError(_NOT_FOR_FLEX.format("score_mod"))
        score_graph, slots = graph.text, text.append(captured, operands)
    return Bound(json.dumps([program, lowering, ring, score_graph, slots]), tuple(operands), slots)


_NOT_FOR_FLEX = (
    "lowering 'flex' takes functions of single numbers alone, and this {} reduces vectors (sum, dot, all, table[i][j]), which "
    "torch's template does not compile. Use lowering='auto', 'strided' or 'tiled'"
)


def _check_flex(program: str, operands: Sequence[Tensor]) -> None:
    for mask in masks_of(text.read(program, operands)):
        if any(not part.graph.is_elementwise for part in traced_parts(mask)):
            raise ValueError(_NOT_FOR_FLEX.format("mask_mod"))


def read_rule(rule: str, operands: Sequence[Tensor] | None) -> Rule:
    """What a text means, for a call with these operands."""
    frame = _frame(rule)
    if not all(0 <= slot < len(operands or ()) for slot in frame.slots):
        raise text.ExpressionError(f"the rule's score_mod reads the operands {frame.slots} of {len(operands or ())}")
    if frame.complete is not None:
        return frame.complete
    tensors = operands or ()
    program = text.read(frame.program, tensors).map(lambda mask: with_contents(mask, tensors))
    return Rule(program, frame.lowering, frame.ring, frame.score_mod, frame.slots)


def reads_contents(rule: str) -> bool:
    """Whether what the rule says depends on what its operands hold: its long lists are stored in them."""
    return "stored(" in _frame(rule).program


def score_slots(rule: str) -> tuple[int, ...]:
    """The operands that the rule's score_mod reads, without a look at what they hold."""
    return _frame(rule).slots


@dataclass(frozen=True)
class _Frame:
    """A text taken apart. complete: the rule, where its program reads no operands."""

    program: str
    lowering: str
    ring: Ring | None
    score_mod: Graph | None
    slots: tuple[int, ...]
    complete: Rule | None


@lru_cache(maxsize=256)
def _frame(rule: str) -> _Frame:
    try:
        program, lowering, ring, score_mod, slots = json.loads(rule)
        graph = None if score_mod is None else Graph(score_mod).check()
        parts = arguments.choice("lowering", lowering, planner.LOWERINGS), _ring(ring), graph, tuple(slots)
        if not isinstance(program, str) or not all(type(slot) is int for slot in parts[3]):
            raise ValueError("its program must be a text and its slots numbers")
        if graph is not None and graph.operands != len(parts[3]):
            raise ValueError(f"its score_mod reads {graph.operands} operands, and {len(parts[3])} are named")
    except (ValueError, TypeError, RecursionError) as error:
        raise text.ExpressionError(f"{rule[:200]!r} is no rule of attention: {error}") from None
    if text.needs_operands(program):
        return _Frame(program, *parts, None)
    return _Frame(program, *parts, Rule(text.read(program, ()), *parts))


def _ring(written: Any) -> Ring | None:
    if written is None:
        return None
    ranks, layout, group = written
    return Ring(ranks, layout, None if group is None else Distributed(group))
