"""The demo's evidence: attention against the float64 reference, and one call against dense SDPA and FlexAttention."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from compiled_dilated import Program, compile, measure, plan, reference
from compiled_dilated.reference import multiplicity

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

# A call this long is timed while its memory is watched, which a shorter one would feel.
_LONG_SECONDS = 2.0


@dataclass(frozen=True)
class Check:
    """Largest errors against the reference, and the most that they may be."""

    tokens: int
    error: float
    most_error: float
    gradient_error: float
    most_gradient_error: float

    @property
    def ok(self) -> bool:
        return self.error <= self.most_error and self.gradient_error <= self.most_gradient_error


def check(program: Program, q: Tensor, k: Tensor, v: Tensor) -> Check:
    """Output and gradients against the float64 reference.

    Each error may be twice that of dense SDPA in the same precision over the same pairs, plus one rounding of the result.
    """
    tensors = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    grad_out = torch.randn(q.shape, generator=torch.Generator().manual_seed(0))
    bias = multiplicity(program, q, k).to(q.dtype).log()

    def true(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = reference(program, q, k, v)
        assert isinstance(out, Tensor)
        return out

    def run(attention: Attention) -> list[Tensor]:
        out = attention(*tensors)
        return [out.detach(), *torch.autograd.grad(out, tensors, grad_out.to(out.dtype))]

    truth = run(true)
    ours = _errors(run(compile(program)), truth)
    dense = _errors(
        run(lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=bias)), truth
    )
    rounding = torch.finfo(q.dtype).eps
    most = [
        2 * error + rounding * float(value.abs().max())
        for error, value in zip(dense, truth, strict=True)
    ]
    # The gradients of q, k and v differ in size: the one that comes nearest to its bound speaks for all.
    worst = max((1, 2, 3), key=lambda each: ours[each] / most[each])
    return Check(q.shape[2], ours[0], most[0], ours[worst], most[worst])


def _errors(values: list[Tensor], truth: list[Tensor]) -> list[float]:
    return [
        float((value.double() - true).abs().max())
        for value, true in zip(values, truth, strict=True)
    ]


@dataclass(frozen=True)
class Cell:
    """One system at one length: what a call takes, memory beyond q, k and v, seconds to get ready; or why it was left out."""

    tokens: int
    system: str
    seconds: float | None = None
    useful_gflops: float | None = None
    memory_bytes: int | None = None
    ready_seconds: float = 0.0
    note: str = ""


def compare(
    program: Program,
    tokens: Iterable[int],
    heads: int,
    head_dim: int,
    seconds: float,
    with_flex: bool,
) -> Iterator[Cell]:
    """One forward call, float32: ours, causal dense SDPA, compiled FlexAttention over the union of the branches.

    A system is left out at a length where, judged by its time at the length before, it would take the time that is left.
    """
    ends, last = time.perf_counter() + seconds, dict[str, Cell]()
    for count in tokens:
        q, k, v = torch.randn(
            3, 1, heads, count, head_dim, generator=torch.Generator().manual_seed(0)
        )
        useful_pairs = plan(program, q.shape).useful_pairs
        assert useful_pairs is not None  # no mask of the demo reads data
        flops = 4 * head_dim * useful_pairs
        makers: dict[str, Callable[[], Attention]] = {
            "compiled_dilated": partial(compile, program),
            "dense SDPA": partial(partial, scaled_dot_product_attention, is_causal=True),
            "FlexAttention": partial(flex, program, count, heads),
        }
        for system, make in makers.items():
            left, expected = ends - time.perf_counter(), _expected(last.get(system), count)
            if system == "FlexAttention" and not with_flex:
                yield Cell(count, system, note="left out: it takes a while to compile")
            elif expected > left and system != "compiled_dilated":
                why = (
                    f"would take about {expected:.0f} s, judged by the length before"
                    if expected >= 1
                    else "its time is over"
                )
                yield Cell(count, system, note=f"left out: {why}")
            else:
                last[system] = _measured(system, make, q, k, v, flops, last.get(system))
                yield last[system]


def flex(program: Program, tokens: int, heads: int) -> Attention:
    """Compiled FlexAttention over the union of the branches, its block mask by `create_block_mask`, compiled too.

    A pair of two branches counts once: less work than the program defines.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    masks = [branch.mask.for_heads(heads).on("cpu") for branch in program.branches]

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        allowed = masks[0].allows(b, h, q, kv)
        for mask in masks[1:]:
            allowed = allowed | mask.allows(b, h, q, kv)
        return allowed

    block_mask = torch.compile(create_block_mask, dynamic=False)(
        mask_mod, None, heads, tokens, tokens, device="cpu"
    )
    return partial(torch.compile(flex_attention, dynamic=False), block_mask=block_mask)


def _expected(before: Cell | None, tokens: int) -> float:
    """Seconds until a system is measured at this length: calls that grow with its square, and what it takes to be ready."""
    if before is None or before.seconds is None:
        return 0.0
    call = before.seconds * (tokens / before.tokens) ** 2
    calls = (0 if _ready(before) else 1) + (1 if call > _LONG_SECONDS else 2)
    return calls * call + before.ready_seconds


def _ready(before: Cell | None) -> bool:
    """Whether a system, by what it took at the length before, has nothing to prepare."""
    return before is not None and before.ready_seconds < 0.001


def _measured(
    system: str,
    make: Callable[[], Attention],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    flops: float,
    before: Cell | None,
) -> Cell:
    """The first call plans and compiles, the next is watched for memory, up to three more are timed; of a long call, none."""
    with torch.no_grad():
        started = time.perf_counter()
        attention = make()
        call = partial(attention, q, k, v)
        if not _ready(before):
            call()
        ready = time.perf_counter() - started
        watched = time.perf_counter()
        peak = measure.peak_bytes(call)
        elapsed = time.perf_counter() - watched
        if elapsed <= _LONG_SECONDS:
            elapsed = measure.median(
                measure.interleaved({system: call}, repeats=3, warmup=0, seconds=1.0)[system]
            )
    ready = 0.0 if _ready(before) else max(0.0, ready - elapsed)
    return Cell(q.shape[2], system, elapsed, flops / elapsed / 1e9, peak, ready)
