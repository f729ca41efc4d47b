"""The reference against loops over single pairs.

Their formulas share no code with masks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import compiled_dilated as cd
from compiled_dilated import Branch, Program, masks, orders
from compiled_dilated.programs import as_program
from compiled_dilated.reference import multiplicity

# How often query i of head h (out of H) sees key j of batch entry b.
Count = Callable[[int, int, int, int, int], int]

IDS = torch.tensor([[3, 3, 1, 1, 1, 3, 2, 2, 2, 2, 9], [0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0]])
PADDING = torch.tensor([[False] * 8 + [True] * 3, [True] * 11])


def same(actual: Any, expected: Any) -> None:
    """Tensors, or sequences of them, are equal to float64's rounding."""
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)


def loops(
    count: Count,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    q_offset: int = 0,
    sinks: Tensor | None = None,
    bias: Any = None,
) -> tuple[Tensor, Tensor]:
    """out and lse by their definition, pair by pair.

    The numbers are Python floats.
    """
    batch, heads, q_len, dim = q.shape
    group = heads // k.shape[1]
    scale = 1 / math.sqrt(dim) if scale is None else scale
    out = torch.zeros(batch, heads, q_len, v.shape[-1], dtype=torch.float64)
    lse = torch.full((batch, heads, q_len), -math.inf, dtype=torch.float64)
    for b, h, t in itertools.product(range(batch), range(heads), range(q_len)):
        i, total, row = q_offset + t, 0.0, [0.0] * v.shape[-1]
        query = q[b, h, t].tolist()
        for j in range(k.shape[2]):
            key, value = k[b, h // group, j].tolist(), v[b, h // group, j].tolist()
            score = scale * sum(x * y for x, y in zip(query, key, strict=True))
            if bias is not None:
                score = bias(score, b, h, i, j)
            weight = count(b, h, heads, i, j) * math.exp(score)
            total += weight
            row = [x + weight * y for x, y in zip(row, value, strict=True)]
        if sinks is not None:
            total += math.exp(sinks[h].item())
        if total:
            out[b, h, t] = torch.tensor(row, dtype=torch.float64) / total
            lse[b, h, t] = math.log(total)
    return out, lse


def longnet_count(
    lengths: tuple[int, ...], rates: tuple[int, ...], causal: bool, rule: str
) -> Count:
    """LongNet's multiplicity, from ranges of positions.

    The positions are those of a segment that a head sees.
    """

    def count(b: int, h: int, heads: int, i: int, j: int) -> int:
        times = 0
        for branch, (length, rate) in enumerate(zip(lengths, rates, strict=True)):
            if rule == "split":
                # The first heads % k branches have one head more.
                size, longer = divmod(heads, len(lengths))
                owners: list[int] = []
                for number in range(len(lengths)):
                    owners += [number] * (size + (number < longer))
                if owners[h] != branch:
                    continue
                offset = branch % rate
            else:
                offset = h % rate if rule == "cyclic" else h // math.ceil(heads / rate)
            start = i - i % length
            positions = range(start + offset, start + length, rate)
            times += i in positions and j in positions and (j <= i or not causal)
        return times

    return count


def chess(n: int, cell: int) -> tuple[int, int]:
    return divmod(cell, n)


def shifted(center: int, radius: int, size: int) -> range:
    """NATTEN's window, moved inwards at the borders.

    It has 2 * radius + 1 cells around the center.
    """
    first = min(max(center - radius, 0), max(size - (2 * radius + 1), 0))
    return range(first, min(first + 2 * radius + 1, size))


CASES: dict[str, tuple[Any, Count]] = {
    "full": (masks.full(), lambda b, h, H, i, j: 1),
    "causal": (masks.causal(), lambda b, h, H, i, j: j <= i),
    "window": (masks.window(3, 1), lambda b, h, H, i, j: j in range(i - 3, i + 2)),
    "window dilated": (
        masks.window(6, dilation=3),
        lambda b, h, H, i, j: j in (i - 6, i - 3, i, i + 3, i + 6),
    ),
    "window dilated, reach no multiple": (
        masks.window(5, 2, dilation=2),
        lambda b, h, H, i, j: j in (i - 4, i - 2, i, i + 2),
    ),
    "segments": (
        masks.segments(4),
        lambda b, h, H, i, j: any({i, j} <= set(range(s, s + 4)) for s in (0, 4, 8)),
    ),
    "congruent": (masks.congruent(3, 2), lambda b, h, H, i, j: {i, j} <= {2, 5, 8}),
    "congruent with a period": (
        masks.congruent(3, 1, period=5),
        lambda b, h, H, i, j: {i, j} <= {1, 4, 6, 9},
    ),
    "congruent per head": (
        masks.congruent(2, (0, 1, 1, 0)),
        lambda b, h, H, i, j: i % 2 == j % 2 == (0, 1, 1, 0)[h],
    ),
    "congruent cyclic": (
        masks.congruent(3, "cyclic"),
        lambda b, h, H, i, j: i % 3 == j % 3 == (0, 1, 2, 0)[h],
    ),
    "congruent grouped": (
        masks.congruent(3, "grouped"),
        lambda b, h, H, i, j: i % 3 == j % 3 == (0, 0, 1, 1)[h],
    ),
    "documents by lengths": (
        masks.documents(lengths=(2, 0, 5, 1)),
        lambda b, h, H, i, j: "aabbbbbc.,;"[i] == "aabbbbbc!?-"[j],
    ),
    "documents by ids": (
        masks.documents(ids="ids"),
        lambda b, h, H, i, j: IDS[b].tolist()[i] == IDS[b].tolist()[j],
    ),
    "padding": (masks.padding("pad"), lambda b, h, H, i, j: b == 0 and j < 8),
    "sinks": (masks.sinks(2), lambda b, h, H, i, j: j in (0, 1)),
    "prefix": (masks.prefix(4), lambda b, h, H, i, j: max(i, j) < 4),
    "global tokens": (masks.global_tokens(2), lambda b, h, H, i, j: min(i, j) < 2),
    "dilated blocks": (
        masks.dilated_blocks(2, 3),
        lambda b, h, H, i, j: abs(i // 2 - j // 2) in (0, 3),
    ),
    "tiles": (
        masks.tiles([(0, 1), (2, 0), (2, 2)], 4),
        lambda b, h, H, i, j: (i // 4, j // 4) in {(0, 1), (2, 0), (2, 2)},
    ),
    "neighborhood": (
        masks.neighborhood((3, 4), (1, 2)),
        lambda b, h, H, i, j: (
            abs(chess(4, i)[0] - chess(4, j)[0]) <= 1 and abs(chess(4, i)[1] - chess(4, j)[1]) <= 2
        ),
    ),
    "neighborhood shifted": (
        masks.neighborhood((3, 4), 1, edges="shift"),
        lambda b, h, H, i, j: (
            chess(4, j)[0] in shifted(chess(4, i)[0], 1, 3)
            and chess(4, j)[1] in shifted(chess(4, i)[1], 1, 4)
        ),
    ),
    "neighborhood causal along one axis": (
        masks.neighborhood((3, 4), 1, causal=(False, True)),
        lambda b, h, H, i, j: abs(i // 4 - j // 4) <= 1 and i % 4 - j % 4 in (0, 1),
    ),
    "neighborhood of a volume": (
        masks.neighborhood((2, 2, 3), (0, 1, 1)),
        lambda b, h, H, i, j: i // 6 == j // 6 and abs(i % 3 - j % 3) <= 1,
    ),
    "from_mod": (
        masks.from_mod(lambda b, h, q, kv: q * kv % 5 == h % 2 + b),
        lambda b, h, H, i, j: i * j % 5 == h % 2 + b,
    ),
    "and, or, not": (
        ~masks.causal() & (masks.window(2) | masks.segments(5)),
        lambda b, h, H, i, j: j > i and (j <= i + 2 or i // 5 == j // 5),
    ),
    "nothing": (masks.full() & ~masks.full(), lambda b, h, H, i, j: 0),
    "longnet": (cd.longnet((4, 8), (1, 2)), longnet_count((4, 8), (1, 2), False, "cyclic")),
    "longnet causal": (
        cd.longnet((3, 6, 12), (1, 2, 3), causal=True),
        longnet_count((3, 6, 12), (1, 2, 3), True, "cyclic"),
    ),
    "longnet grouped, rates divide nothing": (
        cd.longnet((5, 7), (3, 4), offsets="grouped"),
        longnet_count((5, 7), (3, 4), False, "grouped"),
    ),
    "longnet split": (
        cd.longnet((4, 7, 9), (2, 1, 3), heads="split", causal=True),
        longnet_count((4, 7, 9), (2, 1, 3), True, "split"),
    ),
    "a key that branches link twice": (
        Program(
            (Branch(masks.window(2)), Branch(masks.causal()), Branch(masks.window(2), heads=(1, 3)))
        ),
        lambda b, h, H, i, j: (abs(i - j) <= 2) * (1 + (h in (1, 2))) + (j <= i),
    ),
    "shares of heads, and an order": (
        Program((Branch(masks.window(1), "0/3", orders.residue(2)), Branch(masks.causal(), "2/3"))),
        lambda b, h, H, i, j: abs(i - j) <= 1 if h in (0, 1) else h == 3 and j <= i,
    ),
}


def tensors(
    q_len: int = 11, kv_len: int = 11, heads: int = 4, kv_heads: int = 2, value_dim: int = 5
) -> tuple[Tensor, Tensor, Tensor]:
    """Random q, k and v of batch 2 and head_dim 3."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    return (
        normal(2, heads, q_len, 3),
        normal(2, kv_heads, kv_len, 3),
        normal(2, kv_heads, kv_len, value_dim),
    )


def data_of(program: Program) -> dict[str, Tensor]:
    return {name: {"ids": IDS, "pad": PADDING}[name] for name in program.names}


@pytest.mark.parametrize("name", CASES)
def test_the_reference_is_the_definition(name: str) -> None:
    program_or_mask, count = CASES[name]
    program = as_program(program_or_mask)
    q, k, v = tensors()
    data = data_of(program)
    counts = multiplicity(program, q, k, data=data).tolist()
    for b, h, i, j in itertools.product(range(2), range(4), range(11), range(11)):
        assert counts[b][h][i][j] == int(count(b, h, 4, i, j))
    result = cd.reference(program_or_mask, q, k, v, data=data, return_lse=True)
    same(result, loops(count, q, k, v))
    out = cd.reference(program_or_mask, q, k, v, data=data)
    assert isinstance(out, Tensor)
    assert torch.equal(out, result[0])


def test_cross_attention_at_an_offset() -> None:
    q, k, v = tensors(q_len=3, kv_len=9)
    mask = masks.causal() & masks.window(4)
    result = cd.reference(mask, q, k, v, scale=-0.7, q_offset=6, return_lse=True)
    same(result, loops(lambda b, h, H, i, j: i - 4 <= j <= i, q, k, v, scale=-0.7, q_offset=6))


def test_sink_logits_and_score_mod() -> None:
    q, k, v = tensors()
    logits = torch.tensor([0.5, -3.0, 2.0, -math.inf], dtype=torch.float64)

    def score_mod(score: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        return score - 0.125 * abs(i - j) * (h + 1) + b

    # Rows without keys see the sink, a key of value 0.
    result = cd.reference(
        masks.congruent(2, 0), q, k, v, score_mod=score_mod, sink_logits=logits, return_lse=True
    )

    def count(b: int, h: int, heads: int, i: int, j: int) -> int:
        return i % 2 == j % 2 == 0

    same(result, loops(count, q, k, v, sinks=logits, bias=score_mod))


def test_large_scores_do_not_overflow() -> None:
    q, k, v = tensors()
    out, lse = cd.reference(masks.causal(), q * 1e4, k * 1e4, v, return_lse=True)
    assert out.isfinite().all()
    assert lse.isfinite().all()
    assert lse.abs().max() > 1e6


def test_gradients_are_right_and_zero_where_nothing_is_seen() -> None:
    q, k, v = (
        x.detach()[:1, :, :6].requires_grad_() for x in tensors(heads=3, kv_heads=1, value_dim=2)
    )
    program = cd.longnet((3, 6), (1, 2), causal=True)
    assert torch.autograd.gradcheck(
        lambda *x: cd.reference(program, *x, return_lse=True), (q, k, v)
    )
    dead = ~masks.causal()  # the last query sees no key, and no query sees the first key
    out = cd.reference(dead, q, k, v)
    assert isinstance(out, Tensor)
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert all(x.isfinite().all() for x in grads)
    assert (grads[0][:, :, -1] == 0).all()
    assert (grads[1][:, :, 0] == 0).all()
    assert (grads[2][:, :, 0] == 0).all()
    assert (grads[0][:, :, 0] != 0).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_results_are_float64(dtype: torch.dtype) -> None:
    q, k, v = (x.detach().to(dtype) for x in tensors())
    out, lse = cd.reference(masks.window(2), q, k, v, return_lse=True)
    assert out.dtype == lse.dtype == torch.float64
    widened = cd.reference(masks.window(2), q.double(), k.double(), v.double())
    assert isinstance(widened, Tensor)
    assert torch.equal(out, widened)


@pytest.mark.parametrize(("q_len", "kv_len"), [(0, 4), (4, 0), (0, 0)])
def test_empty_queries_or_keys(q_len: int, kv_len: int) -> None:
    q, k, v = tensors(q_len, kv_len)
    out, lse = cd.reference(masks.full(), q, k, v, return_lse=True)
    assert out.shape == (2, 4, q_len, 5)
    assert (out == 0).all()
    assert (lse == -math.inf).all()
    assert lse.shape == (2, 4, q_len)


def test_longnet_is_its_authors_mixture() -> None:
    """Branches weighted by their softmax denominators are one softmax with multiplicities."""
    q, k, v = tensors(heads=4, kv_heads=4)
    program = cd.longnet((4, 8), (1, 2))
    outs, lses = [], []
    for branch in program.branches:
        out, lse = cd.reference(Program((branch,)), q, k, v, return_lse=True)
        outs.append(out)
        lses.append(lse)
    weights = torch.stack(lses).softmax(dim=0)
    mixed = (weights[..., None] * torch.stack(outs)).sum(dim=0)
    same(cd.reference(program, q, k, v), mixed)
