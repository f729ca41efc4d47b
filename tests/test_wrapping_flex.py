"""flex_attention in a model's graph, against every pair in float64.

score_mods, mask_mods and what they capture, grouped heads, the log-sum-exp.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx import GraphModule
from torch.nn.attention.flex_attention import (
    AuxRequest,
    BlockMask,
    create_block_mask,
    flex_attention,
)

import compiled_dilated as cd
from compiled_dilated import masks
from compiled_dilated.wrapping import graphs
from tests.support.wrapped import (
    aot_eager,
    assert_close,
    assert_gradients,
    recording,
    tensors_of_pairs,
)

B, HEADS, N, D = 2, 4, 37, 16
IDS = torch.arange(N)[None] // torch.tensor([[9], [14]])


def causal(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    return q >= kv


class Flexible(nn.Module):
    """flex_attention with a mask_mod and a score_mod, or without.

    mask_mod: (b, h, q, kv) to bool.
    score: "slopes", a learned slope per head; "table", a learned table of distances; or "".
    """

    def __init__(
        self, mask_mod: Any = None, score: str = "", kv_heads: int = HEADS, **options: Any
    ) -> None:
        super().__init__()
        self.mask_mod, self.score, self.kv_heads, self.options = mask_mod, score, kv_heads, options
        numbers = torch.randn(HEADS, 2 * N - 1, generator=torch.Generator().manual_seed(5))
        self.slopes = nn.Parameter(torch.tensor([0.5, 0.25, 0.125, 0.1]))
        self.table = nn.Parameter(numbers)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        def by_slopes(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            return score + self.slopes[h] * (kv - q)

        def by_table(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            return torch.tanh(score + self.table[h, q - kv + N - 1])

        score_mod = {"": None, "slopes": by_slopes, "table": by_table}[self.score]
        block_mask = None
        if self.mask_mod is not None:
            block_mask = create_block_mask(self.mask_mod, B, HEADS, N, N, device="cpu")
        enable_gqa = self.kv_heads != HEADS
        return flex_attention(q, k, v, score_mod, block_mask, enable_gqa=enable_gqa, **self.options)

    def reference(self, q: Tensor, k: Tensor, v: Tensor, joined_mask: Any = None) -> Tensor:
        """Every pair in float64.

        joined_mask: a further mask_mod.
        """
        sizes = (torch.arange(size) for size in (B, HEADS, N, N))
        b, h, i, j = torch.meshgrid(*sizes, indexing="ij")
        k, v = (x.double().repeat_interleave(HEADS // self.kv_heads, 1) for x in (k, v))
        scores = q.double() @ k.transpose(-2, -1) * self.options.get("scale", D**-0.5)
        if self.score == "slopes":
            scores = scores + self.slopes[h] * (j - i)
        if self.score == "table":
            scores = torch.tanh(scores + self.table[h, i - j + N - 1])
        seen = torch.ones(B, HEADS, N, N, dtype=torch.bool)
        for mask_mod in (self.mask_mod, joined_mask):
            if mask_mod is not None:
                seen = seen & mask_mod(b, h, i, j)
        weights = torch.softmax(scores.masked_fill(~seen, -torch.inf), -1).nan_to_num(0.0)
        return weights @ v

    @property
    def learned(self) -> Sequence[Tensor]:
        """The parameters that the score_mod reads."""
        return {"": [], "slopes": [self.slopes], "table": [self.table]}[self.score]


def operands(kv_heads: int = HEADS) -> list[Tensor]:
    torch.manual_seed(0)
    return [
        torch.randn(B, heads, N, D, requires_grad=True) for heads in (HEADS, kv_heads, kv_heads)
    ]


def check(model: Flexible, attention: Any = None, joined_mask: Any = None) -> str:
    """The program of a model, with its results checked.

    Results and gradients are the reference's, without tensors of pairs.

    joined_mask: the program `attention` as a mask_mod.
    """
    torch._dynamo.reset()
    graphs_run: list[GraphModule] = []
    inputs = operands(model.kv_heads)
    q, k, v = inputs
    expected = model.reference(q, k, v, joined_mask)
    wrapped = graphs.wrap(model, attention, None, recording(graphs_run))
    out = wrapped(*inputs)
    assert_close(out.double(), expected)
    assert_gradients(out, expected, [*inputs, *model.learned])
    assert tensors_of_pairs(graphs_run, N, N) == []
    (site,) = cd.sites(wrapped)
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
SCORES = itertools.cycle(["", "slopes", "table"])


@pytest.mark.parametrize(("name", "score"), list(zip(MASKS, SCORES, strict=False)))
def test_mask_mods_and_score_mods(name: str, score: str) -> None:
    mask_mod, program = MASKS[name]
    assert program in check(Flexible(mask_mod, score))


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_heads_and_scale(kv_heads: int) -> None:
    assert "causal()" in check(Flexible(causal, "slopes", kv_heads, scale=0.3))


def test_a_program_is_joined_with_a_mask_mod() -> None:
    def window(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (q - kv).abs() <= 5

    program = check(Flexible(causal, "slopes"), masks.window(5), window)
    assert program == "Program((Branch(window(5) & causal()),))"


def test_gradients_on_a_cpu_need_no_new_graph_at_later_calls() -> None:
    """Torch's check of devices is replaced only during tracing.

    It refuses gradients on a CPU.
    """
    torch._dynamo.reset()
    counter: Any = CompileCounterWithBackend("aot_eager")
    model = graphs.wrap(Flexible(causal, "slopes"), None, None, counter)
    for _ in range(3):
        model(*operands()).sum().backward()
    assert counter.frame_count == 1


def test_gradients_of_torchs_own_flex_attention_on_a_cpu_are_still_refused() -> None:
    torch._dynamo.reset()
    graphs.wrap(Flexible(causal), None, None, aot_eager)(*operands())
    q, k, v = operands()
    compiled = torch.compile(flex_attention, backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="does not support backward on CPU"):
        compiled(q, k, v)


class WithLse(nn.Module):
    """flex_attention and its log-sum-exp."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        out, aux = flex_attention(q, k, v, return_aux=AuxRequest(lse=True))
        return out, aux.lse


def test_the_log_sum_exp_and_its_gradient() -> None:
    torch._dynamo.reset()
    q, k, v = operands()
    out, lse = graphs.wrap(WithLse(), None, None, recording([]))(q, k, v)
    scores = q.double() @ k.double().transpose(-2, -1) * D**-0.5
    expected = scores.logsumexp(-1)
    assert_close(lse.double(), expected)
    assert_close(out.double(), torch.softmax(scores, -1) @ v.double())
    assert_gradients(lse, expected, [q, k])


class Tuned(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q, k, v, kernel_options={"BLOCK_M": 32})


class OfTiles(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        counts = torch.ones(1, 1, 1, dtype=torch.int32)
        tiles = BlockMask.from_kv_blocks(
            counts, counts[..., None] * 0, BLOCK_SIZE=128, seq_lengths=(N, N)
        )
        return flex_attention(q, k, v, block_mask=tiles)


HERE = r"\(File .*test_wrapping_flex.*"
REFUSED = {
    "kernel_options": (
        Tuned(),
        f"kernel_options BLOCK_M of flex_attention .*{HERE}Leave them out",
    ),
    "tiles": (
        OfTiles(),
        f"a BlockMask of tiles alone is not read {HERE}give it a mask_mod",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_computed_is_refused_with_its_line(case: str) -> None:
    torch._dynamo.reset()
    model, message = REFUSED[case]
    with pytest.raises(NotImplementedError, match=message):
        graphs.wrap(model, None, None, recording([]))(*operands())
