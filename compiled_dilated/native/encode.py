"""A program as numbers for the native kernel: a table of mask nodes, and how tokens are tiled.

src/program.h documents the layout of the numbers, src/masks.h the numbers of operations.
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
# Positions are split into at most this many residue classes. Masks of a larger period compute more
# hidden pairs, with the same result.
_MOST_CLASSES = 48
_MOST_NUMBERS = 2**20  # of one program


def mask_slots(program: Program) -> list[int]:
    """The operands of a call that the program's masks read, ascending."""
    slots: set[int] = set()
    for branch in program.branches:
        for part in traced_parts(branch.mask):
            slots.update(part.slots)
    return sorted(slots)


def encode(program: Program, heads: int, scores: Scores | None = None) -> tuple[int, ...]:
    """The numbers of a program.

    heads: number of query heads.
    scores: the score_mod and its operands.

    The operands of the kernel are those of `mask_slots` in that order, then the score_mod's own.

    Raises Untranslatable with a reason.
    """
    slots = mask_slots(program)
    table = _NodeTable(program.names, {slot: place for place, slot in enumerate(slots)})
    group_of_head, groups = _head_groups(program, heads)
    numbers = [_VERSION, _position_limit(program), heads, *group_of_head, len(groups)]
    for branches in groups:
        numbers += _group(table, branches)
    numbers.append(len(table.nodes))
    for node in table.nodes:
        numbers += node
    numbers += _score_tape(scores, len(slots))
    if len(numbers) > _MOST_NUMBERS:
        raise Untranslatable(
            f"the program's lists are of {len(numbers):,} numbers, more than {_MOST_NUMBERS:,}"
        )
    return tuple(numbers)


def _head_groups(program: Program, heads: int) -> tuple[list[int], list[tuple[Branch, ...]]]:
    """The group of each head, and the branches of each group."""
    groups: dict[tuple[Branch, ...], int] = {}
    group_of_head = []
    for head in range(heads):
        branches = []
        for branch in program.branches:
            if head in branch.head_range(heads):
                branches.append(Branch(branch.mask_at(head, heads), None, branch.order))
        # Heads with equal branches form one group.
        group_of_head.append(groups.setdefault(tuple(branches), len(groups)))
    return group_of_head, list(groups)


def _score_tape(scores: Scores | None, first_operand: int) -> list[int]:
    """Whether there is a score_mod, its operands, and its tape."""
    if scores is None:
        return [0]
    operands = [_without_data(*kind) for kind in scores.operands]
    numbers = range(first_operand, first_operand + len(operands))
    return [1, len(operands), *numbers, *encode_graph(scores.graph, operands)]


def _without_data(dtype: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor on the meta device with an operand's dtype and shape."""
    return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")


def _position_limit(program: Program) -> int:
    """One past the last position that the program defines; -1 for any."""
    limits = []
    for branch in program.branches:
        for part in _parts(branch.mask):
            if isinstance(part, Neighborhood):
                limits.append(math.prod(part.grid))
        if isinstance(branch.order, Hilbert):
            limits.append(math.prod(branch.order.grid))
    return min(limits, default=-1)


def _parts(mask: Mask) -> list[Mask]:
    """A mask and all masks that it is composed of."""
    parts = [mask]
    for part in mask.parts:
        parts += _parts(part)
    return parts


# Tiling -------------------------------------------------------------------------------------


def _group(table: _NodeTable, branches: Sequence[Branch]) -> list[int]:
    """The numbers of a group: step, grid, and per branch node and key step."""
    grids = [_grid(branch) for branch in branches]
    offset, sizes = next((grid for grid in grids if grid is not None), (0, ()))
    # A grid is tiled by patches, anything else by residue classes modulo `step`.
    steps = [1 if sizes else _step(branch.mask) for branch in branches]
    step = math.lcm(*steps)
    if step > _MOST_CLASSES:
        step = max(steps)
    numbers = [step, len(sizes), offset, *sizes, len(branches)]
    for branch, key_step in zip(branches, steps, strict=True):
        numbers += [table.add(branch.mask), key_step]
    return numbers


def _grid(branch: Branch) -> tuple[int, tuple[int, ...]] | None:
    """The grid whose patches are tiles: its first position and its sizes."""
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
    """A modulus such that the mask links only positions of one residue.

    1 if there is none.
    """
    if isinstance(mask, And):
        step = math.lcm(*(_step(part) for part in mask.masks))
        return min(step, _MOST_CLASSES + 1)
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


# Masks --------------------------------------------------------------------------------------


@dataclass
class _NodeTable:
    """The mask nodes of a program, parts before the masks composed of them.

    names: the program's data tensors.
    operands: from a slot of the call to its number among `mask_slots`.
    nodes: operation, count of arguments, arguments.
    """

    names: tuple[str, ...]
    operands: dict[int, int]
    nodes: list[list[int]] = field(default_factory=list)
    places: dict[Mask, int] = field(default_factory=dict)

    def add(self, mask: Mask) -> int:
        """Add the node of a mask unless present; returns its place."""
        if mask not in self.places:
            self.places[mask] = self._append(*self._node(mask))
        return self.places[mask]

    def _append(self, operation: str, arguments: list[int]) -> int:
        self.nodes.append([OPERATIONS[operation], len(arguments), *arguments])
        return len(self.nodes) - 1

    def _node(self, mask: Mask) -> tuple[str, list[int]]:
        """The operation of a mask and its arguments."""
        match mask:
            case Full():
                return "full", []
            case And():
                return "all_of", [self.add(part) for part in mask.masks]
            case Or():
                return "any_of", [self.add(part) for part in mask.masks]
            case Not():
                return "none_of", [self.add(mask.mask)]
            case Prefix() | GlobalTokens():
                return self._node(mask.expanded())
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
        return _positions(mask) or self._rule(mask)

    def _rule(self, mask: Mask) -> tuple[str, list[int]]:
        """The traced `allows` of a mask without an operation of its own."""
        name = type(mask).__name__
        if mask.names:
            raise Untranslatable(f"the native kernel has no operation for {name}, which reads data")
        graph, operands = trace_mask_mod(mask.allows)
        if operands:
            raise Untranslatable(
                f"the native kernel has no operation for {name}, which reads tensors"
            )
        return "function", [-1, 0, *encode_graph(graph, [])]

    def _function(self, mask: Traced) -> tuple[str, list[int]]:
        tape = encode_graph(mask.graph, [_without_data(*kind) for kind in mask.contents.kinds])
        operands = [self.operands[slot] for slot in mask.slots]
        head = -1 if mask.head is None else mask.head
        function = [head, len(operands), *operands, *tape]
        if mask.within is None:
            return "function", function
        place = self._append("function", function)
        return "all_of", [self.add(mask.within), place]


def _positions(mask: Mask) -> tuple[str, list[int]] | None:
    """The operation of a mask over positions; None for other masks."""
    match mask:
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
    return None


def _neighborhood(mask: Neighborhood, offset: int) -> tuple[str, list[int]]:
    numbers = [offset, len(mask.axes)]
    for axis in mask.axes:
        numbers += [axis.size, axis.radius, axis.dilation, int(axis.causal), int(axis.shift)]
    return "neighborhood", numbers
