"""One query against a cache: the keys that it sees are a few slices, found from its position without planning anything anew."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..calls import Call
from ..heads import HeadRange, head_groups
from ..masks import Mask, conjunction, conjuncts, narrowed
from ..partials import lse_dtype, merge_
from ..plans import Cost, Problem, Proposal
from . import kernels

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
        for mask, heads, kv_heads in head_groups(branch, problem.heads, problem.kv_heads):
            data = tuple(part for part in conjuncts(mask) if part.per_call)
            plain = tuple(part for part in conjuncts(mask) if not part.per_call)
            groups.append(Group(heads, kv_heads, conjunction(narrowed(plain)), conjunction(data) if data else None))
    # What a query sees depends on where it stands; at most it is every key.
    pairs = sum(group.heads.count for group in groups) * problem.kv_len * problem.batch
    flops = pairs * 2 * (problem.head_dim + problem.value_dim)
    return Proposal("strided", None, Cost(pairs, flops, 0, len(groups), 0, float(flops)), tuple(groups))


def forward(groups: tuple[Group, ...], call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """out (B, Hq, 1, Dv) and lse (B, Hq, 1)."""
    if len(groups) == 1 and groups[0].heads.count == q.shape[1]:
        return _seen(groups[0], call, q, k, v)
    out, lse = _nothing(q, v)
    for group in groups:
        part = _seen(group, call, group.heads.of(q), group.kv_heads.of(k), group.kv_heads.of(v))
        merge_(group.heads.of(out), group.heads.of(lse), *part)
    return out, lse


def _nothing(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_zeros((*q.shape[:3], v.shape[3])), q.new_full(q.shape[:3], -math.inf, dtype=lse_dtype(q.dtype))


def _seen(group: Group, call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) of a group's heads over the keys that they see."""
    spans, rest = group.where.keys_of(call.q_offset, k.shape[2]), group.rest
    if spans is None:
        spans, rest = (range(k.shape[2]),), group.where if rest is None else group.where & rest
    spans = tuple(span for span in spans if span)
    if not spans:
        return _nothing(q, v)
    # Merging a few results is cheaper than joining their keys.
    parts = [(span,) for span in spans] if len(spans) <= _MOST_ALONE else [spans]
    out, lse = _attention(group, parts[0], rest, call, q, k, v)
    for part in parts[1:]:
        merge_(out, lse, *_attention(group, part, rest, call, q, k, v))
    return out, lse


def _attention(
    group: Group, spans: tuple[range, ...], rest: Mask | None, call: Call, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    seen_k, seen_v = _joined(k, spans), _joined(v, spans)
    if rest is None and call.score_mod is None:
        return kernels.attention(q, seen_k, seen_v, kernels.Tiles(call.scale))
    b = torch.arange(q.shape[0], device=q.device)[:, None, None, None]
    h = torch.tensor(list(group.heads.indices()), device=q.device)[None, :, None, None]
    at = torch.full((1, 1, 1, 1), call.q_offset, device=q.device)
    keys = torch.cat([torch.arange(span.start, span.stop, span.step, device=q.device) for span in spans])[None, None, None, :]
    tiles = kernels.Tiles(call.scale)
    if rest is not None:
        hidden = ~rest.allows(b, h[:, :1], at, keys, call.data)
        tiles = replace(tiles, bias=torch.zeros(hidden.shape, dtype=q.dtype, device=q.device).masked_fill_(hidden, -math.inf))
        tiles = replace(tiles, dead=kernels.dead_rows(tiles, 1))
    if call.score_mod is not None:
        tiles = replace(tiles, score_mod=call.score_mod.on(b, h, at, keys))
    return kernels.attention(q, seen_k, seen_v, tiles)


def _joined(x: Tensor, spans: tuple[range, ...]) -> Tensor:
    parts = [x[:, :, span.start : span.stop : span.step] for span in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
