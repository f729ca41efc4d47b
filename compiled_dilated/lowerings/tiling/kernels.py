"""Dense attention of many small problems, forward and backward.

Shapes: q (G, Hq, T, D), k (G, Hkv, S, D), v (G, Hkv, S, Dv), bias (G or 1, Hq or 1, T, S), added to
the scores, -inf where a key is hidden. The backward takes out and lse. With those of a complete
program it computes one part's exact share of the joint gradient (FlashAttention, arXiv 2205.14135):
p = exp(s - lse), ds = p * (grad_out . v - sum(grad_out * out) + grad_lse).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...mods import TileMod

aten = torch.ops.aten


@dataclass(frozen=True)
class Tiles:
    """Inputs of the kernels beside q, k and v."""

    scale: float
    bias: Tensor | None = None
    causal: bool = False
    score_mod: TileMod | None = None


def attention(q: Tensor, k: Tensor, v: Tensor, tiles: Tiles) -> tuple[Tensor, Tensor]:
    """out (G, Hq, T, Dv) and lse (G, Hq, T).

    out is in the dtype of q; lse is float64 for float64, else float32.
    """
    width = v.shape[-1]
    kernel = _kernel_of(q, tiles)
    q, tiles, _ = _positive(q, tiles)
    q, k, v = _padded(kernel, q, k, v)
    out, lse = kernel.forward(q, k, v, tiles)
    if tiles.bias is not None:
        # ATen's kernels give rows that see no key out 0 and lse 0; the right lse is -inf.
        visible = tiles.bias != -math.inf
        if tiles.causal:
            visible = visible.tril()
        lse = lse.masked_fill(~visible.any(dim=-1), -math.inf)
    if out.shape[-1] != width:
        out = out[..., :width]
    return out, lse


def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    tiles: Tiles,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v.

    Rows that see nothing have lse = +inf and out = 0, so that their weights are exactly 0.
    """
    head_dim, width = q.shape[-1], v.shape[-1]
    kernel = _kernel_of(q, tiles)
    if grad_lse is not None:
        # One more value column carries the lse's gradient: grad_out . v is unchanged, and
        # sum(grad_out * out) loses grad_lse.
        v = torch.nn.functional.pad(v, (0, 1))
        out = torch.cat([out, -grad_lse.unsqueeze(-1).to(out.dtype)], dim=-1)
        grad_out = torch.nn.functional.pad(grad_out, (0, 1), value=1.0)
    q, tiles, sign = _positive(q, tiles)
    q, k, v = _padded(kernel, q, k, v)
    out, grad_out = (_widen(x, v.shape[-1]) for x in (out, grad_out))
    grad_q, grad_k, grad_v = kernel.backward(grad_out, q, k, v, out, lse, tiles)
    if sign != 1.0:
        grad_q = grad_q * sign
    return grad_q[..., :head_dim], grad_k[..., :head_dim], grad_v[..., :width]


def _positive(q: Tensor, tiles: Tiles) -> tuple[Tensor, Tiles, float]:
    """q and tiles with equal scores and a positive scale.

    The third result is a factor for the gradient of q. ATen's kernels multiply hidden scores of
    -inf by the scale.
    """
    if tiles.scale > 0:
        return q, tiles, 1.0
    if tiles.scale == 0:
        return torch.zeros_like(q), replace(tiles, scale=1.0), 0.0
    return -q, replace(tiles, scale=-tiles.scale), -1.0


def backward_dtype(q: Tensor) -> torch.dtype:
    """Dtype of the tensors of a backward.

    float32 on a CPU: ATen's backward runs in low precision at a sixth of its float32 rate.
    """
    if q.device.type == "cpu" and q.element_size() < 4:
        return torch.float32
    return q.dtype


def _widen(x: Tensor, width: int) -> Tensor:
    if x.shape[-1] == width:
        return x
    return torch.nn.functional.pad(x, (0, width - x.shape[-1]))


def _padded(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, zero-padded to a width that the kernel takes.

    Fused kernels need equal widths of keys and values. Zeros add nothing to a product.
    """
    width = max(q.shape[-1], v.shape[-1])
    width = -(-width // kernel.width_multiple) * kernel.width_multiple
    if not kernel.one_width or q.shape[-1] == v.shape[-1] == width:
        return q, k, v
    return _widen(q, width), _widen(k, width), _widen(v, width)


class FlashCPU:
    """ATen's flash attention on the CPU.

    Takes any strides with a contiguous last dimension, grouped heads, and float16 to float64.
    """

    one_width, width_multiple = True, 1

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, tiles: Tiles) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = aten._scaled_dot_product_flash_attention_for_cpu.default(
            q, k, v, 0.0, tiles.causal, attn_mask=tiles.bias, scale=tiles.scale
        )
        return result

    @staticmethod
    def backward(
        grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tiles: Tiles
    ) -> tuple[Tensor, Tensor, Tensor]:
        grads: tuple[Tensor, Tensor, Tensor] = (
            aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad_out,
                q,
                k,
                v,
                out,
                lse,
                0.0,
                tiles.causal,
                attn_mask=tiles.bias,
                scale=tiles.scale,
            )
        )
        return grads


class EfficientCUDA:
    """ATen's memory-efficient attention on CUDA.

    Takes a bias and returns the lse; grouped heads are repeated. It reads a bias in the dtype of q,
    and log c does not survive bfloat16: with a more precise bias all tensors get its dtype.
    """

    one_width, width_multiple = True, 8

    @staticmethod
    def _as_precise(tiles: Tiles, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Tensors in the dtype of the bias where that is wider."""
        if tiles.bias is None or tiles.bias.element_size() <= tensors[0].element_size():
            return tensors
        return tuple(x.to(tiles.bias.dtype) for x in tensors)

    @staticmethod
    def _expanded(tiles: Tiles, q: Tensor, k: Tensor) -> Tensor | None:
        """The bias as (G, Hq, T, S), in the dtype of q."""
        if tiles.bias is None:
            return None
        # The kernel needs rows aligned to 16 bytes: pad the storage, not the view.
        keys = k.shape[2]
        padded = torch.nn.functional.pad(tiles.bias.to(q.dtype), (0, -keys % 8))[..., :keys]
        return padded.expand(q.shape[0], q.shape[1], q.shape[2], keys)

    @classmethod
    def forward(cls, q: Tensor, k: Tensor, v: Tensor, tiles: Tiles) -> tuple[Tensor, Tensor]:
        dtype, groups = q.dtype, q.shape[1] // k.shape[1]
        q, k, v = cls._as_precise(tiles, q, k, v)
        k, v = _repeated(k, groups), _repeated(v, groups)
        out, lse, _, _ = aten._scaled_dot_product_efficient_attention(
            q, k, v, cls._expanded(tiles, q, k), True, 0.0, tiles.causal, scale=tiles.scale
        )
        return out.to(dtype), lse[..., : q.shape[2]]

    @classmethod
    def backward(
        cls,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        tiles: Tiles,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype, groups = q.dtype, q.shape[1] // k.shape[1]
        grad_out, q, k, v, out = cls._as_precise(tiles, grad_out, q, k, v, out)
        wide_k, wide_v = _repeated(k, groups), _repeated(v, groups)
        lse = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=math.inf)
        seed = torch.zeros((), dtype=torch.int64, device="cpu")
        grad_q, grad_k, grad_v, _ = aten._scaled_dot_product_efficient_attention_backward(
            grad_out, q, wide_k, wide_v, cls._expanded(tiles, q, k), out, lse, seed, seed, 0.0,
            [True, True, True, False], tiles.causal, scale=tiles.scale,
        )  # fmt: skip
        return _gradients(grad_q, grad_k, grad_v, groups, dtype)


class Math:
    """Plain products and sums, for any device and dtype and for score_mods.

    All scores of the tiles are in memory at once.
    """

    one_width, width_multiple = False, 1

    @staticmethod
    def _scores(q: Tensor, k: Tensor, tiles: Tiles) -> Tensor:
        return q @ k.transpose(-1, -2) * tiles.scale

    @staticmethod
    def _hide(scores: Tensor, tiles: Tiles) -> Tensor:
        if tiles.bias is not None:
            # Not a plain sum: the score_mod of a hidden pair may be NaN or infinite.
            scores = torch.where(tiles.bias == -math.inf, -math.inf, scores + tiles.bias)
        if tiles.causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(later, -math.inf)
        return scores

    @classmethod
    def forward(cls, q: Tensor, k: Tensor, v: Tensor, tiles: Tiles) -> tuple[Tensor, Tensor]:
        dtype, groups = q.dtype, q.shape[1] // k.shape[1]
        q, k, v = _exact(q), _repeated(_exact(k), groups), _repeated(_exact(v), groups)
        scores = cls._scores(q, k, tiles)
        if tiles.score_mod is not None:
            scores = tiles.score_mod(scores)
        scores = cls._hide(scores, tiles)
        lse = scores.logsumexp(dim=-1)
        # Rows that see no key: exp(-inf - 0) is 0, exp(-inf - -inf) would be NaN.
        finite_lse = torch.where(lse == -math.inf, 0.0, lse)
        return ((scores - finite_lse.unsqueeze(-1)).exp() @ v).to(dtype), lse

    @classmethod
    def backward(
        cls,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        tiles: Tiles,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype, groups = q.dtype, q.shape[1] // k.shape[1]
        grad_out, out, q = _exact(grad_out), _exact(out), _exact(q)
        wide_k, wide_v = _repeated(_exact(k), groups), _repeated(_exact(v), groups)
        # 1. The weights again, from the scores and the lse.
        scores = cls._scores(q, wide_k, tiles)
        pull = None
        if tiles.score_mod is not None:
            scores, pull = tiles.score_mod.pull(scores)
        weights = (cls._hide(scores, tiles) - lse.unsqueeze(-1)).exp()
        # 2. Through the softmax to the scores.
        grad_v = weights.transpose(-1, -2) @ grad_out
        delta = (grad_out * out).sum(dim=-1, keepdim=True)
        grad_scores = weights * (grad_out @ wide_v.transpose(-1, -2) - delta)
        if pull is not None:
            # A score_mod may have an infinite derivative at hidden pairs.
            grad_scores = pull(grad_scores).masked_fill(weights == 0, 0.0)
        # 3. Through the products to q and k.
        grad_q = grad_scores @ wide_k * tiles.scale
        grad_k = grad_scores.transpose(-1, -2) @ q * tiles.scale
        return _gradients(grad_q, grad_k, grad_v, groups, dtype)


Kernel = type[FlashCPU] | type[EfficientCUDA] | type[Math]


def _kernel_of(q: Tensor, tiles: Tiles) -> Kernel:
    if tiles.score_mod is not None:
        return Math
    if q.device.type == "cpu":
        return FlashCPU
    if q.device.type == "cuda" and q.dtype != torch.float64:
        return EfficientCUDA
    return Math


def _exact(x: Tensor) -> Tensor:
    """x in float64 if it is, else in float32."""
    if x.dtype == torch.float64:
        return x
    return x.float()


def _repeated(x: Tensor, groups: int) -> Tensor:
    """Keys repeated for every query head, (G, Hkv * groups, S, D)."""
    if groups == 1:
        return x
    return x.repeat_interleave(groups, dim=1)


def _summed(grad: Tensor, groups: int) -> Tensor:
    """Gradients of repeated keys, summed per key head."""
    if groups == 1:
        return grad
    summed: Tensor = grad.unflatten(1, (-1, groups)).sum(dim=2)
    return summed


def _gradients(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, groups: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, summed per key head and rounded.

    grad_k, grad_v: of repeated keys and values.
    """
    return (
        grad_q.to(dtype),
        _summed(grad_k, groups).to(dtype),
        _summed(grad_v, groups).to(dtype),
    )
