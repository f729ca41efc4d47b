"""Ask every lowering for a proposal; the cheapest that is possible wins."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from . import arguments
from .lowerings import costs, dense, flex, strided, tiled
from .lowerings.batches import Batch, head_ranges
from .masks import Mask, Or, conjunction, conjuncts
from .orders import Order
from .plans import Plan, Problem, Proposal, Refusal
from .programs import Branch

LOWERINGS = ("auto", "dense", "strided", "tiled", "flex")


@lru_cache(maxsize=512)
def choose(problem: Problem, lowering: str = "auto") -> Plan:
    """The plan of a problem. An explicit lowering is used or refused with a ValueError, never replaced."""
    arguments.choice("lowering", lowering, LOWERINGS)
    problem.program.check(problem.q_len, problem.kv_len, problem.q_offset)
    candidates = _candidates(problem, lowering)
    best: dict[str, list[Proposal]] = {}
    for name, weighed in candidates.items():
        if all(isinstance(each, Proposal) for each in weighed):
            best[name] = [each for each in weighed if isinstance(each, Proposal)]
    everything = tuple(each for weighed in candidates.values() for each in weighed)
    if not best:
        refusal = next(each for each in everything if isinstance(each, Refusal))
        raise ValueError(f"{refusal} (asked to compute {problem.program!r})")
    name = min(best, key=lambda each: sum(proposal.cost.dense_flops for proposal in best[each]))
    reason = "as asked" if lowering != "auto" else _reason(name, best)
    return Plan(problem, tuple(best[name]), everything, reason)


def _reason(name: str, best: dict[str, list[Proposal]]) -> str:
    def gflop(each: str) -> float:
        return sum(proposal.cost.dense_flops for proposal in best[each]) / 1e9

    others = ", ".join(f"{each} {gflop(each):,.1f}" for each in best if each != name)
    return f"takes as long as {gflop(name):,.1f} GFLOP of dense attention" + (f"; {others}" if others else "; nothing else is possible")


def _candidates(problem: Problem, lowering: str) -> dict[str, list[Proposal | Refusal]]:
    """Ways to compute the whole program: by name, one proposal per branch or one for all."""
    out: dict[str, list[Proposal | Refusal]] = {}
    if lowering in ("auto", "dense"):
        out["dense"] = [dense.propose(problem)]
    for name in ("strided", "tiled"):
        if lowering in ("auto", name):
            out[name] = [_per_branch(name, i, branch, problem) for i, branch in enumerate(problem.program.branches)]
    if lowering == "auto":
        mixed = [_mixed(i, branch, problem) for i, branch in enumerate(problem.program.branches)]
        if any(proposal.lowering == "mixed" for proposal in mixed) or len({proposal.lowering for proposal in mixed}) > 1:
            out["mixed"] = list(mixed)
    if lowering == "flex" or problem.device != "cpu":
        out["flex"] = [flex.propose(problem)]
    elif lowering == "auto":
        out["flex"] = [Refusal("flex", None, "on a CPU it has no backward and no lse", "Ask for it by name: lowering='flex'")]
    return out


def _head_groups(branch: Branch, problem: Problem) -> dict[Mask, tuple[int, ...]]:
    """The heads of a branch by what they may see."""
    groups: dict[Mask, tuple[int, ...]] = {}
    for head in branch.head_range(problem.heads):
        mask = branch.mask_at(head, problem.heads)
        groups[mask] = (*groups.get(mask, ()), head)
    return groups


def _per_branch(name: str, index: int, branch: Branch, problem: Problem) -> Proposal | Refusal:
    """One lowering for all head groups of a branch."""
    batches: list[Batch] = []
    for mask, heads in _head_groups(branch, problem).items():
        found = _batches(name, mask, branch.order, heads, problem)
        if isinstance(found, Refusal):
            return replace(found, branch=index)
        batches += found
    return _proposal(name, index, batches, problem)


def _mixed(index: int, branch: Branch, problem: Problem) -> Proposal:
    """A branch cut into disjoint masks, each by the cheaper of strided and tiled."""
    batches: list[Batch] = []
    used: list[str] = []
    for mask, heads in _head_groups(branch, problem).items():
        for number, part in enumerate(disjoint(mask)):
            options = {name: _batches(name, part, branch.order, heads, problem) for name in ("strided", "tiled")}
            possible = {name: found for name, found in options.items() if not isinstance(found, Refusal)}
            name = min(possible, key=lambda each: costs.of(possible[each], problem).dense_flops)
            used.append(name)
            batches += [replace(batch, first=batch.first and number == 0) for batch in possible[name]]
    return _proposal(used[0] if len(set(used)) == 1 else "mixed", index, batches, problem)


def disjoint(mask: Mask) -> list[Mask]:
    """Masks without common pairs whose union is the mask: `a & (b | c)` is `a & b` and `a & c & ~b`."""
    parts = conjuncts(mask)
    for i, part in enumerate(parts):
        if isinstance(part, Or):
            rest = parts[:i] + parts[i + 1 :]
            return [
                conjunction((*rest, *conjuncts(each), *(~before for before in part.masks[:number])))
                for number, each in enumerate(part.masks)
            ]
    return [mask]


def _batches(name: str, mask: Mask, order: Order, heads: tuple[int, ...], problem: Problem) -> list[Batch] | Refusal:
    out: list[Batch] = []
    for head_range, kv_range in head_ranges(heads, problem.heads // problem.kv_heads):
        if name == "strided":
            found = strided.propose(mask, head_range, kv_range, problem)
            if isinstance(found, Refusal):
                return found
        else:
            found = tiled.propose(mask, order, head_range, kv_range, problem)
        out += found
    return out


def _proposal(name: str, index: int, batches: list[Batch], problem: Problem) -> Proposal:
    if index > 0:
        batches = [replace(batch, first=False) for batch in batches]
    return Proposal(name, index, costs.of(batches, problem), tuple(costs.keep_biases(batches, problem)))
