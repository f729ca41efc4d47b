"""Masks that a model makes in its forward are read from its graph: what they say joins the program, and no N x N is made."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

import compiled_dilated as cd
from compiled_dilated import masks
from compiled_dilated.wrapping import graphs

# Lengths that no other dimension has.
B, H, N, M, D = 2, 3, 37, 53, 8
LENGTHS = torch.tensor([N, 19])
IDS = torch.arange(N)[None] // torch.tensor([[9], [14]])


class Masked(nn.Module):
    """scaled_dot_product_attention with a mask made in the forward."""

    def __init__(self, mask: Callable[..., Tensor], checkpointed: bool = False) -> None:
        super().__init__()
        self.mask, self.checkpointed = mask, checkpointed

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *data: Tensor) -> Tensor:
        mask = self.mask(q.shape[-2], *data)
        if self.checkpointed:
            out: Tensor = checkpoint(
                F.scaled_dot_product_attention, q, k, v, mask, use_reentrant=False
            )
            return out
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def graphs_of(found: list[GraphModule]) -> Any:
    """A backend that keeps the graphs of operators that it runs."""

    def keep(graph: GraphModule, inputs: Any) -> Any:
        found.append(graph)
        return graph.forward

    return aot_autograd(fw_compiler=keep, bw_compiler=keep)


def pairs_made(found: list[GraphModule], n: int = N, m: int = N) -> list[str]:
    """Nodes of graphs that make a tensor with an entry for each pair."""
    made = []
    for graph in found:
        for node in graph.graph.nodes:
            value = node.meta.get("val")
            if (
                node.op == "call_function"
                and isinstance(value, Tensor)
                and value.numel() >= n * m
                and value.shape[-1] == m
            ):
                made.append(f"{node.name}: {tuple(value.shape)}")
    return made


def operands(n: int = N, m: int = N) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(B, H, tokens, D, requires_grad=True) for tokens in (n, m, m)]


def check(
    model: nn.Module, *inputs: Tensor, attention: Any = None, want: nn.Module | None = None
) -> tuple[Any, list[str]]:
    """Result and gradients as without wrapping; the site's row, and what was made for each pair."""
    torch._dynamo.reset()
    found: list[GraphModule] = []
    plain = copy.deepcopy(model) if want is None else want
    ours = graphs.wrap(model, attention, None, graphs_of(found))
    learned = [x for x in inputs if x.requires_grad]
    out, expected = ours(*inputs), plain(*inputs)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    for got, grad in zip(
        *(torch.autograd.grad((x * weights).sum(), learned) for x in (out, expected)), strict=True
    ):
        torch.testing.assert_close(got, grad, rtol=1e-4, atol=1e-5)
    (site,) = cd.sites(ours)
    return site.to_json(), pairs_made(found, inputs[0].shape[-2], inputs[1].shape[-2])


def at(n: int) -> tuple[Tensor, Tensor]:
    return torch.arange(n)[:, None], torch.arange(n)


def negative(n: int, hidden: Tensor, least: float = -torch.inf) -> Tensor:
    return torch.zeros(n, n).masked_fill(hidden, least)


def written_in_place(n: int) -> Tensor:
    mask = torch.full((n, n), -torch.inf)
    mask.triu_(1)
    return mask


def filled_in_place(n: int) -> Tensor:
    mask = torch.zeros(n, n)
    mask.masked_fill_(torch.ones(n, n, dtype=torch.bool).tril().logical_not(), float("-inf"))
    return mask


CAUSAL: dict[str, Callable[[int], Tensor]] = {
    "tril of ones": lambda n: torch.tril(torch.ones(n, n)).bool(),
    "tril of bool": lambda n: torch.ones(n, n, dtype=torch.bool).tril(),
    "tril of four dimensions": lambda n: torch.tril(torch.ones(n, n)).view(1, 1, n, n) > 0,
    "tril == 1": lambda n: torch.tril(torch.ones((n, n))) == 1,
    "triu of -inf": lambda n: torch.triu(torch.full((n, n), float("-inf")), diagonal=1),
    "triu == 0 filled": lambda n: negative(n, torch.tril(torch.ones(n, n)) == 0),
    "square subsequent": nn.Transformer.generate_square_subsequent_mask,
    "compared": lambda n: at(n)[1] <= at(n)[0],
    "compared, other way": lambda n: (at(n)[0] >= at(n)[1])[None, None],
    "strictly": lambda n: ~(at(n)[1] > at(n)[0]),
    "by difference": lambda n: (at(n)[0] - at(n)[1]) >= 0,
    "where": lambda n: torch.where(at(n)[1] > at(n)[0], -torch.inf, 0.0),
    "where with the least number": lambda n: torch.where(
        at(n)[1] > at(n)[0], torch.finfo(torch.float32).min, 0.0
    ),
    "least number": lambda n: negative(n, at(n)[1] > at(n)[0], torch.finfo(torch.float32).min),
    "one minus": lambda n: (1.0 - torch.ones(n, n).tril()) * torch.finfo(torch.float32).min,
    "transposed": lambda n: torch.ones(n, n, dtype=torch.bool).triu().transpose(0, 1),
    "expanded": lambda n: (at(n)[1] <= at(n)[0]).unsqueeze(0).unsqueeze(0).expand(B, 1, n, n),
    "float and back": lambda n: torch.ones(n, n).tril().to(torch.int32).bool(),
    "in place": written_in_place,
    "filled in place": filled_in_place,
    "twice": lambda n: torch.ones(n, n).tril().bool() & (at(n)[1] <= at(n)[0]),
    "sum of two": lambda n: (
        negative(n, at(n)[1] > at(n)[0]) + torch.full((n, n), -torch.inf).triu(1)
    ),
}


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_however_it_is_written_is_causal(name: str) -> None:
    row, made = check(Masked(CAUSAL[name]), *operands())
    assert row["program"] == "Program((Branch(causal()),))"
    assert made == []


STRUCTURES: dict[str, tuple[Callable[[int], Tensor], str]] = {
    "window": (lambda n: (at(n)[0] - at(n)[1]).abs() <= 5, "window(5)"),
    "window, strictly": (lambda n: (at(n)[1] - at(n)[0]).abs() < 5, "window(4)"),
    "causal window": (lambda n: (at(n)[1] <= at(n)[0]) & (at(n)[1] > at(n)[0] - 6), "window(5, 0)"),
    "band": (lambda n: torch.ones(n, n, dtype=torch.bool).tril(2).triu(-3), "window(3, 2)"),
    "sinks": (lambda n: (at(n)[1] <= at(n)[0]) & ((at(n)[1] < 4) | (at(n)[0] - at(n)[1] < 6)), "causal() & (sinks(4) | "),
    "prefix": (lambda n: (at(n)[1] <= at(n)[0]) | (at(n)[1] < 7), "causal() | sinks(7)"),
    "segments": (lambda n: at(n)[0] // 8 == at(n)[1] // 8, "segments(8)"),
    "blocks": (lambda n: torch.div(at(n)[1], 8, rounding_mode="floor") <= at(n)[0] // 8, "block_window(8, "),
    "dilated": (lambda n: ((at(n)[0] - at(n)[1]) % 3 == 0) & (at(n)[1] <= at(n)[0]), "dilation=3) & causal()"),
    "itself": (lambda n: at(n)[0] == at(n)[1], "window(0)"),
    "not the diagonal": (lambda n: (at(n)[0] != at(n)[1]) | (at(n)[1] == 0), "~window(0)"),
    "arithmetic": (lambda n: (at(n)[0] * at(n)[1]) % 3 != 1, "from_mod(MaskOfCall, within=full())"),
}  # fmt: skip


@pytest.mark.parametrize("name", STRUCTURES)
def test_structures_are_masks_of_ours(name: str) -> None:
    mask, program = STRUCTURES[name]
    row, made = check(Masked(mask), *operands())
    assert program in row["program"]
    assert made == []


DATA: dict[str, tuple[Callable[..., Tensor], Tensor, str]] = {
    "padding and causal": (
        lambda n, seen: seen[:, None, None, :] & torch.ones(n, n, dtype=torch.bool).tril(),
        torch.arange(N) < LENGTHS[:, None],
        "causal() & padding",
    ),
    "padding of lengths": (
        lambda n, lengths: (torch.arange(n) < lengths[:, None])[:, None, None],
        LENGTHS,
        "padding",
    ),
    "padding added": (
        lambda n, hidden: (
            torch.zeros(B, 1, 1, n).masked_fill(hidden[:, None, None], -torch.inf)
            + torch.full((n, n), -torch.inf).triu(1)
        ),
        torch.arange(N) >= LENGTHS[:, None],
        "causal()",
    ),
    "padding of whole numbers": (
        lambda n, seen: (seen[:, None, None, :] == 1).expand(B, 1, n, n) & (at(n)[1] <= at(n)[0]),
        (torch.arange(N) < LENGTHS[:, None]).long(),
        "causal()",
    ),
    "documents": (
        lambda n, ids: (ids[:, None, :, None] == ids[:, None, None, :]) & (at(n)[1] <= at(n)[0]),
        IDS,
        "documents",
    ),
    "documents by tables": (lambda n, ids: ids[0][at(n)[0]] == ids[0][at(n)[1]], IDS, "documents"),
    "ends of documents": (
        lambda n, ends: at(n)[1] < ends[:, None, :, None],
        torch.arange(N).expand(B, N) // 8 * 8 + torch.tensor([[8], [12]]),
        "full()",
    ),
    "seen queries and keys": (
        lambda n, seen: (seen[:, None, :, None] & seen[:, None, None, :]) | (at(n)[0] == at(n)[1]),
        torch.arange(N) < LENGTHS[:, None],
        "full()",
    ),
    "bias of distances": (
        lambda n, slopes: -slopes[:, None, None] * (at(n)[0] - at(n)[1]).abs(),
        torch.tensor([0.5, 0.25, 0.125], requires_grad=True),
        "full()",
    ),
    "bias inside of causal": (
        lambda n, slopes: (slopes[:, None, None] * (at(n)[1] - at(n)[0])).masked_fill(
            at(n)[1] > at(n)[0], -torch.inf
        ),
        torch.tensor([0.5, 0.25, 0.125], requires_grad=True),
        "causal()",
    ),
    "a table of distances": (
        lambda n, table: F.embedding((at(n)[1] - at(n)[0]).clamp(-4, 4) + 4, table).permute(
            2, 0, 1
        )[None],
        torch.randn(9, H, generator=torch.Generator().manual_seed(3)).requires_grad_(),
        "full()",
    ),
    "large and finite": (
        lambda n, big: torch.where(at(n)[1] > at(n)[0], big, 0.0),
        torch.tensor(-1e9),
        "full()",
    ),
}


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", DATA)
def test_data_joins_without_pairs(name: str, checkpointed: bool) -> None:
    mask, data, program = DATA[name]
    row, made = check(Masked(mask, checkpointed), *operands(), data)
    assert program in row["program"]
    assert made == []


def written_by_a_view(n: int) -> Tensor:
    mask = torch.ones(n, n, dtype=torch.bool).tril()
    mask[:, 0].fill_(False)
    mask[0].fill_(True)
    return mask


def written_after_it_is_read(n: int) -> Tensor:
    rows = torch.arange(n)
    mask = rows[:, None] >= rows
    rows.mul_(0)
    return mask | (rows == 1)


def written_by_places(n: int) -> Tensor:
    mask = torch.ones(n, n).tril()
    mask[:3] = 1
    return mask.bool()


@pytest.mark.parametrize(
    "mask",
    [
        written_by_a_view,
        written_after_it_is_read,
        written_by_places,
        lambda n: (
            torch.eye(n, dtype=torch.bool) | torch.ones(n, n, dtype=torch.bool).roll(1, 0).tril()
        ),
        lambda n: torch.where(at(n)[1] > at(n)[0] - 2, torch.finfo(torch.float32).min, 0.0),
    ],
)
def test_what_is_not_proven_is_read_pair_by_pair(mask: Callable[[int], Tensor]) -> None:
    row, _ = check(Masked(mask), *operands())
    assert "mask" in row["model"] or "bias" in row["model"]


def test_a_mask_from_outside_is_read_pair_by_pair() -> None:
    row, made = check(
        Masked(lambda n, mask: mask), *operands(), torch.ones(N, N, dtype=torch.bool).tril()
    )
    assert row["model"] == "a mask"
    assert made == []


def test_queries_and_keys_of_two_lengths() -> None:
    def mask(n: int) -> Tensor:
        return torch.arange(M) <= torch.arange(n)[:, None] + (M - n)

    row, made = check(Masked(mask), *operands(N, M))
    assert f", {M - N})" in row["program"]
    assert made == []


def test_a_program_is_joined_with_what_a_mask_says() -> None:
    window = masks.causal() & masks.window(9)

    def both(n: int, seen: Tensor) -> Tensor:
        return CAUSAL["compared"](n) & seen[:, None, None] & (at(n)[0] - at(n)[1] <= 9)

    want = Masked(both)
    model = Masked(lambda n, seen: CAUSAL["compared"](n) & seen[:, None, None])
    row, made = check(
        model, *operands(), torch.arange(N) < LENGTHS[:, None], attention=window, want=want
    )
    # Causal is there anyway.
    assert row["program"] == "Program((Branch(causal() & window(9) & padding()),))"
    assert made == []


class Lengths(nn.Module):
    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        n = x.shape[-2]
        seen = (torch.arange(n) < lengths[:, None])[:, None, None] & torch.ones(
            n, n, dtype=torch.bool
        ).tril()
        return F.scaled_dot_product_attention(x, x, x, attn_mask=seen)


def test_ten_lengths_are_two_graphs() -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    ours, plain = graphs.wrap(Lengths(), None, None, counter), Lengths()
    for length in (50, 33, 61, 77, 100, 123, 64, 128, 40, 200):
        x, lengths = torch.randn(2, H, length, D), torch.tensor([length, length - 7])
        torch.testing.assert_close(ours(x, lengths), plain(x, lengths), rtol=1e-5, atol=5e-6)
    assert counter.frame_count <= 2
    (site,) = cd.sites(ours)
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
    x = torch.randn(B, N, H * D, requires_grad=True)
    hidden = [torch.arange(N) >= LENGTHS[:, None]] if padded else []
    torch._dynamo.reset()
    found: list[GraphModule] = []
    ours = Encoder()
    plain = copy.deepcopy(ours)
    graphs.wrap(ours, None, None, graphs_of(found))
    torch.testing.assert_close(ours(x, *hidden), plain(x, *hidden), rtol=1e-5, atol=1e-5)
    (site,) = cd.sites(ours)
    joined = " & padding()" if padded else ""
    assert site.to_json()["program"] == f"Program((Branch(causal(){joined}),))"
    assert pairs_made(found) == []
