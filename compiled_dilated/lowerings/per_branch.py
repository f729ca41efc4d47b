"""Branches that `strided` refuses, by `tiled`."""

from __future__ import annotations

from collections.abc import Sequence

from ..plans import Problem, Proposal, Refusal
from . import tiled


def with_tiles(problem: Problem, regular: Sequence[Proposal | Refusal]) -> list[Proposal | Refusal]:
    """The proposals of `strided`, with tiles for each branch that it refuses.

    regular: one answer of `strided` per branch.
    """
    answers: list[Proposal | Refusal] = []
    for index, (answer, branch) in enumerate(zip(regular, problem.program.branches, strict=True)):
        if isinstance(answer, Refusal):
            answer = tiled.propose_branch(index, branch, problem)
        answers.append(answer)
    return answers
