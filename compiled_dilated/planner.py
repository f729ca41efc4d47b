"""Ask every lowering for a proposal; the cheapest that is possible wins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from . import arguments, counting
from .heads import HeadRange, head_groups
from .lowerings import costs, dense, flex, native, single, strided, tiled
from .lowerings.batches import Batch, joined
from .masks import Mask
from .plans import Plan, PlanCache, Problem, Proposal, Refusal
from .programs import Branch

LOWERINGS = ("auto", "native", "dense", "strided", "tiled", "flex")
# Past this many queries tiles are weighed only where there are no regular blocks.
_LONGEST_WEIGHED = 32768
# Tokens a side of the tiles that a plan counts.
_TILE = 128


# The one table of plans: of whole calls, of a ring's blocks, and of rings.
PLANS = PlanCache(most=512)


def plan_for(problem: Problem, lowering: str = "auto") -> Plan:
    """The plan of a problem, made when it first comes; see `choose`."""
    # One query is planned once for all positions and all lengths of a cache.
    alone = takes_any_offset(problem.q_len, problem.training, lowering)
    key = replace(problem, kv_len=0, q_offset=0) if alone else problem
    return PLANS.get((key, lowering), lambda: choose(problem, lowering))


def choose(problem: Problem, lowering: str = "auto") -> Plan:
    """The plan of a problem. An explicit lowering is used or refused with a ValueError, never replaced."""
    arguments.choice("lowering", lowering, LOWERINGS)
    problem.program.check(problem.q_len, problem.kv_len, problem.q_offset)
    if takes_any_offset(problem.q_len, problem.training, lowering):
        only = single.propose(problem)
        return Plan(
            problem, (only,), (only,), "one query: slices of the keys that it sees, found from its position at every call"
        )
    candidates = _candidates(problem, lowering)
    best: dict[str, list[Proposal]] = {}
    for name, weighed in candidates.items():
        if all(isinstance(each, Proposal) for each in weighed):
            best[name] = [each for each in weighed if isinstance(each, Proposal)]
    everything = tuple(each for weighed in candidates.values() for each in weighed)
    if not best:
        refusal = next(each for each in everything if isinstance(each, Refusal))
        raise ValueError(f"{refusal} (asked to compute {problem.program!r})")
    if "native" in best:
        name, reason = "native", "one kernel that finds its tiles at each call, whatever the mask and the length"
    else:
        name = min(best, key=lambda each: sum(proposal.cost.dense_flops for proposal in best[each]))
        reason = _reason(name, best)
    reason = reason if lowering == "auto" else "as asked"
    return Plan(problem, tuple(best[name]), everything, reason)


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


def takes_any_offset(q_len: int, training: bool, lowering: str) -> bool:
    """Whether one plan serves queries at every position: a single query, as in decoding."""
    return q_len == 1 and not training and lowering in ("auto", "strided")


def _reason(name: str, best: dict[str, list[Proposal]]) -> str:
    def gflop(each: str) -> float:
        return sum(proposal.cost.dense_flops for proposal in best[each]) / 1e9

    others = ", ".join(f"{each} {gflop(each):,.1f}" for each in best if each != name)
    return f"takes as long as {gflop(name):,.1f} GFLOP of dense attention; {others or 'no other one weighed is possible'}"


def _candidates(problem: Problem, lowering: str) -> dict[str, list[Proposal | Refusal]]:
    """Ways to compute the whole program: by name, one proposal per branch or one for all."""
    out: dict[str, list[Proposal | Refusal]] = {}
    if lowering == "native" or (lowering == "auto" and problem.device == "cpu"):
        out["native"] = [native.propose(problem)]
        if isinstance(out["native"][0], Proposal):
            return out
    if lowering in ("auto", "dense"):
        out["dense"] = [dense.propose(problem)]
    branches = list(enumerate(problem.program.branches))
    if lowering in ("auto", "strided"):
        out["strided"] = [_per_branch("strided", i, branch, problem) for i, branch in branches]
    mixed: list[Proposal] = []
    if lowering == "auto" and any(isinstance(each, Refusal) for each in out["strided"]):
        mixed = [_mixed(i, branch, problem) for i, branch in branches]
        if any("strided" in proposal.lowering for proposal in mixed):
            out["mixed"] = list(mixed)
    if lowering == "tiled" or (lowering == "auto" and _worth_tiling(problem, out["strided"], mixed)):
        out["tiled"] = [_per_branch("tiled", i, branch, problem) for i, branch in branches]
    if lowering == "flex" or problem.device != "cpu":
        out["flex"] = [flex.propose(problem)]
    elif lowering == "auto":
        out["flex"] = [Refusal("flex", None, "on a CPU it has no backward and no lse", "Ask for it by name: lowering='flex'")]
    return out


def _per_branch(name: str, index: int, branch: Branch, problem: Problem) -> Proposal | Refusal:
    """One lowering for all head groups of a branch."""
    batches: list[Batch] = []
    for mask, heads, kv_heads in head_groups(branch, problem.heads, problem.kv_heads):
        found = _batches(name, mask, branch, heads, kv_heads, problem)
        if isinstance(found, Refusal):
            return replace(found, branch=index)
        batches += found
    return _proposal(name, index, batches, problem)


def _worth_tiling(problem: Problem, strided: Sequence[Proposal | Refusal], mixed: Sequence[Proposal]) -> bool:
    """Whether tiles could beat regular blocks.

    Not where these compute no hidden pair, nor where finding the tiles alone takes long.
    """
    blocks = mixed or [proposal for proposal in strided if isinstance(proposal, Proposal)]
    if any(proposal.lowering != "strided" for proposal in blocks):
        return True
    exact = not any(batch.masks for proposal in blocks for batch in proposal.work)
    return not exact and problem.q_len <= _LONGEST_WEIGHED


def _mixed(index: int, branch: Branch, problem: Problem) -> Proposal:
    """A branch cut into disjoint masks: regular blocks where they are such, tiles elsewhere."""
    batches: list[Batch] = []
    used: dict[str, None] = {}
    for mask, heads, kv_heads in head_groups(branch, problem.heads, problem.kv_heads):
        for number, part in enumerate(strided.cases(mask)):
            name, found = "strided", strided.propose(part, heads, kv_heads, problem)
            if isinstance(found, Refusal):
                name, found = "tiled", tiled.propose(part, branch.order, heads, kv_heads, problem)
            used[name] = None
            batches += [replace(batch, first=batch.first and number == 0) for batch in found]
    return _proposal("+".join(used), index, batches, problem)


def _batches(
    name: str, mask: Mask, branch: Branch, heads: HeadRange, kv_heads: HeadRange, problem: Problem
) -> list[Batch] | Refusal:
    if name == "strided":
        return strided.propose(mask, heads, kv_heads, problem)
    return tiled.propose(mask, branch.order, heads, kv_heads, problem)


def _proposal(name: str, index: int, batches: list[Batch], problem: Problem) -> Proposal:
    if index > 0:
        batches = [replace(batch, first=False) for batch in batches]
    if problem.batch == 1 and not problem.scores:
        batches = joined(batches)
    # Those that write rows before those that merge into them, whatever was joined.
    batches = sorted(batches, key=lambda batch: not batch.first)
    batches = costs.keep_biases(batches, problem)
    return Proposal(name, index, costs.of(batches, problem), tuple(batches))
