"""Plans: the native kernel on a CPU where it can; else every lowering is asked for a proposal, and the cheapest is taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from . import arguments, counting
from .heads import head_groups
from .lowerings import dense, flex, lanes, native, strided, tiled
from .lowerings.devices import constants
from .masks import Mask
from .plans import Plan, PlanCache, Problem, Proposal, Refusal
from .programs import Branch

LOWERINGS = ("auto", "native", "dense", "strided", "tiled", "flex", "lanes")
_OF_PROGRAMS = {"native": native.propose, "dense": dense.propose, "flex": flex.propose, "lanes": lanes.propose}
_OF_BRANCHES = {"strided": strided.propose, "tiled": tiled.propose}
# Tokens a side of the tiles that a plan counts.
_TILE = 128
# Tokens of a cache, from which on the native kernel may refuse a position.
_LONGEST_CACHE = 2**30


# The one table of plans: of whole calls, of a ring's blocks, and of rings.
PLANS = PlanCache(most=512)


def plan_for(problem: Problem, lowering: str = "auto") -> Plan:
    """The plan of a problem, made when it first comes; see `choose`."""
    if takes_any_offset(problem.q_len, problem.training, lowering) and max(problem.kv_len, problem.q_offset) < _LONGEST_CACHE:
        # One query, as in decoding: a kernel that finds its keys itself has one plan for all positions and all lengths.
        key = replace(problem, kv_len=0, q_offset=0)
        plan = PLANS.get((key, lowering), lambda: choose(problem, lowering))
        if plan.lowering == "native":
            return plan
    return PLANS.get((problem, lowering), lambda: choose(problem, lowering))


def takes_any_offset(q_len: int, training: bool, lowering: str) -> bool:
    """Whether one plan may serve queries at many positions, each of which has to be checked."""
    return q_len == 1 and not training and lowering in ("auto", "native")


def choose(problem: Problem, lowering: str = "auto") -> Plan:
    """The plan of a problem. An explicit lowering is used or refused with a ValueError, never replaced."""
    arguments.choice("lowering", lowering, LOWERINGS)
    problem.program.check(problem.q_len, problem.kv_len, problem.q_offset)
    ways = _ways(problem, lowering)
    weighed = tuple(dict.fromkeys(each for way in ways for each in way))
    possible = [[each for each in way if isinstance(each, Proposal)] for way in ways if not _refusals(way)]
    if not possible:
        raise ValueError(f"{_refusals(weighed)[0]} (asked to compute {problem.program!r})")
    best = possible[0] if len(possible) == 1 else min(possible, key=_dense_flops)
    reason = "as asked" if lowering != "auto" else _reason(best, possible)
    if lowering == "auto" and not constants(problem.device).measured:
        reason += "; the constants of this device are estimates, not measured on a GPU"
    return Plan(problem, tuple(best), weighed, reason)


def _ways(problem: Problem, lowering: str) -> list[Sequence[Proposal | Refusal]]:
    """Ways to compute the whole program: each one proposal for all branches, or one per branch."""
    branches = list(enumerate(problem.program.branches))
    if lowering in _OF_PROGRAMS:
        return [[_OF_PROGRAMS[lowering](problem)]]
    if lowering in _OF_BRANCHES:
        return [[_OF_BRANCHES[lowering](index, branch, problem) for index, branch in branches]]
    one_kernel = native.propose(problem) if problem.device == "cpu" else flex.propose(problem)
    if one_kernel.lowering == "native" and isinstance(one_kernel, Proposal):
        return [[one_kernel]]
    regular = [strided.propose(index, branch, problem) for index, branch in branches]
    ways: list[Sequence[Proposal | Refusal]] = [[one_kernel], [dense.propose(problem)], regular]
    if problem.device == "cuda":
        ways.insert(1, [lanes.propose(problem)])
    if isinstance(one_kernel, Refusal) and _refusals(regular):
        # Tiles compute what nothing else does.
        ways.append([
            each if isinstance(each, Proposal) else tiled.propose(index, branch, problem)
            for each, (index, branch) in zip(regular, branches, strict=True)
        ])  # fmt: skip
    return ways


def _refusals(proposals: Sequence[Proposal | Refusal]) -> list[Refusal]:
    return [each for each in proposals if isinstance(each, Refusal)]


def _dense_flops(way: Sequence[Proposal]) -> float:
    return sum(proposal.cost.dense_flops for proposal in way)


def _reason(best: Sequence[Proposal], possible: Sequence[Sequence[Proposal]]) -> str:
    if best[0].lowering == "native":
        return "one kernel that finds its tiles at each call, whatever the mask and the length"
    others = ", ".join(f"{_name(way)} {_dense_flops(way) / 1e9:,.1f}" for way in possible if way is not best)
    return (
        f"takes as long as {_dense_flops(best) / 1e9:,.1f} GFLOP of dense attention; "
        f"{others or 'no other one weighed is possible'}"
    )


def _name(way: Sequence[Proposal]) -> str:
    return "+".join(dict.fromkeys(proposal.lowering for proposal in way))


def counted(plan: Plan) -> Plan:
    """The plan with its allowed pairs, and the tiles that the first heads of each branch see.

    For people. Counts are exact. Masks that read data, and masks of too many different tiles, are not counted: None.
    """
    problem = plan.problem
    tiles: list[dict[str, Any]] = []
    pairs: int | None = 0
    for number, branch in enumerate(problem.program.branches):
        for group, (mask, heads, _) in enumerate(head_groups(branch, problem.heads, problem.kv_heads)):
            if group == 0:
                tiles.append({"branch": number, "heads": list(heads.indices()), "tile": _TILE, **_tiles(mask, branch, problem)})
            of_head = counting.pairs(mask, problem.q_len, problem.kv_len, problem.q_offset)
            pairs = None if pairs is None or of_head is None else pairs + of_head * heads.count * problem.batch
    return replace(plan, useful_pairs=pairs, tiles=tuple(tiles))


def _tiles(mask: Mask, branch: Branch, problem: Problem) -> dict[str, int | None]:
    """FULL and PARTIAL tiles, and the bytes of their map; None where they are too many to count."""
    counts = counting.tiles(mask, problem.q_len, problem.kv_len, _TILE, branch.order, problem.q_offset)
    if counts is None:
        return {"full": None, "partial": None, "bytes": None}
    return {"full": counts.full, "partial": counts.partial, "bytes": counts.nbytes}
