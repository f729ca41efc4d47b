"""A program as numbers that the native kernel reads: masks as a table of nodes, and how tokens are dealt to tiles.

The layout of the numbers stands in src/program.h; the numbers of operations in src/masks.h.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..masks import And, Full, Mask, Not, Or, Padding, Tiles
from ..masks.bands import Causal, Window
from ..masks.blocks import BlockWindow, DilatedBlocks
from ..masks.congruent import Congruent
from ..masks.data import DocumentIds, DocumentLengths
from ..masks.functions import FromMod, Traced, traced_parts
from ..masks.globals import GlobalData, GlobalPositions
from ..masks.grids import Neighborhood, PlacedNeighborhood
from ..masks.leading import GlobalTokens, LeadingQueries, Prefix, Sinks
from ..masks.segments import Segments
from ..mods import trace_mask_mod
from ..orders import Hilbert, PlacedHilbert
from ..plans import Scores
from ..programs import Branch, Program
from .tape import Untranslatable
from .tape import encode as encode_graph

_VERSION = 1
OPERATIONS = {
    "full": 0,
    "all_of": 1,
    "any_of": 2,
    "none_of": 3,
    "causal": 4,
    "window": 5,
    "segments": 6,
    "congruent": 7,
    "sinks": 8,
    "leading": 9,
    "dilated_blocks": 10,
    "document_lengths": 11,
    "tiles": 12,
    "neighborhood": 13,
    "document_ids": 14,
    "padding": 15,
    "global_data": 16,
    "global_positions": 17,
    "block_window": 18,
    "function": 19,
}
# Queries and keys are dealt to classes modulo at most this; masks with more are right, and compute more hidden pairs.
_MOST_CLASSES = 48
# Numbers of one program: more are for lists that nobody writes.
_MOST_NUMBERS = 2**20


def mask_slots(program: Program) -> list[int]:
    """The operands of a call that the program's masks read, each once."""
    parts = [part for branch in program.branches for part in traced_parts(branch.mask)]
    return sorted({slot for part in parts for slot in part.slots})


def encode(program: Program, heads: int, scores: Scores | None = None) -> tuple[int, ...]:
    """The numbers of a program for so many query heads.

    The operands that they speak of are those of `mask_slots` in that order, and behind them the score_mod's own.

    Raises Untranslatable with a reason.
    """
    slots = mask_slots(program)
    code = _Code(program.names, {slot: place for place, slot in enumerate(slots)})
    groups: dict[tuple[Branch, ...], int] = {}
    of_head = []
    for head in range(heads):
        seen = tuple(
            Branch(branch.mask_at(head, heads), None, branch.order)
            for branch in program.branches
            if head in branch.head_range(heads)
        )
        of_head.append(groups.setdefault(seen, len(groups)))
    written = [_VERSION, _limit(program), heads, *of_head, len(groups)]
    for branches in groups:
        written += _group(code, branches)
    written.append(len(code.nodes))
    for node in code.nodes:
        written += node
    if scores is None:
        written.append(0)
    else:
        operands = [_empty(*kind) for kind in scores.operands]
        written += [1, len(operands), *range(len(slots), len(slots) + len(operands)), *encode_graph(scores.graph, operands)]
    if len(written) > _MOST_NUMBERS:
        raise Untranslatable(f"the program's lists are of {len(written):,} numbers, more than {_MOST_NUMBERS:,}")
    return tuple(written)


def _empty(dtype: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor without memory that stands for an operand."""
    return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")


def _limit(program: Program) -> int:
    """The positions that the program speaks of; -1: any."""
    limits = [
        math.prod(part.grid) for branch in program.branches for part in _parts(branch.mask) if isinstance(part, Neighborhood)
    ]
    limits += [math.prod(branch.order.grid) for branch in program.branches if isinstance(branch.order, Hilbert)]
    return min(limits, default=-1)


def _parts(mask: Mask) -> list[Mask]:
    return [mask, *(inner for part in mask.parts for inner in _parts(part))]


def _group(code: _Code, branches: Sequence[Branch]) -> list[int]:
    """Step, axes, offset and sizes of the grid, and the branches."""
    grid = next((shape for branch in branches if (shape := _grid(branch)) is not None), None)
    steps = [1 if grid else _step(branch.mask) for branch in branches]
    step = math.lcm(*steps) if steps else 1
    if step > _MOST_CLASSES:
        step = max(steps)
    offset, sizes = grid if grid else (0, ())
    written = [step, len(sizes), offset, *sizes, len(branches)]
    for branch, key_step in zip(branches, steps, strict=True):
        written += [code.add(branch.mask), key_step]
    return written


def _grid(branch: Branch) -> tuple[int, tuple[int, ...]] | None:
    """The grid whose patches are tiles: offset and sizes."""
    for part in _parts(branch.mask):
        if isinstance(part, Neighborhood) and len(part.grid) > 1:
            return 0, part.grid
        if isinstance(part, PlacedNeighborhood) and len(part.neighborhood.grid) > 1:
            return part.offset, part.neighborhood.grid
    if isinstance(branch.order, Hilbert):
        return 0, branch.order.grid
    if isinstance(branch.order, PlacedHilbert):
        return branch.order.offset, branch.order.hilbert.grid
    return None


def _step(mask: Mask) -> int:
    """The number of classes of positions that see each other alone, as far as the mask says; 1: none."""
    if isinstance(mask, And):
        return min(math.lcm(*(_step(part) for part in mask.masks)), _MOST_CLASSES + 1) if mask.masks else 1
    step = 1
    if isinstance(mask, Window):
        step = mask.dilation
    elif isinstance(mask, Congruent):
        step = mask.modulus
    elif isinstance(mask, DilatedBlocks) and mask.block == 1:
        step = mask.stride
    elif isinstance(mask, Traced) and mask.within is not None:
        step = _step(mask.within)
    return step if step <= _MOST_CLASSES else 1


def _neighborhood(mask: Neighborhood, offset: int) -> tuple[str, list[int]]:
    written = [offset, len(mask.axes)]
    for axis in mask.axes:
        written += [axis.size, axis.radius, axis.dilation, int(axis.causal), int(axis.shift)]
    return "neighborhood", written


@dataclass
class _Code:
    """Nodes as they are added, parts before what they are parts of."""

    names: tuple[str, ...]
    operands: dict[int, int]
    nodes: list[list[int]] = field(default_factory=list)
    places: dict[Mask, int] = field(default_factory=dict)

    def add(self, mask: Mask) -> int:
        """The place of a mask's node."""
        if mask not in self.places:
            name, arguments = self._node(mask)
            self.nodes.append([OPERATIONS[name], len(arguments), *arguments])
            self.places[mask] = len(self.nodes) - 1
        return self.places[mask]

    def _node(self, mask: Mask) -> tuple[str, list[int]]:
        match mask:
            case Full():
                return "full", []
            case And():
                return "all_of", [self.add(part) for part in mask.masks]
            case Or():
                return "any_of", [self.add(part) for part in mask.masks]
            case Not():
                return "none_of", [self.add(mask.mask)]
            case Causal():
                return "causal", []
            case Window():
                return "window", [mask.left, mask.right, mask.dilation]
            case Segments():
                return "segments", [mask.length]
            case Congruent() if isinstance(mask.offset, int):
                return "congruent", [mask.modulus, mask.offset, mask.within or 0]
            case Sinks():
                return "sinks", [mask.count]
            case LeadingQueries():
                return "leading", [mask.count]
            case Prefix() | GlobalTokens():
                return self._node(mask.expanded())
            case DilatedBlocks():
                return "dilated_blocks", [mask.block, mask.stride]
            case DocumentLengths():
                return "document_lengths", list(mask._stops)
            case Tiles():
                return "tiles", [mask.block, mask.columns, *mask.keys]
            case BlockWindow():
                return "block_window", [mask.block, mask.left, mask.right]
            case Neighborhood():
                return _neighborhood(mask, 0)
            case PlacedNeighborhood():
                return _neighborhood(mask.neighborhood, mask.offset)
            case GlobalPositions():
                return "global_positions", list(mask.positions)
            case GlobalData():
                return "global_data", [self.names.index(mask.name)]
            case DocumentIds():
                return "document_ids", [self.names.index(mask.name)]
            case Padding():
                return "padding", [self.names.index(mask.name)]
            case FromMod():
                raise Untranslatable(f"{mask} is not traced yet")
            case Traced():
                return self._function(mask)
        return self._rule(mask)

    def _rule(self, mask: Mask) -> tuple[str, list[int]]:
        """A mask without an operation of its own, by the graph of its `allows`."""
        if mask.names:
            raise Untranslatable(f"the native kernel has no operation for {type(mask).__name__}, which reads data")
        graph, operands = trace_mask_mod(mask.allows)
        if operands:
            raise Untranslatable(f"the native kernel has no operation for {type(mask).__name__}, which reads tensors")
        return "function", [-1, 0, *encode_graph(graph, [])]

    def _function(self, mask: Traced) -> tuple[str, list[int]]:
        tape = encode_graph(mask.graph, [_empty(*kind) for kind in mask.contents.kinds])
        places = [self.operands[slot] for slot in mask.slots]
        function = [-1 if mask.head is None else mask.head, len(places), *places, *tape]
        if mask.within is None:
            return "function", function
        self.nodes.append([OPERATIONS["function"], len(function), *function])
        place = len(self.nodes) - 1
        return "all_of", [self.add(mask.within), place]
