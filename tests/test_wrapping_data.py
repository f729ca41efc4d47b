"""Masks that read data of a call join the program.

They become data tensors, biases or conditions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx import GraphModule

import compiled_dilated as cd
from compiled_dilated import masks
from compiled_dilated.wrapping import graphs
from tests.support.masked import LENGTHS, SEEN, B, D, H, Masked, N, at, before, check, operands
from tests.support.wrapped import assert_close, recording, tensors_of_pairs

IDS = torch.arange(N)[None] // torch.tensor([[9], [14]])
ENDS = torch.arange(N).expand(B, N) // 8 * 8 + torch.tensor([[8], [12]])


def causal(n: int) -> Tensor:
    return before(n) >= 0


def padding_added(n: int, hidden: Tensor) -> Tensor:
    padding = torch.zeros(B, 1, 1, n).masked_fill(hidden[:, None, None], -torch.inf)
    return padding + torch.full((n, n), -torch.inf).triu(1)


def seen_queries_and_keys(n: int, seen: Tensor) -> Tensor:
    q, kv = at(n)
    return (seen[:, None, :, None] & seen[:, None, None, :]) | (q == kv)


def same_document(n: int, ids: Tensor) -> Tensor:
    return ids[:, None, :, None] == ids[:, None, None, :]


def documents_by_lookup(n: int, ids: Tensor) -> Tensor:
    q, kv = at(n)
    return ids[0][q] == ids[0][kv]


def bias_inside_of_causal(n: int, slopes: Tensor) -> Tensor:
    return (slopes[:, None, None] * -before(n)).masked_fill(~causal(n), -torch.inf)


def table_of_distances(n: int, table: Tensor) -> Tensor:
    return F.embedding((-before(n)).clamp(-4, 4) + 4, table).permute(2, 0, 1)[None]


SLOPES = torch.tensor([0.5, 0.25, 0.125], requires_grad=True)
TABLE = torch.randn(9, H, generator=torch.Generator().manual_seed(3)).requires_grad_()
# A mask, the tensor of a call that it reads, and a part of the program.
DATA: dict[str, tuple[Callable[..., Tensor], Tensor, str]] = {
    "padding and causal": (
        lambda n, seen: seen[:, None, None, :] & causal(n),
        SEEN,
        "causal() & padding",
    ),
    "padding by lengths": (
        lambda n, lengths: (torch.arange(n) < lengths[:, None])[:, None, None],
        LENGTHS,
        "padding",
    ),
    "padding added": (padding_added, ~SEEN, "causal()"),
    "padding of whole numbers": (
        lambda n, seen: (seen[:, None, None, :] == 1).expand(B, 1, n, n) & causal(n),
        SEEN.long(),
        "causal()",
    ),
    "documents": (lambda n, ids: same_document(n, ids) & causal(n), IDS, "documents"),
    "documents by lookup": (documents_by_lookup, IDS, "documents"),
    "ends of documents": (lambda n, ends: at(n)[1] < ends[:, None, :, None], ENDS, "full()"),
    "seen queries and keys": (seen_queries_and_keys, SEEN, "full()"),
    "bias of distances": (
        lambda n, slopes: -slopes[:, None, None] * before(n).abs(),
        SLOPES,
        "full()",
    ),
    "bias inside of causal": (bias_inside_of_causal, SLOPES, "causal()"),
    "a table of distances": (table_of_distances, TABLE, "full()"),
    "large and finite": (
        lambda n, big: torch.where(causal(n), 0.0, big),
        torch.tensor(-1e9),
        "full()",
    ),
}


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", DATA)
def test_data_joins_without_tensors_of_pairs(name: str, checkpointed: bool) -> None:
    mask, data, program = DATA[name]
    row, pairs = check(Masked(mask, checkpointed), *operands(), data)
    assert program in row["program"]
    assert pairs == []


def test_a_program_is_joined_with_a_mask_without_repeating_it() -> None:
    window = masks.causal() & masks.window(9)

    def joint(n: int, seen: Tensor) -> Tensor:
        return causal(n) & seen[:, None, None] & (before(n) <= 9)

    model = Masked(lambda n, seen: causal(n) & seen[:, None, None])
    row, pairs = check(model, *operands(), SEEN, attention=window, expected=Masked(joint))
    assert row["program"] == "Program((Branch(causal() & window(9) & padding()),))"
    assert pairs == []


def test_pairs_of_a_program_that_reads_data_are_counted_at_most() -> None:
    window = masks.causal() & masks.window(3)

    def near(n: int, *ids: Tensor) -> Tensor:
        mask = causal(n) & (before(n) <= 3)
        return mask & same_document(n, *ids) if ids else mask

    joined, _ = check(
        Masked(same_document), *operands(), IDS, attention=window, expected=Masked(near)
    )
    everywhere = Masked(lambda n: torch.ones(n, n, dtype=torch.bool))
    alone, _ = check(everywhere, *operands(), attention=window, expected=Masked(near))
    assert joined["at_most"]
    assert not alone["at_most"]
    assert joined["pairs"] == alone["pairs"] < joined["pairs_eager"]


class WithLengths(nn.Module):
    """Causal, with padding by lengths."""

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        n = x.shape[-2]
        seen = (torch.arange(n) < lengths[:, None])[:, None, None]
        mask = seen & torch.ones(n, n, dtype=torch.bool).tril()
        return F.scaled_dot_product_attention(x, x, x, attn_mask=mask)


def test_ten_lengths_are_two_graphs() -> None:
    counter: Any = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    model, plain = graphs.wrap(WithLengths(), None, None, counter), WithLengths()
    for length in (50, 33, 61, 77, 100, 123, 64, 128, 40, 200):
        x, lengths = torch.randn(2, H, length, D), torch.tensor([length, length - 7])
        assert_close(model(x, lengths), plain(x, lengths))
    assert 1 <= counter.frame_count <= 2
    (site,) = cd.sites(model)
    assert site.to_json()["program"] == "Program((Branch(causal() & padding()),))"


class Encoder(nn.Module):
    """nn.TransformerEncoder with a causal mask made in the forward."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(H * D, H, 48, 0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        if hidden is not None:
            hidden = torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)
        out: Tensor = self.encoder(x, causal, src_key_padding_mask=hidden, is_causal=True)
        return out


@pytest.mark.parametrize("padded", [False, True])
def test_masks_of_multihead_attention(padded: bool) -> None:
    torch._dynamo.reset()
    x = torch.randn(B, N, H * D, requires_grad=True)
    hidden = [~SEEN] if padded else []
    graphs_run: list[GraphModule] = []
    model = Encoder()
    plain = copy.deepcopy(model)
    graphs.wrap(model, None, None, recording(graphs_run))
    assert_close(model(x, *hidden), plain(x, *hidden))
    (site,) = cd.sites(model)
    joined = " & padding()" if padded else ""
    assert site.to_json()["program"] == f"Program((Branch(causal(){joined}),))"
    assert tensors_of_pairs(graphs_run, N, N) == []
