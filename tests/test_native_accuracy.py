"""Native kernels: gradcheck, and errors against those of torch's kernel."""

from __future__ import annotations

import math
import os
import shutil

import pytest
import torch
from torch import Tensor

import compiled_dilated as cd
from compiled_dilated import masks
from compiled_dilated.masks import Mask
from compiled_dilated.programs import Branch, Program, as_program
from compiled_dilated.reference import multiplicity
from tests.support.native import NAMES, Problem, normal, reference_results, work_of
from tests.support.turns import in_turn, one_in

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None and "CXX" not in os.environ, reason="needs a C++ compiler"
)


GRADCHECKED: dict[str, Program | Mask] = {
    "full": masks.full(),
    "causal": masks.causal(),
    "window": masks.window(3, 1),
    "window dilated": masks.window(6, dilation=2),
    "segments": masks.segments(5),
    "congruent": masks.congruent(2, 0) | masks.window(0),
    "sinks": masks.window(2, 0) | masks.sinks(2),
    "global positions": masks.window(1) | masks.global_tokens(positions=(3, 8)),
    "documents": masks.documents(lengths=(4, 5, 3)),
    "grid": masks.neighborhood((3, 4), 1),
    "grid shifted": masks.neighborhood((3, 4), 1, edges="shift"),
    "dilated blocks": masks.dilated_blocks(2, 3),
    "longnet": cd.longnet((4, 12), (1, 2)),
    "one mask twice": Program((Branch(masks.window(2)),) * 2),
    "hilbert": cd.hilbert_window((3, 4), 1),
    "from_mod": masks.from_mod(lambda b, h, q, kv: (q + kv) % 3 != 1),
}


@pytest.mark.parametrize("name", one_in(2, list(GRADCHECKED)))
def test_gradcheck(name: str) -> None:
    attend = cd.compile(GRADCHECKED[name], lowering="native")
    shapes = ((1, 2, 12, 2), (1, 1, 12, 2), (1, 1, 12, 1))
    inputs = [normal(*shape, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]

    def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = attend(q, k, v, return_lse=True)
        return out, lse

    assert torch.autograd.gradcheck(attention, inputs, fast_mode=False)


# Limits of the kernel's error over that of torch's attention, in every result. The largest of so
# many errors varies by a third from one draw of numbers to the next.
MARGINS = {"largest": 1.5, "rms": 1.1}
ACCURACY: dict[str, tuple[Mask, int, int]] = {
    "causal": (masks.causal(), 400, 64),
    "window": (masks.window(60), 700, 32),
    "segments": (masks.segments(100), 600, 128),
    "full": (masks.full(), 512, 64),
    "sinks": (masks.causal() & (masks.window(100) | masks.sinks(4)), 600, 80),
}


def torch_results(problem: Problem, allowed: Tensor) -> list[Tensor]:
    """The results of torch's fused attention with a dense mask."""
    q, k, v = (x.detach().clone().requires_grad_() for x in (problem.q, problem.k, problem.v))
    bias = torch.where(allowed, 0.0, -math.inf).to(q.dtype)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=bias, scale=problem.scale, enable_gqa=True
        )
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    lse = kernel(q.detach(), k.detach(), v.detach(), attn_mask=bias, scale=problem.scale)[1]
    return [out.detach(), lse, *torch.autograd.grad(out, (q, k, v), problem.grad_out)]


@pytest.mark.parametrize(
    ("name", "dtype"),
    in_turn(list(ACCURACY), (torch.float32, torch.bfloat16, torch.float16)),
)
def test_errors_are_no_larger_than_torchs(name: str, dtype: torch.dtype) -> None:
    mask, n, width = ACCURACY[name]
    q, k, v, grad_out = (
        normal(2, heads, n, width, dtype=dtype, seed=seed)
        for seed, heads in enumerate((4, 2, 2, 4))
    )
    problem = Problem(work_of(mask, 4), q, k, v, grad_out, None, scale=width**-0.5)
    allowed = multiplicity(as_program(mask), q[:1, :1], k[:1, :1]).bool()
    exact = reference_results(mask, problem)
    of_kernel, of_torch = problem.results(), torch_results(problem, allowed)
    worse = []
    for place, result in enumerate(NAMES):
        error = of_kernel[place].double() - exact[place]
        torch_error = of_torch[place].double() - exact[place]
        ratios = {
            "largest": (error.abs().max() / torch_error.abs().max()).item(),
            "rms": (error.norm() / torch_error.norm()).item(),
        }
        for kind, ratio in ratios.items():
            print(f"{name} {dtype} {result} {kind}: {ratio:.3f}")
            if ratio > MARGINS[kind]:
                worse.append(f"{result} {kind} {ratio:.3f}")
    assert not worse, worse
