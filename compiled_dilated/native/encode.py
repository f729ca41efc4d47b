"""A program as numbers for the native kernel: mask nodes and tiling.

src/program.h documents the layout of the numbers, src/masks.h the numbers of operations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..masks import And, Full, Mask, Not, Or, Padding, Tiles
from ..masks.bands import Causal, Window
from ..masks.blocks import BlockWindow, DilatedBlocks
from ..masks.congruent import Congruent
from ..masks.data import DocumentIds, DocumentLengths
from ..masks.functions import FromMod
from ..masks.globals import GlobalData, GlobalPositions
from ..masks.leading import GlobalTokens, LeadingQueries, Prefix, Sinks
from ..masks.neighborhoods import Neighborhood, PlacedNeighborhood
from ..masks.segments import Segments
from ..masks.traced import Traced, traced_parts
from ..mods import trace_mask_mod
from ..orders import Hilbert, PlacedHilbert
from ..plans import Scores
from ..programs import Branch, Program
from .tape import Untranslatable
from .tape import encode as encode_graph

_VERSION = 2
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
# A tile of queries visits at most this many residue classes of keys. Where masks would need more,
# hidden pairs are computed too, with the same result.
_MOST_CLASSES = 48
_LANES = 16  # of the longest vectors
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
    """The numbers of a group, in the layout of src/program.h."""
    grids = [_grid(branch) for branch in branches]
    offset, sizes = next((grid for grid in grids if grid is not None), (0, ()))
    # A grid is tiled by patches, anything else by residue classes modulo `step`.
    classes = [_Classes(1, True)] * len(branches)
    if not sizes:
        classes = [_classes(branch.mask) for branch in branches]
    step = _query_step(classes, _most_step(branches, classes))
    numbers = [step, len(sizes), offset, *sizes, len(branches)]
    for branch, of_branch in zip(branches, classes, strict=True):
        key_step = _key_step(of_branch, step)
        numbers += [table.add(branch.mask), key_step, int(of_branch.strict)]
    return numbers


def _grid(branch: Branch) -> tuple[int, tuple[int, ...]] | None:
    """The grid whose patches are tiles: its first position and its sizes."""
    for part in _parts(branch.mask):
        if isinstance(part, Neighborhood) and len(part.grid) > 1:
            return 0, part.grid
        if isinstance(part, PlacedNeighborhood) and len(part.neighborhood.grid) > 1:
            return part.offset, part.neighborhood.grid
    # An order lays out work: tiles along the line compute fewer hidden pairs of masks that are
    # defined along it. What a function or ids link is unknown.
    if any(isinstance(part, (FromMod, Traced, DocumentIds)) for part in _parts(branch.mask)):
        if isinstance(branch.order, Hilbert):
            return 0, branch.order.grid
        if isinstance(branch.order, PlacedHilbert):
            return branch.order.offset, branch.order.hilbert.grid
    return None


class _Classes(NamedTuple):
    """The residue classes of a mask's positions.

    modulus: of the classes; 1 where the mask has none.
    strict: whether linked positions are always of one class. Otherwise they are within a period of
        the mask only, and classes begin anew with each period.
    """

    modulus: int
    strict: bool


def _classes(mask: Mask) -> _Classes:
    """The finest classes known of a mask."""
    match mask:
        case Window():
            return _Classes(mask.dilation, True)
        case Congruent():
            return _Classes(mask.modulus, mask.period == mask.modulus)
        case DilatedBlocks() if mask.block == 1:
            return _Classes(mask.stride, True)
        case Neighborhood() if len(mask.axes) == 1:
            return _Classes(mask.axes[0].dilation, True)
        case PlacedNeighborhood():
            return _classes(mask.neighborhood)
        case Traced() if mask.within is not None:
            return _classes(mask.within)
        case And():
            return _classes_of_all(mask.masks)
        case Or():
            return _classes_of_any(mask.masks)
    return _Classes(1, True)


def _classes_of_all(masks: Sequence[Mask]) -> _Classes:
    """Classes of positions that all masks link: strict ones, if any."""
    parts = [_classes(mask) for mask in masks]
    strict = math.lcm(*(part.modulus for part in parts if part.strict))
    if strict > 1:
        return _Classes(strict, True)
    modulus = math.lcm(*(part.modulus for part in parts))
    return _Classes(modulus, modulus == 1)


def _classes_of_any(masks: Sequence[Mask]) -> _Classes:
    """Classes of positions that one of the masks links."""
    parts = [_classes(mask) for mask in masks]
    if not all(part.strict for part in parts):
        return _Classes(1, True)
    return _Classes(math.gcd(*(part.modulus for part in parts)), True)


def _most_step(branches: Sequence[Branch], classes: Sequence[_Classes]) -> int:
    """The greatest step by which vectors stay within the branches' extents."""
    most: float = _MOST_CLASSES
    for branch, of_branch in zip(branches, classes, strict=True):
        # Queries of one class see each other's keys, however far apart they are.
        most = min(most, max(of_branch.modulus, _extent(branch.mask) // _LANES))
    return int(most)


def _extent(mask: Mask) -> float:
    """A bound of the distance of linked positions in tokens."""
    match mask:
        case Segments():
            return mask.length
        case Window():
            return mask.left + mask.right + 1
        case And():
            return min(_extent(part) for part in mask.masks)
    return math.inf


def _query_step(classes: Sequence[_Classes], most: int) -> int:
    """The distance of a tile's queries, for all branches of a head.

    most: the greatest step, unless all branches share their classes.
    """
    # Classes that all branches share cost no branch a hidden pair, however many there are.
    shared = math.gcd(*(of_branch.modulus for of_branch in classes if of_branch.strict))
    if shared > _MOST_CLASSES and all(of_branch.strict for of_branch in classes):
        return shared
    # Tiles of a large step are long: branches without classes compute hidden pairs.
    steps = [_divisor(of_branch, most) for of_branch in classes]
    step = math.lcm(*steps)
    return step if step <= most else max(steps)


def _divisor(classes: _Classes, most: int) -> int:
    """The greatest divisor of a modulus up to `most`.

    1 for larger moduli of classes that begin anew.
    """
    if classes.modulus <= most:
        return classes.modulus
    if not classes.strict:
        return 1
    return next(divisor for divisor in range(most, 0, -1) if classes.modulus % divisor == 0)


def _key_step(classes: _Classes, step: int) -> int:
    """The distance of a block's keys, for tiles of a step."""
    if classes.strict and classes.modulus // math.gcd(classes.modulus, step) <= _MOST_CLASSES:
        return classes.modulus
    return _divisor(classes, _MOST_CLASSES)


# Masks --------------------------------------------------------------------------------------


@dataclass
class _NodeTable:
    """The mask nodes of a program, parts before composed masks.

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
