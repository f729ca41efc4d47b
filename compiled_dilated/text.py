"""Masks, orders and programs as text, parsed by a whitelist.

Text is never evaluated as Python.

read_program, read_order     text of a command line
write, read                  text of an operator's argument, with long literals as tensors beside it
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import masks, orders, programs
from .masks import Mask
from .masks.data import DocumentLengths
from .masks.explicit import Tiles
from .masks.functions import FromMod
from .masks.globals import GlobalPositions
from .masks.leading import LeadingQueries
from .masks.traced import of_graph, with_contents
from .mods import MaskMod, name_of, trace_mask_mod
from .orders import Order
from .parsing import ExpressionError, kind, value_of
from .programs import PerLength, Program

# Names of `masks` that an expression cannot call; the argument of `from_mod` is a Python function.
_CLASSES = {"And", "Full", "Mask", "Not", "Or", "Padding", "Tiles"}
_HELPERS = {"OFFSET_RULES", "conjunction", "conjuncts", "disjoint", "from_mod", "narrowed"}


def _functions_by_name() -> dict[str, Callable[..., Any]]:
    """The functions that an expression may call."""
    names = [name for name in masks.__all__ if name not in _CLASSES | _HELPERS]
    functions: list[Callable[..., Any]] = [
        *(getattr(masks, name) for name in names),
        *(orders.identity, orders.residue, orders.hilbert),
        *(programs.Branch, programs.Program),
        *(programs.longnet, programs.local_window, programs.hilbert_window),
        *(programs.block_sparse, programs.big_bird),
    ]
    return {function.__name__: function for function in functions}


NAMES: Mapping[str, Callable[..., Any]] = _functions_by_name()
# Limits of text that `write` wrote, of graphs and long conjunctions too.
_MOST_WRITTEN_CHARACTERS, _MOST_WRITTEN_DEPTH = 2**22, 200
# Longer lists of numbers are stored as tensors.
_MOST_NUMBERS = 32


def read_program(text: str, function_named: Callable[[str], MaskMod] | None = None) -> Program:
    """The program of a text.

    A mask is a program of one branch.

    function_named: the function of a name, for `from_mod('name')`. None to refuse functions: to
        look one up runs code.

    Raises ExpressionError for text that is neither.

    >>> read_program("causal() & window(256)")
    Program((Branch(causal() & window(256)),))
    """
    names = dict(NAMES)
    if function_named is not None:

        def from_mod(name: str, within: Mask | None = None) -> Mask:
            return masks.from_mod(function_named(name), within)

        names["from_mod"] = from_mod
    value = value_of(text, names)
    if not isinstance(value, (Program, Mask)):
        raise ExpressionError(
            f"{text!r} is {kind(value)}, and a program or a mask is needed, "
            "such as causal() & window(256)"
        )
    return programs.as_program(value)


def read_order(text: str) -> Order:
    """The order of a text.

    Raises ExpressionError for text that is none.

    >>> read_order("hilbert(64, 64)")
    hilbert(64, 64)
    """
    value = value_of(text, NAMES)
    if not isinstance(value, Order):
        raise ExpressionError(
            f"{text!r} is {kind(value)}, and an order is needed: "
            "identity(), residue(4) or hilbert(64, 64)"
        )
    return value


@dataclass(frozen=True)
class Stored:
    """A placeholder for numbers that are stored in an operand, a tensor.

    slot: number of the operand.
    """

    slot: int

    def __repr__(self) -> str:
        return f"stored({self.slot})"


@dataclass(frozen=True, repr=False)
class _StoredTiles(Tiles):
    """Tiles whose keys are stored in an operand."""

    def __repr__(self) -> str:
        return f"tiles_of({self.block}, {self.columns}, {self.keys!r})"


def write(program: Program | PerLength, operands: list[Tensor]) -> str:
    """The program as text; long lists of numbers are appended to `operands`.

    Functions (`from_mod`) are written as function(0), function(1), ...; `fill` replaces them by
    their graphs.
    """
    numbers = itertools.count()
    for mask in programs.masks_of(program):
        for part in mask.walk():
            _check_class(part)
    return repr(program.map(lambda mask: _shortened(mask, operands, numbers)))


def _check_class(mask: Mask) -> None:
    """Raise TypeError for a class that no text names.

    Also for one that reads heads without at_head.
    """
    kind = type(mask)
    if kind.__module__.startswith("compiled_dilated."):
        return
    if repr(mask).partition("(")[0] not in NAMES:
        raise TypeError(
            f"{kind.__name__} is no mask of compiled_dilated.masks, and graphs name masks by their "
            f"functions there; got {repr(mask)[:60]}. Write masks.from_mod(fn), with fn(b, h, "
            "q_idx, kv_idx), or add the class as CONTRIBUTING.md shows"
        )
    if kind.at_head is not Mask.at_head or mask.parts or mask.names:
        return
    # Plans compute heads with equal masks together.
    graph, _ = trace_mask_mod(mask.allows)
    if graph.reads("h"):
        raise TypeError(
            f"{kind.__name__} must have at_head: its `allows` reads the head; got "
            f"{repr(mask)[:60]}. Return the mask of one head from at_head(head, heads)"
        )


def fill(text: str, functions: Sequence[MaskMod], operands: list[Tensor]) -> str:
    """The text with functions replaced by their current graphs.

    Their captured tensors are appended to `operands`. A graph is written with the numbers of the
    operands that it reads, and with the function's name for printing.
    """
    if not functions:
        return text
    graphs: list[str] = []
    for function in functions:
        graph, captured = trace_mask_mod(function)
        slots = append(captured, operands)
        graphs.append(f"traced({graph.text!r}, {slots!r}, {name_of(function)!r}")
    return re.sub(r"\bfunction\((\d+)", lambda match: graphs[int(match[1])], text)


def append(tensors: Sequence[Tensor], operands: list[Tensor]) -> tuple[int, ...]:
    """Append to the operands; returns their numbers."""
    first = len(operands)
    operands.extend(tensors)
    return tuple(range(first, len(operands)))


def traced(program: Program, operands: list[Tensor]) -> tuple[str, Program]:
    """The program as text, and with its functions as graphs.

    Their captured tensors are appended to `operands`, which must live as long as the graphs are
    evaluated.
    """
    text = fill(write(program, operands), programs.mask_mods_of(program), operands)
    graphs = read(text, operands)
    assert isinstance(graphs, Program)
    return text, graphs.map(lambda mask: with_contents(mask, operands))


@dataclass(frozen=True, repr=False)
class _Numbered(FromMod):
    """A function that text names by its number."""

    number: int = 0

    def __repr__(self) -> str:
        within = "" if self.within is None else f", within={self.within!r}"
        return f"function({self.number}{within})"


def _shortened(mask: Mask, operands: list[Tensor], numbers: Iterator[int]) -> Mask:
    """The mask with long lists stored as operands, and functions numbered."""
    mask = mask._map(lambda part: _shortened(part, operands, numbers))
    if isinstance(mask, FromMod):
        return _Numbered(mask.fn, mask.within, next(numbers))
    if isinstance(mask, DocumentLengths) and len(mask.lengths) > _MOST_NUMBERS:
        return replace(mask, lengths=_store(mask.lengths, operands))
    if isinstance(mask, GlobalPositions) and len(mask.positions) > _MOST_NUMBERS:
        return replace(mask, positions=_store(mask.positions, operands))
    if isinstance(mask, Tiles) and len(mask.keys) > _MOST_NUMBERS and not mask.code:
        return _StoredTiles(mask.block, mask.columns, _store(mask.keys, operands))
    return mask


def _store(numbers: Sequence[int], operands: list[Tensor]) -> Any:
    """Append numbers to the operands as a tensor; returns their placeholder."""
    operands.append(torch.tensor(numbers, dtype=torch.int64, device="cpu"))
    return Stored(len(operands) - 1)


def read(text: str, operands: Sequence[Tensor]) -> Program | PerLength:
    """The program that `write` wrote.

    Masks of functions are without the contents of their operands: see
    `masks.traced.with_contents`.

    Raises ExpressionError for text that is no program.
    """
    slots = _slots(text)
    if slots and slots[-1] >= len(operands):
        raise ExpressionError(f"the text reads operand {slots[-1]} of {len(operands)}")
    return _read(text, tuple((slot, _numbers(operands[slot])) for slot in slots))


def needs_operands(text: str) -> bool:
    """Whether a program in text cannot be read or evaluated without operands."""
    return "stored(" in text or "traced(" in text


@lru_cache(maxsize=256)
def _slots(text: str) -> tuple[int, ...]:
    """Numbers of the operands with stored numbers."""
    return tuple(sorted({int(number) for number in re.findall(r"\bstored\((\d+)\)", text)}))


def _numbers(operand: Tensor) -> bytes:
    """The stored numbers as bytes, which are hashable."""
    return operand.detach().to(device="cpu", dtype=torch.int64).contiguous().numpy().tobytes()


@lru_cache(maxsize=256)
def _read(text: str, stored: tuple[tuple[int, bytes], ...]) -> Program | PerLength:
    # The numbers that the text's placeholders name.
    lists: dict[int, tuple[int, ...]] = {}
    for slot, numbers in stored:
        lists[slot] = tuple(np.frombuffer(numbers, dtype=np.int64).tolist())
    names: dict[str, Callable[..., Any]] = {
        **NAMES,
        "traced": of_graph,
        "leading_queries": LeadingQueries,
        "per_length": programs.per_length,
        "stored": lambda slot: lists.get(slot, ()),
        "tiles_of": Tiles,
    }
    # Text of `write` is longer than a person's, of graphs and long conjunctions.
    value = value_of(text, names, _MOST_WRITTEN_CHARACTERS, _MOST_WRITTEN_DEPTH)
    if not isinstance(value, (Program, PerLength)):
        raise ExpressionError(f"the text is {kind(value)}, and a program is needed")
    return value
