"""Candidates: the combinations of passes that a step may get."""

from __future__ import annotations

from collections.abc import Sequence

from .. import arguments
from ..protocol import Pass
from ..rewrites.causal import Causal
from ..rewrites.chunk import Chunk
from ..rewrites.linear_cross_entropy import LinearCrossEntropy
from ..rewrites.materialize import Materialize
from ..rewrites.reorder import Reorder
from ..rewrites.spill import Spill
from ..rewrites.stream_qkv import StreamQKV
from . import inductor_hooks

Passes = tuple[Pass, ...]

# Bytes of a chunk: below, its products are too small to be fast; above, its values do not fit in a
# last-level cache.
_LEAST_CHUNK, _MOST_CHUNK = 2**20, 16 * 2**20


def candidates(training: bool, budget_bytes: int | None = None) -> list[list[Passes]]:
    """The default candidates: no pass, and combinations for one kind of step.

    In groups: those of a later group cost more. The last group, whose orders take long to plan and
    whose chunks are smallest, is for budgets that nothing else fits. Without Remat, which plans by
    dozens of inductor's programs: name it in passes=.
    """
    ordered = (Materialize(), Reorder())
    chunk = Chunk()
    smaller: list[Chunk] = []
    if budget_bytes is not None:
        chunk_bytes = min(max(budget_bytes // 32, _LEAST_CHUNK), _MOST_CHUNK)
        chunk = Chunk(chunk_bytes=chunk_bytes)
        if chunk_bytes != _LEAST_CHUNK:
            smaller = [Chunk(chunk_bytes=_LEAST_CHUNK)]

    groups: list[list[Passes]]
    if training:
        loss = LinearCrossEntropy()
        groups = [
            [(loss,), (loss, chunk)],
            [(loss, Spill()), (loss, chunk, Spill())],
            [(loss, sized, Spill(), *ordered) for sized in (chunk, *smaller)],
        ]
    else:
        streamed = [
            (StreamQKV(chunk_bytes=sized.chunk_bytes), sized) for sized in (chunk, *smaller)
        ]
        groups = [
            [(), (chunk,), streamed[0]],
            [ordered, *((sized, *ordered) for sized in (chunk, *smaller)), *streamed[1:]],
        ]
    # A causal mask that is not computed costs nothing, so every candidate but the plain one has it.
    with_causal: list[list[Passes]] = []
    for group in groups:
        with_causal.append([(Causal(), *passes) for passes in group])
    with_causal[0].insert(0, ())
    return with_causal


def check_candidates(passes: Sequence[Sequence[Pass]]) -> None:
    """Raise an error unless these are tuples or lists of passes."""
    kind = "candidates, each a tuple or a list of passes"
    for place, candidate in enumerate(arguments.sequence("passes", passes, kind)):
        check_members(f"passes[{place}]", candidate)
    if not passes:
        raise ValueError(
            "passes must have at least one candidate; got none. "
            "Write [()] for a step without a pass"
        )


def check_members(name: str, passes: Sequence[Pass]) -> None:
    """Raise TypeError unless `passes` is a tuple or list of hashable passes.

    Hashable, as keys of plans.
    """
    inductor_hooks.check(name, passes)
    for place, member in enumerate(passes):
        try:
            hash(member)
        except TypeError as error:
            raise TypeError(
                f"{name}[{place}] must be hashable; got {arguments.shown(member)}: {error}. "
                "Keep tuples in it, no lists or dicts"
            ) from None


def described(passes: Sequence[Pass]) -> str:
    """Passes as code, "no pass" for none."""
    return ", ".join(map(repr, passes)) or "no pass"
