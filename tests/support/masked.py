"""Models that make masks in their forward.

They are compared with themselves before wrapping.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

import compiled_dilated as cd
from compiled_dilated.wrapping import graphs
from tests.support.wrapped import assert_close, assert_gradients, recording, tensors_of_pairs

# Batch, heads, queries, keys and width: sizes that differ show which dimension a tensor has.
B, H, N, M, D = 2, 3, 37, 53, 8
LENGTHS = torch.tensor([N, 19])
SEEN = torch.arange(N) < LENGTHS[:, None]


class Masked(nn.Module):
    """scaled_dot_product_attention with a mask that the forward makes.

    mask: called with the length, and with tensors of the call.
    """

    def __init__(self, mask: Callable[..., Tensor], checkpointed: bool = False) -> None:
        super().__init__()
        self.mask, self.checkpointed = mask, checkpointed

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *data: Tensor) -> Tensor:
        mask = self.mask(q.shape[-2], *data)
        attention = F.scaled_dot_product_attention
        if self.checkpointed:
            out: Tensor = checkpoint(attention, q, k, v, mask, use_reentrant=False)
            return out
        return attention(q, k, v, attn_mask=mask)


def operands(n: int = N, m: int = N) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(B, H, tokens, D, requires_grad=True) for tokens in (n, m, m)]


def check(
    model: nn.Module, *inputs: Tensor, attention: Any = None, expected: nn.Module | None = None
) -> tuple[Any, list[str]]:
    """The site's row, and the names of tensors of pairs.

    Results and gradients must be the same.

    expected: another model with these results, default the model before wrapping.
    """
    torch._dynamo.reset()
    graphs_run: list[GraphModule] = []
    plain = copy.deepcopy(model) if expected is None else expected
    wrapped = graphs.wrap(model, attention, None, recording(graphs_run))
    out, reference = wrapped(*inputs), plain(*inputs)
    assert_close(out, reference)
    assert_gradients(out, reference, [x for x in inputs if x.requires_grad])
    (site,) = cd.sites(wrapped)
    q, k = inputs[:2]
    return site.to_json(), tensors_of_pairs(graphs_run, q.shape[-2], k.shape[-2])


def at(n: int) -> tuple[Tensor, Tensor]:
    """Positions of queries (n, 1) and of keys (n,)."""
    return torch.arange(n)[:, None], torch.arange(n)


def before(n: int) -> Tensor:
    """Queries' distances to keys before them, (n, n); negative to keys behind."""
    q, kv = at(n)
    return q - kv


def negative(n: int, hidden: Tensor, least: float = -torch.inf) -> Tensor:
    """A mask of numbers: 0, and the least where hidden."""
    return torch.zeros(n, n).masked_fill(hidden, least)
