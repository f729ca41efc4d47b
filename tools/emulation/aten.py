"""ATen's memory-efficient attention for CPU tensors.

Shapes and strides are as on CUDA, values are exact.

Registered as the CPU's implementation of the operators, which torch has for GPUs alone. Like
CUTLASS it gives rows that see nothing out 0 and lse +inf.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

_LIBRARY = torch.library.Library("aten", "IMPL")
_FORWARD = torch.ops.aten._scaled_dot_product_efficient_attention
_BACKWARD = torch.ops.aten._scaled_dot_product_efficient_attention_backward
_LOWEST = -torch.inf


def _like_cuda(operator: Any, tensors: tuple[Any, ...], *settings: Any, **options: Any) -> Any:
    """Results of the operator for fake tensors of the GPU.

    The operator checks the tensors and sets strides.
    """
    mode = FakeTensorMode()
    fakes = []
    for x in tensors:
        if isinstance(x, Tensor):
            with mode:
                device = "cuda:0" if x.dim() else "cpu"
                x = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
        fakes.append(x)
    with mode:
        return operator(*fakes, *settings, **options)


def _scores(q: Tensor, k: Tensor, bias: Tensor | None, causal: bool, scale: float) -> Tensor:
    """Scores in float64, -inf for hidden pairs."""
    scores = q.double() @ k.double().transpose(-1, -2) * scale
    if bias is not None:
        scores = scores + bias.double()
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(later, _LOWEST)
    return scores


def _rounded(x: Tensor, like: Tensor) -> Tensor:
    """x in the dtype and strides of a fake result."""
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype).copy_(x)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    compute_lse: bool,
    dropout: float = 0.0,
    causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tensors, options = (q, k, v, bias), (compute_lse, dropout, causal)
    out, lse, _, _ = _like_cuda(_FORWARD, tensors, *options, scale=scale)
    scores = _scores(q, k, bias, causal, q.shape[3] ** -0.5 if scale is None else scale)
    true = scores.logsumexp(dim=-1)
    dead = true == _LOWEST
    weights = (scores - true.masked_fill(dead, 0.0)[..., None]).exp()
    # The lse has room for rows past the last.
    padded = torch.full(lse.shape, torch.inf, dtype=lse.dtype)
    padded[..., : q.shape[2]] = true.masked_fill(dead, torch.inf)
    seed = torch.zeros((), dtype=torch.int64)
    return _rounded(weights @ v.double(), out), padded, seed, seed.clone()


def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    seed: Tensor,
    offset: Tensor,
    dropout: float,
    needed: list[bool],
    causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tensors = (grad_out, q, k, v, bias, out, lse, seed, offset)
    grads = _like_cuda(_BACKWARD, tensors, dropout, needed, causal, scale=scale)
    factor = q.shape[3] ** -0.5 if scale is None else scale
    scores = _scores(q, k, bias, causal, factor)
    # The weights again from the forward's lse; +inf makes those of rows that see nothing 0.
    weights = (scores - lse[..., : q.shape[2]].double()[..., None]).exp()
    pull = grad_out.double() @ v.double().transpose(-1, -2)
    delta = (grad_out.double() * out.double()).sum(dim=-1, keepdim=True)
    grad_scores = weights * (pull - delta) * factor
    results = (
        grad_scores @ k.double(),
        grad_scores.transpose(-1, -2) @ q.double(),
        weights.transpose(-1, -2) @ grad_out.double(),
    )
    grad_q, grad_k, grad_v = (_rounded(x, like) for x, like in zip(results, grads, strict=False))
    return grad_q, grad_k, grad_v, q.new_empty(0)


_LIBRARY.impl("_scaled_dot_product_efficient_attention", _forward, "CPU")
_LIBRARY.impl("_scaled_dot_product_efficient_attention_backward", _backward, "CPU")
