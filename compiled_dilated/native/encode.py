"""A program as numbers for the native kernel.

They are groups of heads, their tiling, and mask nodes. src/program.h documents their layout.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..masks.traced import traced_parts
from ..plans import Scores
from ..programs import Branch, Program
from .nodes import NodeTable, without_data
from .tape import Untranslatable
from .tape import encode as encode_graph
from .tiling import position_limit, tiling_of

_VERSION = 2
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
    table = NodeTable(program.names, {slot: place for place, slot in enumerate(slots)})
    group_of_head, groups = _head_groups(program, heads)
    numbers = [_VERSION, position_limit(program.branches), heads, *group_of_head, len(groups)]
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
    operands = [without_data(*kind) for kind in scores.operands]
    numbers = range(first_operand, first_operand + len(operands))
    return [1, len(operands), *numbers, *encode_graph(scores.graph, operands)]


def _group(table: NodeTable, branches: Sequence[Branch]) -> list[int]:
    """The numbers of a group, in the layout of src/program.h."""
    tiling = tiling_of(branches)
    numbers = [tiling.step, len(tiling.sizes), tiling.offset, *tiling.sizes, len(branches)]
    for branch, keys in zip(branches, tiling.keys, strict=True):
        numbers += [table.add(branch.mask), keys.step, int(keys.strict)]
    return numbers
