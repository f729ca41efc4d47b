"""Models for the tests of wrapping, compared with plain models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

from compiled_dilated.wrapping import graphs

HEADS, WIDTH, TOKENS = 4, 64, 50
X = torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))
SEEN = torch.rand(2, 1, TOKENS, TOKENS, generator=torch.Generator().manual_seed(2)) > 0.3
Q = torch.randn(2, 3, HEADS, 20, 16, generator=torch.Generator().manual_seed(4))


class Block(nn.Module):
    """scaled_dot_product_attention between two layers.

    The first makes q, k and v.
    """

    def __init__(self, kv_heads: int = HEADS, dropout: float = 0.0) -> None:
        super().__init__()
        self.kv_heads, self.dropout = kv_heads, dropout
        head = WIDTH // HEADS
        self.q, self.kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * kv_heads * head)
        self.out, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.norm(x)
        q = self.q(y).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        k, v = (
            z.unflatten(-1, (self.kv_heads, -1)).transpose(1, 2) for z in self.kv(y).chunk(2, -1)
        )
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=self.dropout,
            is_causal=mask is None,
            enable_gqa=self.kv_heads != HEADS,
        )
        return x + self.out(out.transpose(1, 2).flatten(2))


class Net(nn.Module):
    """Two blocks, without a mask causal; checkpointed or not."""

    def __init__(self, checkpointed: bool = False, **settings: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(**settings) for _ in range(2))
        self.checkpointed = checkpointed

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            if self.checkpointed:
                x = checkpoint(block, x, mask, use_reentrant=False)
            else:
                x = block(x, mask)
        return x


class Multihead(nn.Module):
    """nn.MultiheadAttention as models call it.

    weights: whether its weights are read.
    """

    def __init__(self, weights: bool = False) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.weights = weights

    def forward(self, x: Tensor) -> Tensor:
        out, weights = self.attention(x, x, x)
        return out + weights.sum() if self.weights else out


class Bare(nn.Module):
    """Nothing but scaled_dot_product_attention."""

    def forward(self, q: Tensor, mask: Tensor | None = None) -> Tensor:
        return F.scaled_dot_product_attention(q, q, q, attn_mask=mask)


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 96, 0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


# Attention of torch's own modules.
MODULES: dict[str, Callable[[], nn.Module]] = {"encoder": encoder, "multihead": Multihead}


def aot_eager(graph: Any, inputs: Any) -> Any:
    return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)


def recording(graphs_run: list[GraphModule]) -> Any:
    """A backend that appends the graphs of operators that it runs."""

    def record(graph: GraphModule, inputs: Any) -> Any:
        graphs_run.append(graph)
        return graph.forward

    return aot_autograd(fw_compiler=record, bw_compiler=record)


def tensors_of_pairs(graphs_run: list[GraphModule], q_len: int, kv_len: int) -> list[str]:
    """Nodes whose results have an entry per pair of query and key."""
    nodes = []
    for graph in graphs_run:
        for node in graph.graph.nodes:
            value = node.meta.get("val")
            if node.op != "call_function" or not isinstance(value, Tensor):
                continue
            if value.numel() >= q_len * kv_len and value.shape[-1] == kv_len:
                nodes.append(f"{node.name}: {tuple(value.shape)}")
    return nodes


def wrapped(
    model: nn.Module, attention: Any = None, backend: Any = aot_eager
) -> tuple[nn.Module, nn.Module]:
    """A model wrapped in place, and a copy from before."""
    torch._dynamo.reset()
    plain = copy.deepcopy(model)
    return graphs.wrap(model, attention, None, backend), plain


def assert_close(result: Tensor, expected: Tensor) -> None:
    """Equal up to float32 rounding."""
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=5e-6)


def assert_gradients(result: Tensor, expected: Tensor, learned: list[Tensor]) -> None:
    """Equal gradients of two results, weighted by normal numbers."""
    weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(1))
    computed = torch.autograd.grad((result * weights).sum(), learned)
    references = torch.autograd.grad((expected * weights).sum(), learned)
    for gradient, reference in zip(computed, references, strict=True):
        torch.testing.assert_close(gradient, reference.to(gradient.dtype), rtol=1e-4, atol=1e-5)


def gradients(model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """All gradients of the mean square of a result, as one vector."""
    model.zero_grad()
    model(*args, **kwargs).square().mean().backward()
    return torch.cat(
        [weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]
    )


def assert_same(model: nn.Module, plain: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Equal results and gradients of two models."""
    assert_close(model(*args, **kwargs), plain(*args, **kwargs))
    expected = gradients(plain, *args, **kwargs)
    assert (gradients(model, *args, **kwargs) - expected).norm() <= 1e-5 * expected.norm()
