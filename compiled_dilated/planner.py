"""Planning: every lowering makes a proposal, the cheapest is chosen.

`auto` on a CPU uses the native kernel wherever it applies.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from . import arguments, counting
from .heads import head_groups
from .lowerings import per_branch, registry
from .lowerings.devices import constants
from .masks import Mask
from .plans import Plan, PlanCache, Problem, Proposal, Refusal
from .programs import Branch

LOWERINGS = ("auto", *registry.NAMES)
# A lowering's answer for a program: one for all branches, or one per branch.
Way = Sequence[Proposal | Refusal]
# Tokens per side of the tiles that `counted` counts.
_TILE = 128
# Positions past this need a plan of their own: the native kernel may refuse them.
_LONGEST_CACHE = 2**30


# The only cache of plans: for calls, for a ring's blocks, and for rings.
PLANS = PlanCache(most=512)


def plan_for(problem: Problem, lowering: str = "auto") -> Plan:
    """The plan of a problem, from the cache; see `choose`."""
    is_short = max(problem.kv_len, problem.q_offset) < _LONGEST_CACHE
    if is_short and takes_any_offset(problem.q_len, problem.training, lowering):
        # Decoding: the native kernel finds its keys itself, so one plan serves all positions and
        # all lengths of the cache.
        key = replace(problem, kv_len=0, q_offset=0)
        plan = PLANS.get((key, lowering), lambda: choose(problem, lowering))
        if plan.lowering == "native":
            return plan
    return PLANS.get((problem, lowering), lambda: choose(problem, lowering))


def exact_plan_for(problem: Problem, lowering: str = "auto") -> Plan:
    """The plan of a problem with its own counts; see `choose`.

    `plan_for` returns one plan for all positions of a decoder.
    """
    plan = plan_for(problem, lowering)
    if plan.problem == problem:
        return plan
    return PLANS.get((problem, lowering), lambda: choose(problem, lowering))


def takes_any_offset(q_len: int, training: bool, lowering: str) -> bool:
    """Whether one plan may serve all query positions (which calls then check)."""
    return q_len == 1 and not training and lowering in ("auto", "native")


def choose(problem: Problem, lowering: str = "auto") -> Plan:
    """The cheapest plan of a problem.

    An explicit lowering is used, or refused with a ValueError; it is never replaced.
    """
    arguments.choice("lowering", lowering, LOWERINGS)
    problem.program.check(problem.q_len, problem.kv_len, problem.q_offset)
    ways = _weighed(problem) if lowering == "auto" else [registry.named(lowering).propose(problem)]
    weighed = tuple(dict.fromkeys(itertools.chain.from_iterable(ways)))
    # Only ways without a refusal can be chosen; the refusals are listed in the plan.
    possible = [way for way in map(_proposals, ways) if way is not None]
    if not possible:
        refusal = next(answer for answer in weighed if isinstance(answer, Refusal))
        raise ValueError(f"{refusal} (asked to compute {problem.program})")
    best = possible[0]
    if len(possible) > 1:
        best = min(possible, key=_dense_flops)
    tried = {answer.lowering for answer in weighed}
    untried = tuple(name for name in registry.NAMES if name not in tried)
    reason = _reason(best, possible, lowering)
    if not constants(problem.device).measured:
        reason += "; the constants of this device are estimates, not measured on a GPU"
    return Plan(problem, tuple(best), weighed, reason, untried)


def _weighed(problem: Problem) -> list[Way]:
    """Candidate ways to compute the program."""
    ways: dict[str, Way] = {}
    for lowering in registry.LOWERINGS:
        if not lowering.is_weighed(problem.device):
            continue
        way = lowering.propose(problem)
        if lowering.decides and _proposals(way) is not None:
            return [way]
        ways[lowering.name] = way
    is_fused = False
    for name, way in ways.items():
        is_fused |= registry.named(name).is_fused and _proposals(way) is not None
    # Without a fused kernel: branches that strided refuses by tiles, the others by slices.
    regular = ways["strided"]
    if not is_fused and _proposals(regular) is None:
        ways["strided and tiled"] = per_branch.with_tiles(problem, regular)
    return list(ways.values())


def _proposals(way: Way) -> list[Proposal] | None:
    """The proposals of a way; None if a branch is refused."""
    proposals = [answer for answer in way if isinstance(answer, Proposal)]
    if len(proposals) == len(way):
        return proposals
    return None


def _dense_flops(way: Sequence[Proposal]) -> float:
    """The cost by which ways are compared."""
    return sum(proposal.cost.dense_flops for proposal in way)


def _reason(best: Sequence[Proposal], possible: Sequence[Sequence[Proposal]], lowering: str) -> str:
    """Why the best way was chosen, in words."""
    if lowering != "auto":
        return f"as asked by lowering={lowering!r}"
    if best[0].lowering == "native":
        return "one kernel that finds its tiles at each call, whatever the mask and the length"
    alternatives = []
    for way in possible:
        if way is not best:
            alternatives.append(f"{_name(way)} {_dense_flops(way) / 1e9:,.1f}")
    compared = ", ".join(alternatives) or "what else was tried is refused, see below"
    gflop = _dense_flops(best) / 1e9
    return f"takes as long as {gflop:,.1f} GFLOP of dense attention; {compared}"


def _name(way: Sequence[Proposal]) -> str:
    return "+".join(dict.fromkeys(proposal.lowering for proposal in way))


def counted(plan: Plan) -> Plan:
    """The plan with counts of its allowed pairs and tiles.

    For `explain`. Counts are exact; None for masks that read data, and for too many different
    tiles.
    """
    problem = plan.problem
    tiles: list[dict[str, Any]] = []
    pairs: int | None = 0
    for number, branch in enumerate(problem.program.branches):
        groups = head_groups(branch, problem.heads, problem.kv_heads)
        for mask, heads, _ in groups[:1]:
            row: dict[str, Any] = {"branch": number, "heads": list(heads.indices())}
            row["tile"] = _TILE
            tiles.append(row | _tiles(mask, branch, problem))
        for mask, heads, _ in groups:
            count = counting.pairs(mask, problem.q_len, problem.kv_len, problem.q_offset)
            if count is None or pairs is None:
                pairs = None
            else:
                pairs += count * heads.count * problem.batch
    return replace(plan, useful_pairs=pairs, tiles=tuple(tiles))


def _tiles(mask: Mask, branch: Branch, problem: Problem) -> dict[str, int | None]:
    """Counts of FULL and PARTIAL tiles, and bytes of their map.

    None if too many tiles differ.
    """
    q_len, kv_len, q_offset = problem.q_len, problem.kv_len, problem.q_offset
    counts = counting.tiles(mask, q_len, kv_len, _TILE, branch.order, q_offset)
    if counts is None:
        return {"full": None, "partial": None, "bytes": None}
    return {"full": counts.full, "partial": counts.partial, "bytes": counts.nbytes}
