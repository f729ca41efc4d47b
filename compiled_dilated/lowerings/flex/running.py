"""FlexAttention's kernels: compiled per mask and length, forward, and backward."""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._C import (
    DispatchKey,
    _dispatch_tls_local_exclude_set,
    _dispatch_tls_local_include_set,
    _ForceDispatchKeyGuard,
)
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from ...block_masks import BlockMaskPart
from ...calls import Call
from ...partials import Saved, lse_dtype, merge
from ...plans import PlanCache, Problem
from .linked import Linked, Work

# Rows (queries times query heads of a key head) that torch's kernel for decoding can tile; it takes
# all calls with fewer than 128 queries.
_MOST_DECODED_ROWS = 128
# Triton's kernels count the elements from the first key of a head to the last in 32 bits
# (pytorch#190857).
MOST_OFFSET = 2**31 - 1
# Compiled kernels, one per mask, length and part; the least recently used is dropped first.
_KERNELS = PlanCache(most=256)


def gives_lse(device: str) -> bool:
    """Whether FlexAttention returns a log-sum-exp on a device: not on a CPU."""
    return device != "cpu"


def _flex(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    return flex_attention(q, k, v, **options)


def _kernel(problem: Problem, part: BlockMaskPart) -> Callable[..., Any]:
    """The compiled kernel of a part of a problem.

    Masks and lengths are constants of a graph, so every mask and length has its own graph, and
    Dynamo allows few graphs per code object.
    """
    # Batches of more than one entry share a graph. Whether log c is added depends on the program.
    key = replace(problem, batch=min(problem.batch, 2)), part.queries, part.keys
    return _KERNELS.get(key, _compiled)


def _compiled() -> Callable[..., Any]:
    """Compile a FlexAttention with graphs of its own.

    Dynamo counts graphs per code object, so the code object is a copy.
    """
    kernel = types.FunctionType(_flex.__code__.replace(), globals(), "flex")
    return torch.compile(kernel, dynamic=True, fullgraph=True)


def forward(
    work: Work, problem: Problem, call: Call, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """out (B, Hq, N, Dv) and lse (B, Hq, N).

    On a CPU the lse is NaN throughout; calls that return it are refused before.
    """
    q, k, v = (work.order.permute(x) for x in (q, k, v))
    parts = work.parts(problem, q.device, call.data)
    score_mod = _score_mod(work, call, q.device)
    if not gives_lse(problem.device):
        assert len(parts) <= 1
        out = q.new_zeros(*q.shape[:3], v.shape[3])
        if parts:
            # FlexAttention refuses tensors that require a gradient on a CPU, even without a graph.
            q, k, v = (x.detach() for x in (q, k, v))
            out = _part(problem, parts[0], q, k, v, score_mod, call.scale)
        lse = q.new_full(q.shape[:3], math.nan, dtype=lse_dtype(q.dtype))
        return work.order.invert(out), lse
    out, lse = _merged(problem, parts, q, k, v, score_mod, call.scale)
    return work.order.invert(out), work.order.invert(lse, dim=-1)


def _merged(
    problem: Problem,
    parts: tuple[BlockMaskPart, ...],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score_mod: Any,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """out and lse of all parts, merged out of place.

    The backward records the merges.
    """
    q, k, v = (_addressable(x) for x in (q, k, v))
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    lse = q.new_full(q.shape[:3], -math.inf, dtype=lse_dtype(q.dtype))
    for part in parts:
        start, stop = part.queries.start, part.queries.stop
        part_out, aux = _part(problem, part, q, k, v, score_mod, scale)
        joint_out, joint_lse = merge(
            out[:, :, start:stop], lse[:, :, start:stop], part_out, aux.lse
        )
        if len(part.queries) == q.shape[2]:
            out, lse = joint_out, joint_lse
        else:
            out = torch.slice_scatter(out, joint_out, 2, start, stop)
            lse = torch.slice_scatter(lse, joint_lse, 2, start, stop)
    return out, lse


def _addressable(x: Tensor) -> Tensor:
    """x, copied if offsets within a head exceed 32 bits.

    x: (B, H, N, D).
    """
    if x.shape[2] * x.stride(2) > MOST_OFFSET:
        return x.contiguous()
    return x


def _part(
    problem: Problem,
    part: BlockMaskPart,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score_mod: Any,
    scale: float,
) -> Any:
    """Run the kernel of one part.

    Returns out on a CPU; out and an AuxOutput with the lse on other devices.
    """
    queries, keys = (slice(span.start, span.stop) for span in (part.queries, part.keys))
    aux = None
    if gives_lse(problem.device):
        aux = AuxRequest(lse=True)
    mod_of_part = None
    if score_mod is not None:
        mod_of_part = score_mod(part)
    # A mask's numbers are its structure: a kernel with them as variables is slower, and the CPU's
    # does not compile.
    with torch._dynamo.config.patch(specialize_int=True):
        return _kernel(problem, part)(
            q[:, :, queries], k[:, :, keys], v[:, :, keys],
            score_mod=mod_of_part, block_mask=part.block_mask, scale=scale,
            enable_gqa=q.shape[1] != k.shape[1], return_aux=aux,
            kernel_options=_kernel_options(problem, part),
        )  # fmt: skip


def _kernel_options(problem: Problem, part: BlockMaskPart) -> Any:
    """Options of torch's kernels on a GPU; None for its own choice."""
    rows = len(part.queries) * (problem.heads // problem.kv_heads)
    if problem.device == "cpu" or rows <= _MOST_DECODED_ROWS:
        return None
    # Avoid the kernel for decoding, which has no tile for so many rows.
    options: dict[str, Any] = {"BACKEND": "TRITON"}
    if problem.itemsize == 4:
        # torch's blocks of float32 spill kilobytes, and ptxas takes minutes.
        key_block = 16
        if max(problem.head_dim, problem.value_dim) <= 64:
            key_block = 32
        options |= {"fwd_BLOCK_M": 32, "fwd_BLOCK_N": key_block, "fwd_num_stages": 2}
    return options


def _score_mod(
    work: Work, call: Call, device: torch.device
) -> Callable[[BlockMaskPart], Any] | None:
    """Factory of a part's score_mod: the caller's, plus log c.

    log c is added if several branches may link a pair. None if there is neither.
    """
    users_mod = call.score_mod
    # `counted` must be the first captured name in alphabetical order: with a later name first, the
    # code that torch 2.13 generates for a CPU does not compile (tests/test_edges.py, several
    # branches).
    counted = len(work.linked.program.branches) > 1
    if users_mod is None and not counted:
        return None
    # Create the tables of masks here: a kernel can read them, not create them.
    linked = work.linked.for_heads(work.linked.heads).on(device)
    assert isinstance(linked, Linked)
    data, q_offset = call.data, call.q_offset

    def of_part(part: BlockMaskPart) -> Any:
        q_first, kv_first = part.queries.start + q_offset, part.keys.start

        def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            # FlexAttention counts positions within the part.
            q, kv = q + q_first, kv + kv_first
            if users_mod is not None:
                operands = users_mod.operands
                score = users_mod.graph.scalar(operands, score, b, h, q, kv, subscripts=True)
            if counted:
                score = score + linked.count(b, h, q, kv, data).to(score.dtype).log()
            return score

        return score_mod

    return of_part


@contextmanager
def _recording() -> Iterator[None]:
    """Record for autograd inside an operator too.

    An operator excludes autograd's dispatch keys: enabling gradients alone records nothing there.
    """
    excluded = _dispatch_tls_local_exclude_set()
    for name, key in DispatchKey.__members__.items():
        if name.startswith("Autograd") or name == "ADInplaceOrView":
            excluded = excluded.remove(key)
    with _ForceDispatchKeyGuard(_dispatch_tls_local_include_set(), excluded), torch.enable_grad():
        yield


def backward(
    work: Work, problem: Problem, call: Call, saved: Saved
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by FlexAttention's own backward, after a second forward.

    An operator cannot keep the graph of the first forward.
    """
    with _recording():
        inputs = [x.detach().requires_grad_() for x in (saved.q, saved.k, saved.v)]
        call, learned = _with_leaves(call)
        out, lse = forward(work, problem, call, *inputs)
        outputs, grads = [out], [saved.grad_out]
        if saved.grad_lse is not None:
            outputs.append(lse)
            # A row that sees no key has a constant lse.
            grads.append(torch.where(lse == -math.inf, 0.0, saved.grad_lse))
        gradients = torch.autograd.grad(outputs, [*inputs, *learned], grads)
    grad_q, grad_k, grad_v, *of_learned = gradients
    if call.score_mod is not None:
        for total, part in zip(call.score_mod.sums, of_learned, strict=True):
            total.add_(part)
    return grad_q, grad_k, grad_v


def _with_leaves(call: Call) -> tuple[Call, list[Tensor]]:
    """The call with learned operands as autograd leaves, and these leaves."""
    mod = call.score_mod
    if mod is None or not mod.learned:
        return call, []
    operands = list(mod.operands)
    for number in mod.learned:
        operands[number] = operands[number].detach().requires_grad_()
    leaves = [operands[number] for number in mod.learned]
    return replace(call, score_mod=replace(mod, operands=tuple(operands))), leaves
