"""Masks as nodes for the native kernel.

A node is the number of an operation with its arguments. src/masks.h documents the operations. A
mask without one becomes the tape of its `allows`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

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
from ..masks.traced import Traced
from ..mods import trace_mask_mod
from .tape import Untranslatable
from .tape import encode as encode_graph

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


def without_data(dtype: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor on the meta device with an operand's dtype and shape."""
    return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")


@dataclass
class NodeTable:
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
        tape = encode_graph(mask.graph, [without_data(*kind) for kind in mask.contents.kinds])
        operands = [self.operands[slot] for slot in mask.slots]
        head = -1 if mask.head is None else mask.head
        function = [head, len(operands), *operands, *tape]
        if mask.within is None:
            return "function", function
        place = self._append("function", function)
        return "all_of", [self.add(mask.within), place]


def has_operation(mask: Mask) -> bool:
    """Whether a mask has an operation, so that nothing is traced."""
    of_data = (DocumentIds, GlobalData, Padding)
    composed = (Full, And, Or, Not, Prefix, GlobalTokens, Congruent)
    return isinstance(mask, of_data + composed) or _positions(mask) is not None


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
