"""FlexAttention in a model's graph becomes ours: score_mods, mask_mods, what they capture, grouped heads, the log-sum-exp."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import (
    AuxRequest,
    BlockMask,
    create_block_mask,
    flex_attention,
)

import compiled_dilated as cd
from compiled_dilated import masks
from compiled_dilated.wrapping import graphs
from tests.test_wrapping_masks import graphs_of, pairs_made

B, HEADS, N, D = 2, 4, 37, 16
IDS = torch.arange(N)[None] // torch.tensor([[9], [14]])


def causal(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    return q >= kv


class Flexible(nn.Module):
    """flex_attention with a learned bias of heads, a table of distances, a mask_mod, all of them or none."""

    def __init__(
        self, mask_mod: Any = None, score: str = "", kv_heads: int = HEADS, **options: Any
    ) -> None:
        super().__init__()
        self.mask_mod, self.score, self.kv_heads, self.options = mask_mod, score, kv_heads, options
        self.slopes = nn.Parameter(torch.tensor([0.5, 0.25, 0.125, 0.1]))
        self.table = nn.Parameter(
            torch.randn(HEADS, 2 * N - 1, generator=torch.Generator().manual_seed(5))
        )

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        def by_slopes(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            return score + self.slopes[h] * (kv - q)

        def by_table(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            return torch.tanh(score + self.table[h, q - kv + N - 1])

        score_mod = {"": None, "slopes": by_slopes, "table": by_table}[self.score]
        tiles = (
            None
            if self.mask_mod is None
            else create_block_mask(self.mask_mod, B, HEADS, N, N, device="cpu")
        )
        return flex_attention(
            q, k, v, score_mod, tiles, enable_gqa=self.kv_heads != HEADS, **self.options
        )

    def reference(self, q: Tensor, k: Tensor, v: Tensor, more: Any = None) -> Tensor:
        """Every pair in float64."""
        b, h, i, j = torch.meshgrid(
            *(torch.arange(size) for size in (B, HEADS, N, N)), indexing="ij"
        )
        k, v = (x.double().repeat_interleave(HEADS // self.kv_heads, 1) for x in (k, v))
        scores = q.double() @ k.transpose(-2, -1) * self.options.get("scale", D**-0.5)
        if self.score == "slopes":
            scores = scores + self.slopes[h] * (j - i)
        if self.score == "table":
            scores = torch.tanh(scores + self.table[h, i - j + N - 1])
        seen = torch.ones(B, HEADS, N, N, dtype=torch.bool)
        for mask_mod in (self.mask_mod, more):
            seen = seen if mask_mod is None else seen & mask_mod(b, h, i, j)
        weights = torch.softmax(scores.masked_fill(~seen, -torch.inf), -1).nan_to_num(0.0)
        return weights @ v


def operands(kv_heads: int = HEADS) -> list[Tensor]:
    torch.manual_seed(0)
    return [
        torch.randn(B, heads, N, D, requires_grad=True) for heads in (HEADS, kv_heads, kv_heads)
    ]


def check(model: Flexible, attention: Any = None, more: Any = None) -> str:
    """The result and all gradients are those of every pair in float64, and nothing is made for each; the program."""
    torch._dynamo.reset()
    found: list[Any] = []
    inputs = operands(model.kv_heads)
    want = model.reference(*inputs, more)
    ours = graphs.wrap(model, attention, None, graphs_of(found))
    out = ours(*inputs)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)
    learned = [*inputs, *({"slopes": [model.slopes], "table": [model.table]}.get(model.score, []))]
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    gradients = (torch.autograd.grad((x * weights).sum(), learned) for x in (out, want))
    for got, grad in zip(*gradients, strict=True):
        torch.testing.assert_close(got.double(), grad.double(), rtol=1e-4, atol=1e-5)
    assert pairs_made(found) == []
    (site,) = cd.sites(ours)
    row = site.to_json()
    assert row["kind"] == "flex_attention"
    return str(row["program"])


MASKS: dict[str, tuple[Callable[..., Tensor] | None, str]] = {
    "none": (None, "Program((Branch(full()),))"),
    "causal": (causal, "Program((Branch(causal()),))"),
    "window": (lambda b, h, q, kv: (q - kv).abs() <= 4, "Program((Branch(window(4)),))"),
    "documents": (
        lambda b, h, q, kv: (q >= kv) & (IDS[b, q] == IDS[b, kv]),
        "Program((Branch(causal() & documents(ids='documents')),))",
    ),
    "by heads": (
        lambda b, h, q, kv: (q - kv).abs() <= h + 2,
        "Program((Branch(from_mod(MaskOfCall, within=full())),))",
    ),
    "a neighborhood": (
        lambda b, h, q, kv: ((q // 6 - kv // 6).abs() <= 1) & ((q % 6 - kv % 6).abs() <= 1),
        "from_mod(MaskOfCall, within=block_window(6, 1))",
    ),
    "read by no rule": (
        lambda b, h, q, kv: torch.stack([q, kv]).amin(0) + 3 > kv,
        "Program((Branch(full()),))",
    ),
}


@pytest.mark.parametrize(
    ("name", "score"), zip(MASKS, itertools.cycle(["", "slopes", "table"]), strict=False)
)
def test_mask_mods_and_score_mods(name: str, score: str) -> None:
    mask_mod, program = MASKS[name]
    assert program in check(Flexible(mask_mod, score))


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_heads_and_scale(kv_heads: int) -> None:
    check(Flexible(causal, "slopes", kv_heads, scale=0.3))


def test_a_program_is_joined_with_a_mask_mod() -> None:
    program = check(
        Flexible(causal, "slopes"), masks.window(5), lambda b, h, q, kv: (q - kv).abs() <= 5
    )
    assert program == "Program((Branch(window(5) & causal()),))"


class WithLse(nn.Module):
    """flex_attention and its log-sum-exp."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        out, aux = flex_attention(q, k, v, return_aux=AuxRequest(lse=True))
        return out, aux.lse


def test_the_log_sum_exp_and_its_gradient() -> None:
    torch._dynamo.reset()
    q, k, v = operands()
    out, lse = graphs.wrap(WithLse(), None, None, graphs_of([]))(q, k, v)
    scores = q.double() @ k.double().transpose(-2, -1) * D**-0.5
    want = scores.logsumexp(-1)
    torch.testing.assert_close(lse.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        out.double(), torch.softmax(scores, -1) @ v.double(), rtol=1e-5, atol=1e-5
    )
    for got, grad in zip(
        *(torch.autograd.grad(x.square().sum(), (q, k)) for x in (lse, want)), strict=True
    ):
        torch.testing.assert_close(got.double(), grad.double(), rtol=1e-4, atol=1e-5)


class Tuned(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q, k, v, kernel_options={"BLOCK_M": 32})  # type: ignore[return-value]


class OfTiles(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        one = torch.ones(1, 1, 1, dtype=torch.int32)
        tiles = BlockMask.from_kv_blocks(
            one, one[..., None] * 0, BLOCK_SIZE=128, seq_lengths=(N, N)
        )
        return flex_attention(q, k, v, block_mask=tiles)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            Tuned(),
            r"kernel_options BLOCK_M of flex_attention .*\(File .*test_wrapping_flex.*Leave them out",
        ),
        (
            OfTiles(),
            r"a BlockMask of tiles alone is not read \(File .*test_wrapping_flex.*give it a mask_mod",
        ),
    ],
    ids=["kernel_options", "tiles"],
)
def test_what_is_not_computed_is_refused_with_its_line(model: nn.Module, message: str) -> None:
    torch._dynamo.reset()
    with pytest.raises(NotImplementedError, match=message):
        graphs.wrap(model, None, None, graphs_of([]))(*operands())
