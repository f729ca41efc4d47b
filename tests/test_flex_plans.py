"""The flex lowering without a GPU: refusals, graphs, recorded backwards."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxOutput

import compiled_dilated as cd
from compiled_dilated import Program, execution, masks
from compiled_dilated.lowerings.flex import running
from compiled_dilated.lowerings.tiling import kernels
from compiled_dilated.plans import Problem, problem_of

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
        (torch.bfloat16, 320, "bfloat16 heads of 320 numbers exceeds .* at most 256 fit"),
        (torch.float32, 192, "float32 heads of 192 numbers exceeds .* at most 128 fit"),
        (torch.float64, 64, "FlexAttention does not compute in float64"),
    ],
)
def test_widths_and_dtypes_that_triton_cannot_take_are_refused(
    dtype: torch.dtype, width: int, reason: str
) -> None:
    shape = (1, 2, 512, width)
    with pytest.raises(ValueError, match=reason):
        cd.plan(masks.window(9), shape, dtype=dtype, device="cuda", lowering="flex")
    assert "flex" not in cd.plan(masks.window(9), shape, dtype=dtype, device="cuda").lowering


def test_lengths_past_offsets_of_32_bits_are_refused() -> None:
    shape, dtype = (1, 1, 2**25, 64), torch.bfloat16
    with pytest.raises(ValueError, match="address a head in 32 bits"):
        cd.plan(masks.window(9), shape, dtype=dtype, device="cuda", lowering="flex")


def test_tokens_beyond_offsets_of_32_bits_are_copied_together() -> None:
    far = torch.empty_strided((1, 1, 2, 4), (2**32, 2**32, 2**31, 1), device="meta")
    assert running._addressable(far).stride(2) == 4
    near = torch.zeros(1, 2, 8, 4)
    assert running._addressable(near) is near


@pytest.mark.parametrize(
    ("rows", "group", "avoided"),
    [(100, 2, True), (64, 2, False), (5, 4, False), (128, 1, False), (256, 1, True)],
)
def test_the_kernel_for_decoding_is_avoided_where_it_has_no_tile(
    rows: int, group: int, avoided: bool
) -> None:
    plan = cd.plan(
        masks.causal(),
        (1, 4, rows, 64),
        kv_heads=4 // group,
        kv_len=512,
        device="cuda",
        lowering="flex",
        q_offset=512 - rows,
    )
    (work,) = plan.chosen[0].work
    part = work.parts(plan.problem, torch.device("cpu"), {})[0]
    kernel_options = running._kernel_options(plan.problem, part)
    assert (kernel_options is not None and kernel_options["BACKEND"] == "TRITON") is avoided


@pytest.mark.slow
def test_more_masks_and_lengths_than_dynamos_limit() -> None:
    """On a CPU, with the same limit of graphs per code object."""
    limit = torch._dynamo.config.recompile_limit
    for number in range(limit + 2):
        mask = masks.window(5 + number)
        attend = cd.compile(mask, lowering="flex")
        q, k, v = (torch.randn(1, 2, 130 + number, 16) for _ in range(3))
        expected = cd.reference(mask, q, k, v)
        torch.testing.assert_close(attend(q, k, v).double(), expected, atol=1e-5, rtol=1e-5)


def test_compiled_kernels_are_bounded_and_shared_by_equal_problems(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compilations = []

    def counted() -> Any:
        compilations.append(1)
        return lambda *tensors, **options: tensors[2]

    monkeypatch.setattr(running, "_KERNELS", type(running._KERNELS)(most=4))
    monkeypatch.setattr(running, "_compiled", counted)
    for tokens in (128, 256, 128, 384, 256):
        x = torch.randn(1, 2, tokens, 16)
        cd.compile(masks.window(7), lowering="flex")(x, x, x)
    assert len(compilations) == 3
    for tokens in range(128, 137):
        x = torch.randn(1, 2, tokens, 16)
        cd.compile(masks.window(7), lowering="flex")(x, x, x)
    assert len(running._KERNELS) == 4


def dense(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, AuxOutput]:
    """FlexAttention on a GPU, by plain operations, for one block mask."""
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
    """Plans of a GPU for tensors of the CPU.

    A dense kernel takes the place of Triton's.
    """

    def problem_of_gpu(
        program: cd.Program, q: Any, k: Any, v: Any, dtype: Any, device: str, *more: Any
    ) -> Problem:
        return problem_of(program, q, k, v, dtype, "cuda", *more)

    monkeypatch.setattr(execution, "problem_of", problem_of_gpu)
    monkeypatch.setattr("compiled_dilated.attend.gives_lse", lambda device: True)
    monkeypatch.setattr(running, "_compiled", lambda: dense)
    monkeypatch.setattr(running, "_KERNELS", type(running._KERNELS)(most=8))


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize("door", ["eager", "operator", "compiled"])
def test_the_backward_records_inside_operators(door: str) -> None:
    """An operator excludes autograd, and enabling gradients alone records nothing."""
    q, k, v = (torch.randn(1, heads, 40, 16, requires_grad=True) for heads in (4, 2, 2))
    attend = cd.compile(cd.longnet((16, 32), (1, 2)), lowering="flex")
    if door == "operator":
        operator = torch.ops.compiled_dilated.attend
        rule = attend._skeleton.plain.rule
        out, lse = operator(q, k, v, None, None, rule, 0.25, 0, True, False)
    elif door == "compiled":
        compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
        out, lse = compiled(q, k, v, return_lse=True)
    else:
        out, lse = attend(q, k, v, return_lse=True)
    assert isinstance(attend.program, Program)
    exact, exact_lse = cd.reference(attend.program, q, k, v, return_lse=True)
    weights, lse_weights = torch.randn_like(out), torch.randn_like(lse)
    lse_weights = lse_weights * (exact_lse != -math.inf)
    grads = torch.autograd.grad((out, lse), (q, k, v), (weights, lse_weights))
    expected = torch.autograd.grad(
        (exact, exact_lse), (q, k, v), (weights.double(), lse_weights.double())
    )
    for grad, exact_grad in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad.double(), exact_grad.double(), atol=1e-5, rtol=1e-4)


def test_log_c_is_not_rounded_to_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """All inputs of ATen's kernel get the bias's precision.

    The bias is more precise than q.
    """
    dtypes: list[torch.dtype] = []

    def efficient(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, *more: Any, **options: Any) -> Any:
        dtypes.extend(x.dtype for x in (q, k, v, bias))
        return torch.zeros_like(q), torch.zeros(q.shape[:3]), None, None

    monkeypatch.setattr(kernels.aten, "_scaled_dot_product_efficient_attention", efficient)
    q, k, v = (torch.zeros(1, 2, 8, 16, dtype=torch.bfloat16) for _ in range(3))
    bias = torch.zeros(1, 1, 8, 8)
    out, _ = kernels.EfficientCUDA.forward(q, k, v, kernels.Tiles(1.0, bias=bias))
    assert dtypes == [torch.float32] * 4
    assert out.dtype == torch.bfloat16
