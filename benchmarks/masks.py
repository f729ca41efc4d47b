"""Measure masks of data, tiles, functions and score_mods, with SDPA and FlexAttention.

python benchmarks/masks.py [--json FILE] [--quick] [--busy] [--threads 2] [--only TEXT]

Figures are useful rates as shares of dense SDPA's over 4096 tokens, or of the baseline in `share
of`. SDPA takes part up to 8192 tokens, where its dense mask fits. Documents are 512 tokens long on
average. Needs a quiet machine for most of an hour.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from harness import reports
from harness.cases import Case, in_time_of_dense, label, ours_of
from harness.problems import Problem, pairs_within
from torch import Tensor

import compiled_dilated as cd
from compiled_dilated import masks

LENGTHS = (2**11, 2**13, 2**16)
# At this length SDPA's mask takes 64 MiB, and a bias for 8 heads 2 GiB.
MOST_DENSE_TOKENS = 2**13
DOCUMENT_TOKENS = 512
TILE_TOKENS, BAND_BLOCKS = 4096, (16, 64, 100, 128)
BIG_BIRD_LENGTHS = (2**12, 2**14, 2**16)
# Time per token of BigBird, from 4096 tokens on.
FAMILIES = {"bigbird": 1 / 1.1, "bigbird-window": 1 / 1.1}


def rivals_at(tokens: int) -> tuple[str, ...]:
    """The rivals at a length; SDPA and the fallback up to 8192.

    SDPA's dense mask would not fit; the fallback evaluates all pairs, for minutes at 64K.
    """
    if tokens > MOST_DENSE_TOKENS:
        return ("flex",)
    return ("flex", "fallback", "SDPA")


def case(name: str, problem: Problem, **settings: Any) -> Case:
    """A case of a length."""
    return Case(
        f"{name}-{label(problem.tokens)}", problem, rivals=rivals_at(problem.tokens), **settings
    )


# Documents and padding


def document_lengths(tokens: int) -> tuple[int, ...]:
    """Uneven lengths, the same in every run."""
    count = tokens // DOCUMENT_TOKENS
    cuts = torch.randperm(tokens - 1, generator=torch.Generator().manual_seed(2))[: count - 1] + 1
    ends = [0, *sorted(cuts.tolist()), tokens]
    return tuple(stop - start for start, stop in itertools.pairwise(ends))


def documents(tokens: int, form: str, causal: bool = False) -> Problem:
    """Uneven documents.

    form: "lengths", "sorted" ids or "shuffled" ids.
    """
    lengths = document_lengths(tokens)
    by_lengths = form == "lengths"
    mask = masks.documents(lengths=lengths) if by_lengths else masks.documents(ids="documents")
    # Of two tokens of a document one comes first in any order: shuffling leaves the number.
    pairs = sum(length * length for length in lengths)
    if causal:
        mask, pairs = masks.causal() & mask, sum(n * (n + 1) // 2 for n in lengths)
    data = None
    if not by_lengths:
        ids = torch.repeat_interleave(torch.tensor(lengths))
        if form == "shuffled":
            ids = ids[torch.randperm(tokens, generator=torch.Generator().manual_seed(3))]
        data = {"documents": ids[None]}
    return Problem(mask, tokens, data=data, pairs_per_head=lambda: pairs)


def document_cases() -> list[Case]:
    """Sorted ids within 1.15 times the time of lengths."""
    out = []
    for tokens in LENGTHS:
        lengths = documents(tokens, "lengths")
        out.append(case("documents-lengths", lengths))
        out.append(case("documents-sorted", documents(tokens, "sorted"), quick=tokens == 2**11))
        # No block of keys is empty when ids are shuffled: all pairs are evaluated.
        if tokens <= MOST_DENSE_TOKENS:
            out.append(case("documents-shuffled", documents(tokens, "shuffled")))
    ids, lengths = (documents(2**13, form, causal=True) for form in ("sorted", "lengths"))
    bars, baseline = (1 / 1.15, 1 / 1.15), ours_of(lengths, "lengths")
    out.append(case("causal-documents", ids, bars=bars, of=baseline, quick=True))
    return out


def padding(tokens: int, padded: int, causal: bool = False) -> Problem:
    """The last `padded` keys are padding."""
    flags = torch.arange(tokens)[None] >= tokens - padded
    keys = tokens - padded
    mask, pairs = masks.padding(), tokens * keys
    if causal:
        mask, pairs = masks.causal() & mask, sum(tokens - key for key in range(keys))
    return Problem(mask, tokens, data={"padding": flags}, pairs_per_head=lambda: pairs)


def padding_cases() -> list[Case]:
    """Padding without a padded key, with causal alone as the baseline.

    It takes at most 1.05 times as long.
    """
    out = []
    for tokens in LENGTHS[:2]:  # at 64K all pairs take a minute
        out.append(case("padding-none", padding(tokens, 0)))
        out.append(case("padding-some", padding(tokens, tokens // 5)))
    bars, baseline = (1 / 1.05, 1 / 1.05), ours_of(Problem(masks.causal(), 2**13), "causal")
    problem = padding(2**13, 0, causal=True)
    out.append(case("causal-padding-none", problem, bars=bars, of=baseline, quick=True))
    return out


# Tiles, BigBird, Longformer


def band(block: int, tokens: int) -> Problem:
    """Each block sees itself and the block before it."""
    tiles = [(0, 0)]
    for row in range(1, -(-tokens // block)):
        tiles += [(row, row - 1), (row, row)]
    return Problem(masks.tiles(tiles, block), tokens)


def tile_cases() -> list[Case]:
    """Explicit tiles of any size."""
    out = []
    for block in BAND_BLOCKS:
        problem = band(block, TILE_TOKENS)
        out.append(case(f"tiles-{block}", problem, quick=block == 64))
    return out


def big_bird_cases() -> list[Case]:
    """BigBird by blocks, and with a window of single tokens."""
    out = []
    for tokens in BIG_BIRD_LENGTHS:
        blocks = cd.big_bird(window=64, global_tokens=64, random=3, block=64, tokens=tokens)
        single = masks.window(96) | masks.global_tokens(64) | masks.random_blocks(64, 3, tokens)
        for name, program in (("bigbird", blocks), ("bigbird-window", single)):
            is_quick = tokens == TILE_TOKENS
            out.append(case(name, Problem(program, tokens), family=name, quick=is_quick))
    # The shortest of both, compared with the time of dense attention.
    for shortest in out[:2]:
        baseline = in_time_of_dense(shortest.problem)
        out.append(Case(f"{shortest.name}-in-time", shortest.problem, (1.0, 1.0), baseline, ()))
    return out


def longformer_cases() -> list[Case]:
    """A window, and 16 scattered global tokens."""
    out = []
    for tokens in LENGTHS:
        scattered = torch.randperm(tokens, generator=torch.Generator().manual_seed(4))[:16].tolist()
        mask = masks.window(256) | masks.global_tokens(positions=scattered)
        out.append(case("longformer", Problem(mask, tokens), family="longformer"))
    return out


# Functions


def scattered_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """About two in seven of all pairs, as if drawn at random."""
    return (q_idx * 7919 + kv_idx * 104729 + q_idx * kv_idx) % 7 < 2


def near_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """A window as a mask_mod."""
    return (q_idx - kv_idx).abs() <= 256


def mod_cases() -> list[Case]:
    """mask_mods; without `within` up to 8192 tokens."""
    out = []
    for tokens in LENGTHS:
        if tokens <= MOST_DENSE_TOKENS:
            out.append(case("mod-scattered", scattered(tokens)))
            pairs = partial(pairs_within, tokens, 256)
            near = Problem(masks.from_mod(near_mod), tokens, pairs_per_head=pairs)
            out.append(case("mod-near", near, quick=tokens == 2**11))
        out.append(case("mod-scattered-within", scattered(tokens, 256)))
    return out


def scattered(tokens: int, reach: int | None = None) -> Problem:
    """`scattered_mod`, within a window of `reach` tokens unless it is None."""
    within = None if reach is None else masks.window(reach)
    mask = masks.from_mod(scattered_mod, within=within)
    return Problem(mask, tokens, pairs_per_head=partial(scattered_pairs, tokens, reach))


def scattered_pairs(tokens: int, reach: int | None = None) -> int:
    """Count the pairs that `scattered_mod` allows, at most `reach` apart."""
    zero, keys, total = torch.zeros(()), torch.arange(tokens), 0
    for rows in torch.arange(tokens).split(256):
        near = keys
        if reach is not None:
            near = keys[max(0, int(rows[0]) - reach) : int(rows[-1]) + reach + 1]
        allowed = scattered_mod(zero, zero, rows[:, None], near)
        if reach is not None:
            allowed &= (rows[:, None] - near).abs() <= reach
        total += int(allowed.sum())
    return total


def alibi(heads: int) -> tuple[Callable[..., Tensor], Callable[[int], Tensor]]:
    """ALiBi as a score_mod, and as a bias (heads, N, N)."""
    slopes = 2.0 ** (-8.0 * torch.arange(1, heads + 1) / heads)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score + slopes[h] * (kv_idx - q_idx)

    def bias(tokens: int) -> Tensor:
        index = torch.arange(tokens)
        return slopes[:, None, None] * (index - index[:, None])

    return score_mod, bias


def soft_cap(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """Scores between -20 and 20."""
    return 20 * torch.tanh(score / 20)


def score_cases() -> list[Case]:
    """Causal masks with a score_mod; at 64K with a window of 1024."""
    out = []
    mod, bias = alibi(Problem.heads)
    for tokens in LENGTHS:
        mask = masks.causal()
        if tokens > MOST_DENSE_TOKENS:
            mask = masks.causal() & masks.window(1024)
        problem = Problem(mask, tokens, score_mod=mod, bias=bias)
        out.append(case("alibi", problem, quick=tokens == 2**11))
        out.append(case("soft-cap", Problem(mask, tokens, score_mod=soft_cap)))
    return out


def cases() -> list[Case]:
    """All cases."""
    return [
        *document_cases(),
        *padding_cases(),
        *tile_cases(),
        *big_bird_cases(),
        *longformer_cases(),
        *mod_cases(),
        *score_cases(),
    ]


def main() -> int:
    listed = cases()
    options = reports.parser(__doc__, listed, ("flex", "fallback", "SDPA")).parse_args()
    return reports.run(options, listed, FAMILIES)


if __name__ == "__main__":
    raise SystemExit(main())
