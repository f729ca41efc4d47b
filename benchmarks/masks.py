"""Masks of data, tiles, functions and score_mods: against SDPA with a dense mask and compiled FlexAttention, in the same run.

python benchmarks/masks.py [--json FILE] [--quick] [--busy] [--threads 2] [--only TEXT]

Figures are useful rates as shares of dense SDPA's over 4096 tokens, or of what `share of` names. SDPA takes part up to 8192
tokens, where its mask fits. Documents are 512 tokens long on average. Needs a quiet machine for most of an hour.
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
# SDPA's mask of so many tokens takes 64 MiB, 2 GiB as numbers for 8 heads.
MOST_DENSE_TOKENS = 2**13
DOCUMENT_TOKENS = 512
TILE_TOKENS, BAND_BLOCKS = 4096, (16, 64, 100, 128)
BIG_BIRD_LENGTHS = (2**12, 2**14, 2**16)
# Time per token of BigBird, from 4096 tokens on.
FAMILIES = {"bigbird": 1 / 1.1, "bigbird-window": 1 / 1.1}


def rivals_at(tokens: int) -> tuple[str, ...]:
    """SDPA where its dense mask fits; the fallback asks about every pair, which takes minutes at 64K."""
    return ("flex", "fallback", "SDPA") if tokens <= MOST_DENSE_TOKENS else ("flex",)


def case(name: str, problem: Problem, **settings: Any) -> Case:
    """A case of a length."""
    return Case(
        f"{name}-{label(problem.tokens)}", problem, rivals=rivals_at(problem.tokens), **settings
    )


# Documents and padding ------------------------------------------------------------------------------------------------------


def document_lengths(tokens: int) -> tuple[int, ...]:
    """Uneven ones, the same in every run."""
    count = tokens // DOCUMENT_TOKENS
    cuts = torch.randperm(tokens - 1, generator=torch.Generator().manual_seed(2))[: count - 1] + 1
    ends = [0, *sorted(cuts.tolist()), tokens]
    return tuple(stop - start for start, stop in itertools.pairwise(ends))


def documents(tokens: int, form: str, causal: bool = False) -> Problem:
    """form: "lengths", "sorted" ids or "shuffled" ids."""
    lengths = document_lengths(tokens)
    of_document = (
        masks.documents(lengths=lengths) if form == "lengths" else masks.documents(ids="documents")
    )
    # Shuffling moves pairs, and of two tokens of a document one still comes first.
    pairs = sum(length * (length + 1) // 2 if causal else length * length for length in lengths)
    data = None
    if form != "lengths":
        ids = torch.repeat_interleave(torch.tensor(lengths))
        order = (
            torch.randperm(tokens, generator=torch.Generator().manual_seed(3))
            if form == "shuffled"
            else torch.arange(tokens)
        )
        data = {"documents": ids[order][None]}
    return Problem(
        masks.causal() & of_document if causal else of_document,
        tokens,
        data=data,
        pairs_per_head=lambda: pairs,
    )


def document_cases() -> list[Case]:
    """Ids within 1.15 times of the time of lengths, where they are sorted."""
    out = []
    for tokens in LENGTHS:
        lengths = documents(tokens, "lengths")
        out.append(case("documents-lengths", lengths))
        out.append(case("documents-sorted", documents(tokens, "sorted"), quick=tokens == 2**11))
        if tokens <= MOST_DENSE_TOKENS:  # every block of keys is seen: all pairs are asked about
            out.append(case("documents-shuffled", documents(tokens, "shuffled")))
    ids, lengths = (documents(2**13, form, causal=True) for form in ("sorted", "lengths"))
    most = 1 / 1.15
    return [
        *out,
        case(
            "causal-documents", ids, bars=(most, most), of=ours_of(lengths, "lengths"), quick=True
        ),
    ]


def padding(tokens: int, padded: int, causal: bool = False) -> Problem:
    """The last `padded` keys are padding."""
    flags = torch.arange(tokens)[None] >= tokens - padded
    kept = tokens - padded
    pairs = sum(tokens - key for key in range(kept)) if causal else tokens * kept
    mask = masks.causal() & masks.padding() if causal else masks.padding()
    return Problem(mask, tokens, data={"padding": flags}, pairs_per_head=lambda: pairs)


def padding_cases() -> list[Case]:
    """Padding without a padded key within 1.05 times of the time of causal alone."""
    out = []
    for tokens in LENGTHS[:2]:  # at 64K all pairs take a minute
        out.append(case("padding-none", padding(tokens, 0)))
        out.append(case("padding-some", padding(tokens, tokens // 5)))
    most = 1 / 1.05
    causal = Problem(masks.causal(), 2**13)
    of = ours_of(causal, "causal")
    return [
        *out,
        case(
            "causal-padding-none",
            padding(2**13, 0, causal=True),
            bars=(most, most),
            of=of,
            quick=True,
        ),
    ]


# Tiles, BigBird, Longformer -------------------------------------------------------------------------------------------------


def band(block: int, tokens: int) -> Problem:
    """Each block sees the one before it and itself."""
    rows = range(-(-tokens // block))
    return Problem(
        masks.tiles(
            [(row, column) for row in rows for column in (row - 1, row) if column >= 0], block
        ),
        tokens,
    )


def tile_cases() -> list[Case]:
    """Explicit tiles of any size; how many of the computed pairs are useful is what counts."""
    return [
        case(f"tiles-{block}", band(block, TILE_TOKENS), quick=block == 64) for block in BAND_BLOCKS
    ]


def big_bird_cases() -> list[Case]:
    """BigBird by whole blocks, and with a window of single tokens."""
    out = []
    for tokens in BIG_BIRD_LENGTHS:
        blocks = cd.big_bird(window=64, global_tokens=64, random=3, block=64, tokens=tokens)
        single = masks.window(96) | masks.global_tokens(64) | masks.random_blocks(64, 3, tokens)
        for name, program in (("bigbird", blocks), ("bigbird-window", single)):
            out.append(
                case(name, Problem(program, tokens), family=name, quick=tokens == TILE_TOKENS)
            )
    in_time = [
        Case(f"{each.name}-in-time", each.problem, (1.0, 1.0), in_time_of_dense(each.problem), ())
        for each in out[:2]
    ]
    return [*out, *in_time]


def longformer_cases() -> list[Case]:
    """A window, and 16 scattered tokens that see all and are seen by all."""
    out = []
    for tokens in LENGTHS:
        scattered = torch.randperm(tokens, generator=torch.Generator().manual_seed(4))[:16].tolist()
        mask = masks.window(256) | masks.global_tokens(positions=scattered)
        out.append(case("longformer", Problem(mask, tokens), family="longformer"))
    return out


# Functions ------------------------------------------------------------------------------------------------------------------


def scattered_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """About two in seven of all pairs, as if drawn at random."""
    return (q_idx * 7919 + kv_idx * 104729 + q_idx * kv_idx) % 7 < 2


def near_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """A window, as a user writes it."""
    return (q_idx - kv_idx).abs() <= 256


def mod_cases() -> list[Case]:
    """mask_mods; without `within` up to 8192 tokens."""
    out = []
    for tokens in LENGTHS:
        if tokens <= MOST_DENSE_TOKENS:
            out.append(
                case(
                    "mod-scattered",
                    Problem(
                        masks.from_mod(scattered_mod), tokens, pairs_per_head=partial(asked, tokens)
                    ),
                )
            )
            near = Problem(
                masks.from_mod(near_mod), tokens, pairs_per_head=partial(pairs_within, tokens, 256)
            )
            out.append(case("mod-near", near, quick=tokens == 2**11))
        within = masks.from_mod(scattered_mod, within=masks.window(256))
        out.append(
            case(
                "mod-scattered-within",
                Problem(within, tokens, pairs_per_head=partial(asked, tokens, 256)),
            )
        )
    return out


def asked(tokens: int, reach: int | None = None) -> int:
    """Pairs that `scattered_mod` allows, no further apart than `reach`."""
    none, keys, total = torch.zeros(()), torch.arange(tokens), 0
    for rows in torch.arange(tokens).split(256):
        near = (
            keys
            if reach is None
            else keys[max(0, int(rows[0]) - reach) : int(rows[-1]) + reach + 1]
        )
        seen = scattered_mod(none, none, rows[:, None], near)
        if reach is not None:
            seen &= (rows[:, None] - near).abs() <= reach
        total += int(seen.sum())
    return total


def alibi(heads: int) -> tuple[Callable[..., Tensor], Callable[[int], Tensor]]:
    """Its score_mod, and what that adds as a tensor (heads, N, N)."""
    slopes = 2.0 ** (-8.0 * torch.arange(1, heads + 1) / heads)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score + slopes[h] * (kv_idx - q_idx)

    def bias(tokens: int) -> Tensor:
        at = torch.arange(tokens)
        return slopes[:, None, None] * (at - at[:, None])

    return score_mod, bias


def soft_cap(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """Scores between -20 and 20."""
    return 20 * torch.tanh(score / 20)


def score_cases() -> list[Case]:
    """Causal with a score_mod; at 64K, where causal takes a minute, over a window of 1024."""
    out = []
    mod, bias = alibi(Problem.heads)
    for tokens in LENGTHS:
        mask = (
            masks.causal() if tokens <= MOST_DENSE_TOKENS else masks.causal() & masks.window(1024)
        )
        out.append(
            case("alibi", Problem(mask, tokens, score_mod=mod, bias=bias), quick=tokens == 2**11)
        )
        out.append(case("soft-cap", Problem(mask, tokens, score_mod=soft_cap)))
    return out


def cases() -> list[Case]:
    """All of them."""
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
