"""FlexAttention's kernels run block masks.

They run eagerly, compiled, and in parts merged by their lse.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import (
    AuxRequest,
    flex_attention,
)

from compiled_dilated import masks, orders
from compiled_dilated.block_masks import block_mask, block_masks, widen
from compiled_dilated.masks import Mask
from compiled_dilated.orders import Order
from compiled_dilated.tiles import splitting
from tests.strategies import every_third
from tests.support.block_masks import IDENTITY, in_order, slices_of


def reference(
    mask: Mask, order: Order, q: Tensor, k: Tensor, v: Tensor, data: Any = None
) -> Tensor:
    """Dense attention of tensors in the order; rows without keys are 0."""
    indices = [torch.arange(size, device=q.device) for size in (*q.shape[:3], k.shape[2])]
    mask_mod = in_order(mask.for_heads(q.shape[1]), order, q.shape[2], 0, data, str(q.device))
    seen = mask_mod(*torch.meshgrid(*indices, indexing="ij"))
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~seen, -math.inf)
    return torch.softmax(scores, dim=-1).nan_to_num() @ v


def qkv(n: int, heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Random q, k and v of batch 2 and head_dim 16."""
    q, k, v = (torch.randn(2, heads, n, 16) for _ in range(3))
    return q, k, v


def kernel_case(mask: Mask, order: Order = IDENTITY, slow: bool = True, **data: Tensor) -> Any:
    """(mask, order, data); slow by default, since compiling takes seconds."""
    marks = [pytest.mark.slow] if slow else []
    return pytest.param(mask, order, data, marks=marks, id=repr(mask)[:50])


NUMBERS = torch.arange(600).reshape(2, 300)
KERNEL_CASES = [
    kernel_case(masks.documents(lengths=(100, 50, 120)) & masks.window(60)),
    kernel_case(
        masks.segments(96) & masks.congruent(3, "grouped", period=96) & masks.padding("pad"),
        orders.residue(3, period=96),
        slow=False,
        pad=NUMBERS % 5 == 0,
    ),
    kernel_case(masks.window(40) & masks.causal()),
    kernel_case(masks.tiles([(0, 0), (1, 1), (2, 0)], block=100)),
    kernel_case(masks.neighborhood((15, 20), 2, edges="shift"), orders.hilbert(15, 20)),
    kernel_case(masks.documents(ids="ids") & masks.window(100), ids=NUMBERS // 70),
    kernel_case(masks.from_mod(every_third, within=masks.window(60))),
]


@pytest.mark.parametrize(("mask", "order", "data"), KERNEL_CASES)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_eager_and_compiled(mask: Mask, order: Order, data: Any) -> None:
    torch.compiler.reset()
    q, k, v = qkv(300, heads=4)
    narrow = block_mask(mask, 300, 300, heads=4, tile=32, order=order, data=data)
    expected = reference(mask, order, q, k, v, data=data)
    torch.testing.assert_close(flex_attention(q, k, v, block_mask=narrow), expected)
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(q, k, v, block_mask=widen(narrow)), expected)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_parts_merge_by_lse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splitting, "_ALWAYS_FITS", 1)
    monkeypatch.setattr(splitting, "_MOST_PADDING", 1.5)
    mask, n = masks.window(20) | masks.global_tokens(3), 300
    q, k, v = qkv(n)
    out, total = torch.zeros_like(q), torch.zeros(*q.shape[:3], 1)
    for part in block_masks(mask, n, n, tile=8):
        rows, columns = slices_of(part)
        inputs = q[:, :, rows], k[:, :, columns], v[:, :, columns]
        partial, aux = flex_attention(
            *inputs, block_mask=part.block_mask, return_aux=AuxRequest(lse=True)
        )
        assert aux.lse is not None
        weight = aux.lse.exp().nan_to_num()[..., None]
        out[:, :, rows] += partial * weight
        total[:, :, rows] += weight
    torch.testing.assert_close(out / total, reference(mask, IDENTITY, q, k, v))


@pytest.mark.gpu
@pytest.mark.parametrize(("mask", "order", "data"), KERNEL_CASES)
def test_narrow_masks_on_a_gpu(mask: Mask, order: Order, data: Any) -> None:
    torch.compiler.reset()
    data = {name: tensor.cuda() for name, tensor in data.items()}
    q, k, v = (x.cuda().requires_grad_() for x in qkv(300, heads=4))
    narrow = block_mask(mask, 300, 300, device="cuda", heads=4, order=order, data=data)
    out = torch.compile(flex_attention, fullgraph=True)(q, k, v, block_mask=narrow)
    assert isinstance(out, Tensor)
    double = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = reference(mask, order, double[0], double[1], double[2], data)
    grads = torch.autograd.grad(out.sin().sum(), (q, k, v))
    expected_grads = torch.autograd.grad(expected.sin().sum(), double)
    for actual, value in zip((out, *grads), (expected, *expected_grads), strict=True):
        torch.testing.assert_close(actual, value.float(), atol=5e-3, rtol=5e-3)
