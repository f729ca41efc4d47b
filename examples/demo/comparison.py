"""The demo's checks: errors against the reference, time against SDPA and FlexAttention."""

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

# A call this long is timed while its memory is measured, which would slow down a shorter one.
_LONG_SECONDS = 2.0


@dataclass(frozen=True)
class Check:
    """Largest errors against the reference, and their bounds."""

    tokens: int
    error: float
    most_error: float
    gradient_error: float
    most_gradient_error: float

    @property
    def ok(self) -> bool:
        return self.error <= self.most_error and self.gradient_error <= self.most_gradient_error


def check(program: Program, q: Tensor, k: Tensor, v: Tensor) -> Check:
    """Compare output and gradients with the float64 reference.

    The bound of an error is twice that of dense SDPA in the same precision over the same pairs,
    plus one rounding of the result.

    q, k, v: (B, H, N, D).
    """
    tensors = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    grad_out = torch.randn(q.shape, generator=torch.Generator().manual_seed(0))
    # The logarithm of a multiplicity of 0 hides a pair; of 2 it doubles its weight.
    bias = multiplicity(program, q, k).to(q.dtype).log()

    def run(attention: Callable[..., object]) -> list[Tensor]:
        out = attention(*tensors)
        assert isinstance(out, Tensor)
        return [out.detach(), *torch.autograd.grad(out, tensors, grad_out.to(out.dtype))]

    truth = run(partial(reference, program))
    errors = _errors(run(compile(program)), truth)
    dense_errors = _errors(run(partial(scaled_dot_product_attention, attn_mask=bias)), truth)
    rounding = torch.finfo(q.dtype).eps
    bounds = []
    for error, value in zip(dense_errors, truth, strict=True):
        bounds.append(2 * error + rounding * float(value.abs().max()))
    # Gradients of q, k and v differ in size: the one nearest to its bound is reported.
    worst = max((1, 2, 3), key=lambda index: errors[index] / bounds[index])
    return Check(q.shape[2], errors[0], bounds[0], errors[worst], bounds[worst])


def _errors(values: list[Tensor], truth: list[Tensor]) -> list[float]:
    """The largest error of each tensor."""
    pairs = zip(values, truth, strict=True)
    return [float((value.double() - expected).abs().max()) for value, expected in pairs]


@dataclass(frozen=True)
class Cell:
    """The figures of one system at one length.

    seconds: time of a call.
    useful_gflops: the program's floating point operations, in 10**9 a second.
    memory_bytes: peak memory beyond q, k and v.
    ready_seconds: time to prepare the first call.
    note: the reason, if it was left out.
    """

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
    """Measure one forward call in float32 of three systems at each length.

    The systems: this library, causal dense SDPA, compiled FlexAttention over the union of branches.

    seconds: time for all; a system is left out if, by its time at the length before, it would take
        longer than what is left.
    with_flex: whether FlexAttention takes part.
    """
    end, last = time.perf_counter() + seconds, dict[str, Cell]()
    for count in tokens:
        random = torch.Generator().manual_seed(0)
        q, k, v = torch.randn(3, 1, heads, count, head_dim, generator=random)
        useful_pairs = plan(program, q.shape).useful_pairs
        assert useful_pairs is not None  # no mask of the demo reads data
        flops = 4 * head_dim * useful_pairs
        makers: dict[str, Callable[[], Attention]] = {
            "compiled_dilated": partial(compile, program),
            "dense SDPA": partial(partial, scaled_dot_product_attention, is_causal=True),
            "FlexAttention": partial(flex, program, count, heads),
        }
        for system, make in makers.items():
            note = _left_out(system, last.get(system), count, end, with_flex)
            if note:
                yield Cell(count, system, note=f"left out: {note}")
                continue
            last[system] = _measured(system, make, q, k, v, flops, last.get(system))
            yield last[system]


def _left_out(system: str, before: Cell | None, tokens: int, end: float, with_flex: bool) -> str:
    """The reason why a system is not measured; empty if it is."""
    if system == "compiled_dilated":
        return ""
    if system == "FlexAttention" and not with_flex:
        return "it takes a while to compile"
    expected = _expected(before, tokens)
    if expected <= end - time.perf_counter():
        return ""
    if expected >= 1:
        return f"would take about {expected:.0f} s, judged by the length before"
    return "its time is over"


def flex(program: Program, tokens: int, heads: int) -> Attention:
    """Compiled FlexAttention with a compiled block mask.

    The mask is the union of the branches.

    A pair of two branches counts once: less work than the program defines.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    masks = [branch.mask.for_heads(heads).on("cpu") for branch in program.branches]

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        allowed: Tensor = masks[0].allows(b, h, q, kv)
        for mask in masks[1:]:
            allowed = allowed | mask.allows(b, h, q, kv)
        return allowed

    block_mask = torch.compile(create_block_mask, dynamic=False)(
        mask_mod, None, heads, tokens, tokens, device="cpu"
    )
    return partial(torch.compile(flex_attention, dynamic=False), block_mask=block_mask)


def _expected(before: Cell | None, tokens: int) -> float:
    """Estimate the seconds to measure a system at this length.

    before: its figures at the length before. Time of a call is taken to grow with the square of
        the length.
    """
    if before is None or before.seconds is None:
        return 0.0
    call = before.seconds * (tokens / before.tokens) ** 2
    # One call for the memory, one to prepare the system, and one for the time if it is short.
    calls = 1
    if not _is_ready(before):
        calls += 1
    if call <= _LONG_SECONDS:
        calls += 1
    return calls * call + before.ready_seconds


def _is_ready(before: Cell | None) -> bool:
    """Whether a system had nothing to prepare at the length before."""
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
    """Measure a system at one length.

    make: prepares the system.
    flops: the program's floating point operations.
    before: its figures at the length before.
    """
    with torch.no_grad():
        # The first call plans and compiles.
        started = time.perf_counter()
        attention = make()
        call = partial(attention, q, k, v)
        if not _is_ready(before):
            call()
        ready = time.perf_counter() - started
        # The second is measured for its memory and, if it is long, for its time too.
        started = time.perf_counter()
        peak = measure.peak_bytes(call)
        elapsed = time.perf_counter() - started
        if elapsed <= _LONG_SECONDS:
            times = measure.interleaved({system: call}, repeats=3, warmup=0, seconds=1.0)
            elapsed = measure.median(times[system])
    # What the first call took beyond a call.
    ready = max(0.0, ready - elapsed)
    if _is_ready(before):
        ready = 0.0
    return Cell(q.shape[2], system, elapsed, flops / elapsed / 1e9, peak, ready)
