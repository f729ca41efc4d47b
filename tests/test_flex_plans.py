"""FlexAttention as a lowering, as far as a machine without a GPU shows: what it refuses, its graphs, its backward's recording."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxOutput

import compiled_dilated as cd
from compiled_dilated import masks, operators
from compiled_dilated.lowerings import flex
from compiled_dilated.lowerings.tiling.kernels import EfficientCUDA, Tiles

PROGRAM = cd.longnet((64, 128), (1, 2), causal=True)


@pytest.mark.parametrize("lowering", ["dense", "strided", "tiled", "flex"])
def test_an_explicit_lowering_on_a_gpu_is_never_replaced(lowering: str) -> None:
    plan = cd.plan(
        PROGRAM,
        (1, 4, 512, 64),
        dtype=torch.bfloat16,
        device="cuda",
        training=True,
        lowering=lowering,
    )
    assert plan.lowering == lowering


def test_an_explicit_lowering_that_refuses_raises_on_a_gpu() -> None:
    with pytest.raises(ValueError, match="lowering 'strided' refuses for branch 0"):
        cd.plan(masks.causal() & masks.sinks(4), (1, 4, 512, 64), device="cuda", lowering="strided")


@pytest.mark.parametrize(
    ("dtype", "width", "reason"),
    [
        (torch.bfloat16, 8, "heads of at least 16 numbers on a GPU; got 8"),
        (
            torch.bfloat16,
            320,
            "bfloat16 heads of 320 numbers exceeds shared memory; at most 256 fit",
        ),
        (torch.float32, 192, "float32 heads of 192 numbers exceeds shared memory; at most 128 fit"),
    ],
)
def test_widths_that_triton_cannot_take_are_refused(
    dtype: torch.dtype, width: int, reason: str
) -> None:
    shape = (1, 2, 512, width)
    with pytest.raises(ValueError, match=reason):
        cd.plan(masks.window(9), shape, dtype=dtype, device="cuda", lowering="flex")
    assert "flex" not in cd.plan(masks.window(9), shape, dtype=dtype, device="cuda").lowering


def test_lengths_past_offsets_of_32_bits_are_refused() -> None:
    with pytest.raises(ValueError, match="address a head in 32 bits"):
        cd.plan(
            masks.window(9), (1, 1, 2**25, 64), dtype=torch.bfloat16, device="cuda", lowering="flex"
        )


def test_far_apart_tokens_are_copied_together() -> None:
    far = torch.empty_strided((1, 1, 2, 4), (2**32, 2**32, 2**31, 1), device="meta")
    assert flex._addressable(far).stride(2) == 4
    near = torch.zeros(1, 2, 8, 4)
    assert flex._addressable(near) is near


@pytest.mark.parametrize(
    ("rows", "group", "own"),
    [(100, 2, True), (64, 2, False), (5, 4, False), (128, 1, False), (256, 1, True)],
)
def test_the_kernel_for_decoding_is_avoided_where_it_has_no_tile(
    rows: int, group: int, own: bool
) -> None:
    plan = cd.plan(
        masks.causal(),
        (1, 4, rows, 64),
        4 // group,
        512,
        q_offset=512 - rows,
        device="cuda",
        lowering="flex",
    )
    part = next(iter(plan.chosen[0].work[0].parts(plan.problem, torch.device("cpu"), {})))
    options = flex._kernel_options(plan.problem, part)
    assert (options is not None and options["BACKEND"] == "TRITON") is own


@pytest.mark.slow
def test_more_masks_and_lengths_than_dynamos_limit() -> None:
    """On a CPU, where the same limit of graphs per code object holds."""
    limit = torch._dynamo.config.recompile_limit
    for number in range(limit + 2):
        attend = cd.compile(masks.window(5 + number), lowering="flex")
        q, k, v = (torch.randn(1, 2, 130 + number, 16) for _ in range(3))
        torch.testing.assert_close(
            attend(q, k, v).double(), cd.reference(attend.program, q, k, v), atol=1e-5, rtol=1e-5
        )


def test_compiled_kernels_are_bounded_and_shared_by_equal_problems(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    count = []

    def counted() -> Any:
        count.append(1)
        return lambda *tensors, **options: tensors[2]

    monkeypatch.setattr(flex, "_KERNELS", type(flex._KERNELS)(most=4))
    monkeypatch.setattr(flex, "_compiled", counted)
    for tokens in (128, 256, 128, 384, 256):
        x = torch.randn(1, 2, tokens, 16)
        cd.compile(masks.window(7), lowering="flex")(x, x, x)
    assert len(count) == 3
    for tokens in range(128, 137):
        x = torch.randn(1, 2, tokens, 16)
        cd.compile(masks.window(7), lowering="flex")(x, x, x)
    assert len(flex._KERNELS) == 4


def dense(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, AuxOutput]:
    """What FlexAttention computes on a GPU, by plain operations, one block mask at a time."""
    group = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(group, 1).transpose(-1, -2) * options["scale"]
    b, h, i, j = torch.meshgrid(*(torch.arange(n) for n in scores.shape), indexing="ij")
    if options["score_mod"] is not None:
        scores = options["score_mod"](scores, b, h, i, j)
    scores = scores.masked_fill(~options["block_mask"].mask_mod(b, h, i, j), -math.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - torch.where(lse == -math.inf, 0.0, lse)[..., None]).exp()
    return weights @ v.repeat_interleave(group, 1), AuxOutput(lse=lse)


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans of a GPU for tensors of the CPU, and a dense kernel in place of Triton's."""
    of_device = operators.problem_of
    monkeypatch.setattr(
        operators,
        "problem_of",
        lambda program, q, k, v, dtype, device, *rest: of_device(
            program, q, k, v, dtype, "cuda", *rest
        ),
    )
    monkeypatch.setattr("compiled_dilated.attend.gives_lse", lambda device: True)
    monkeypatch.setattr(flex, "_compiled", lambda: dense)
    monkeypatch.setattr(flex, "_KERNELS", type(flex._KERNELS)(most=8))


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize("way", ["eager", "operator", "compiled"])
def test_the_backward_records_what_it_differentiates(way: str) -> None:
    """Inside a custom operator autograd is excluded, and enabling gradients alone records nothing."""
    q, k, v = (torch.randn(1, heads, 40, 16, requires_grad=True) for heads in (4, 2, 2))
    attend = cd.compile(cd.longnet((16, 32), (1, 2)), lowering="flex")
    call = (
        torch.compile(attend, fullgraph=True, backend="aot_eager") if way == "compiled" else attend
    )
    if way == "operator":
        rule = attend._skeleton.plain.rule
        out, lse = torch.ops.compiled_dilated.attend(
            q, k, v, None, None, rule, 0.25, 0, True, False
        )
    else:
        out, lse = call(q, k, v, return_lse=True)
    weight, lse_weight = torch.randn_like(out), torch.randn_like(lse)
    right, right_lse = cd.reference(attend.program, q, k, v, return_lse=True)
    seen = right_lse != -math.inf
    grads = torch.autograd.grad((out, lse), (q, k, v), (weight, lse_weight * seen))
    expected = torch.autograd.grad(
        (right, right_lse), (q, k, v), (weight.double(), (lse_weight * seen).double())
    )
    for grad, true in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad.double(), true.double(), atol=1e-5, rtol=1e-4)


def test_log_c_is_not_rounded_to_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where branches overlap, the bias is more precise than q, and what ATen's kernel gets has its precision."""
    handed: list[torch.dtype] = []

    def efficient(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, *rest: Any, **options: Any) -> Any:
        handed.extend(x.dtype for x in (q, k, v, bias))
        return torch.zeros_like(q), torch.zeros(q.shape[:3]), None, None

    monkeypatch.setattr(
        "compiled_dilated.lowerings.tiling.kernels.aten._scaled_dot_product_efficient_attention",
        efficient,
    )
    q, k, v = (torch.zeros(1, 2, 8, 16, dtype=torch.bfloat16) for _ in range(3))
    out, _ = EfficientCUDA.forward(q, k, v, Tiles(1.0, bias=torch.zeros(1, 1, 8, 8)))
    assert handed == [torch.float32] * 4
    assert out.dtype == torch.bfloat16
