"""One query against a cache: the keys that it sees are a few slices, found from its position without planning anything anew."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..masks import Mask, conjunction, conjuncts
from ..partials import lse_dtype, merge_
from ..plans import Cost, Problem, Proposal
from . import kernels
from .batches import Call, HeadRange, head_groups

_MOST_ALONE = 4


@dataclass(frozen=True, eq=False)
class Group:
    """Heads that see the same: `where` says which keys, as ranges; `rest` hides some of them by data."""

    heads: HeadRange
    kv_heads: HeadRange
    where: Mask
    rest: Mask | None


def propose(problem: Problem) -> Proposal:
    """All branches, for a query at any position."""
    groups = []
    for branch in problem.program.branches:
        for mask, heads, kv_heads in head_groups(branch, problem):
            data = tuple(part for part in conjuncts(mask) if part.per_call)
            plain = tuple(part for part in conjuncts(mask) if not part.per_call)
            groups.append(Group(heads, kv_heads, conjunction(plain), conjunction(data) if data else None))
    # What a query sees depends on where it stands; at most it is every key.
    pairs = sum(group.heads.count for group in groups) * problem.kv_len * problem.batch
    flops = pairs * 2 * (problem.head_dim + problem.value_dim)
    return Proposal("strided", None, Cost(pairs, flops, 0, len(groups), 0, float(flops)), tuple(groups))


def forward(groups: tuple[Group, ...], call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """out (B, Hq, 1, Dv) and lse (B, Hq, 1)."""
    shape = (*q.shape[:3], v.shape[3])
    parts = [(group, spans, rest) for group in groups for spans, rest in _parts(group, call, k.shape[2])]
    if len(parts) == 1 and parts[0][0].heads.count == q.shape[1]:
        return _attention(*parts[0], call, q, k, v)
    out, lse = q.new_zeros(shape), q.new_full(shape[:3], -math.inf, dtype=lse_dtype(q.dtype))
    for group, spans, rest in parts:
        found = _attention(group, spans, rest, call, group.heads.of(q), group.kv_heads.of(k), group.kv_heads.of(v))
        merge_(group.heads.of(out), group.heads.of(lse), *found)
    return out, lse


def _parts(group: Group, call: Call, kv_len: int) -> list[tuple[tuple[range, ...], Mask | None]]:
    """The keys that a group sees, in the parts to compute alone, and what is left to ask about them."""
    spans, rest = group.where.keys_of(call.q_offset, kv_len), group.rest
    if spans is None:
        spans, rest = (range(kv_len),), group.where if rest is None else group.where & rest
    spans = tuple(span for span in spans if span)
    # Merging a few results is cheaper than joining their keys.
    parts = [(span,) for span in spans] if len(spans) <= _MOST_ALONE else [spans]
    return [(part, rest) for part in parts]


def _attention(
    group: Group, spans: tuple[range, ...], rest: Mask | None, call: Call, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    seen_k, seen_v = (_joined([x[:, :, span.start : span.stop : span.step] for span in spans]) for x in (k, v))
    bias = score_mod = None
    if rest is not None or call.score_mod is not None:
        b = torch.arange(q.shape[0], device=q.device)[:, None, None, None]
        h = torch.tensor(list(group.heads.indices()), device=q.device)[None, :, None, None]
        at = torch.full((1, 1, 1, 1), call.q_offset, device=q.device)
        keys = torch.cat([torch.arange(span.start, span.stop, span.step, device=q.device) for span in spans])[None, None, None, :]
        if rest is not None:
            hidden = ~rest.allows(b, h[:, :1], at, keys, call.data)
            bias = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device).masked_fill_(hidden, -math.inf)
        if call.score_mod is not None:
            mod = call.score_mod

            def score_mod(scores: Tensor) -> Tensor:
                changed: Tensor = mod(scores, b, h, at, keys)
                return changed

    tiles = kernels.Tiles(call.scale, bias, False, score_mod)
    return kernels.attention(q, seen_k, seen_v, replace(tiles, dead=kernels.dead_rows(tiles, 1)))


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
