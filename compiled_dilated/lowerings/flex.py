"""FlexAttention under torch.compile, over narrow analytic block masks: one fused kernel for any program.

All branches at once: a pair is visible where any branch links it, and where c > 1 of them do its score gains log c. On a CPU
torch has neither a backward nor a log-sum-exp for it.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._C import (
    DispatchKey,
    _dispatch_tls_local_exclude_set,
    _dispatch_tls_local_include_set,
    _ForceDispatchKeyGuard,
)
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from .. import counting
from ..block_masks import BlockMaskPart, build, widen
from ..calls import Call
from ..masks import Mask, Or, full
from ..masks.core import Data, Positions
from ..orders import Order, identity
from ..partials import Saved, lse_dtype, merge
from ..plans import Cost, PlanCache, Problem, Proposal, Refusal
from ..programs import Branch, Program
from ..regions import PARTIAL, Regions, Verdicts
from ..tiles import TileMap, split
from .devices import constants
from .fused import Fused

_TILE = 128
# Head widths that torch's Triton kernels take: products of tl.dot, and what fits 227 KiB of shared memory.
_NARROWEST, _WIDEST, _WIDEST_FLOAT32 = 16, 256, 128
# Queries, times query heads of a key head, that torch's kernel for decoding can tile; it takes all queries below 128.
_MOST_DECODED_ROWS = 128
# Triton's kernels count the elements from the first key of a head to the last in 32 bits (pytorch#190857).
_MOST_OFFSET = 2**31 - 1
# Compiled kernels, one for each mask, length and part; the one used longest ago is given up first.
_KERNELS = PlanCache(most=256)


@dataclass(frozen=True, repr=False)
class Linked(Mask):
    """Pairs that any branch of a program links, for `heads` query heads."""

    program: Program
    heads: int

    def at_head(self, head: int, heads: int) -> Mask:
        assert heads == self.heads
        seen = [
            branch.mask_at(head, heads)
            for branch in self.program.branches
            if head in branch.head_range(heads)
        ]
        return (
            ~full() if not seen else seen[0] if len(seen) == 1 else Or(tuple(dict.fromkeys(seen)))
        )

    def for_heads(self, heads: int) -> Mask:
        assert heads == self.heads
        return self._map(lambda mask: mask.for_heads(heads))

    def on(self, device: Any) -> Mask:
        return self._map(lambda mask: mask.on(device))

    def _map(self, change: Callable[[Mask], Mask]) -> Mask:
        return replace(
            self,
            program=Program(
                tuple(replace(branch, mask=change(branch.mask)) for branch in self.program.branches)
            ),
        )

    def count(
        self, b: Positions, h: Positions, q: Positions, kv: Positions, data: Data | None = None
    ) -> Any:
        """How many branches link the pair."""
        return sum(
            self._branch(branch, b, h, q, kv, data).to(torch.int32)
            for branch in self.program.branches
        )

    def allows(
        self, b: Positions, h: Positions, q: Positions, kv: Positions, data: Data | None = None
    ) -> Any:
        out = self._branch(self.program.branches[0], b, h, q, kv, data)
        for branch in self.program.branches[1:]:
            out = out | self._branch(branch, b, h, q, kv, data)
        return out

    def _branch(
        self,
        branch: Branch,
        b: Positions,
        h: Positions,
        q: Positions,
        kv: Positions,
        data: Data | None,
    ) -> Any:
        heads = branch.head_range(self.heads)
        seen = branch.mask.allows(b, h, q, kv, data)
        return seen if len(heads) == self.heads else seen & (h >= heads.start) & (h < heads.stop)

    def classify(self, q: Regions, kv: Regions) -> Verdicts:
        return np.full(len(q), PARTIAL)  # always right; tiles are made head by head

    @property
    def parts(self) -> tuple[Mask, ...]:
        return tuple(branch.mask for branch in self.program.branches)

    @property
    def period(self) -> int | None:
        return None


@dataclass(frozen=True, eq=False)
class Work:
    """The mask of all branches and the order to compute in; block masks are made when first needed on a device."""

    linked: Linked
    order: Order
    lasting: dict[torch.device, tuple[BlockMaskPart, ...]] = field(default_factory=dict, repr=False)

    def parts(
        self, problem: Problem, device: torch.device, data: Mapping[str, Tensor]
    ) -> tuple[BlockMaskPart, ...]:
        """Block masks for the call's data; kept where there is none."""
        if device in self.lasting:
            return self.lasting[device]
        parts = build(
            self.linked, problem.q_len, problem.kv_len, device, problem.heads, _TILE, self.order, problem.q_offset, data
        )  # fmt: skip
        if problem.device == "cpu":
            parts = tuple(replace(part, block_mask=widen(part.block_mask)) for part in parts)
        if not self.linked.per_call:
            self.lasting[device] = parts
        return parts


def propose(problem: Problem) -> Proposal | Refusal:
    """The whole program as one kernel."""
    if problem.device == "cpu" and problem.training:
        return Refusal(
            "flex",
            None,
            "torch has no backward of FlexAttention on a CPU",
            "Use lowering='auto', 'strided' or 'tiled' to train",
        )
    if problem.partial:
        return Refusal(
            "flex",
            None,
            "its backward knows no lse but its own",
            "Use lowering='auto', 'strided' or 'tiled'",
        )
    if problem.dtype == "float64":
        return Refusal(
            "flex",
            None,
            "FlexAttention does not compute in float64",
            "Use another dtype or lowering",
        )
    reason = None if problem.device == "cpu" else _unfit_for_triton(problem)
    if reason is not None:
        return Refusal("flex", None, reason, "Use lowering='auto', 'strided' or 'tiled'")
    branches = problem.program.branches
    order = branches[0].order if len(branches) == 1 else identity()
    linked = Linked(problem.program, problem.heads)
    listed: dict[Mask, int] = {}
    pairs = 0
    for head in range(problem.heads):
        mask = linked.at_head(head, problem.heads)
        if mask not in listed:
            listed[mask] = _listed(mask, order, problem)
        pairs += listed[mask] * _TILE**2 * problem.batch
    if (
        problem.device == "cpu"
        and len(listed) == 1
        and len(split(_tile_map(next(iter(listed)), order, problem))) > 1
    ):
        return Refusal(
            "flex",
            None,
            "the mask takes several block masks, and torch gives no lse on a CPU to merge them by",
            "Use lowering='auto'",
        )
    flops = pairs * 2 * (problem.head_dim + problem.value_dim)
    copied = problem.tensor_bytes if order != identity() else 0
    of_device = constants(problem.device)
    rate = of_device.flex if problem.itemsize < 4 else of_device.flex_float32
    cost = Cost(
        pairs,
        flops,
        copied,
        1,
        copied,
        flops / rate + of_device.flops_per_call * (problem.device != "cpu"),
    )
    return Proposal("flex", None, cost, (Work(linked, order),))


def gives_lse(device: str) -> bool:
    """Whether FlexAttention returns a log-sum-exp on a device: not on a CPU."""
    return device != "cpu"


def _unfit_for_triton(problem: Problem) -> str | None:
    """Why torch's Triton kernels do not take these widths or lengths; None where they do."""
    widths = problem.head_dim, problem.value_dim
    if min(widths) < _NARROWEST:
        return f"FlexAttention takes heads of at least {_NARROWEST} numbers on a GPU; got {min(widths)}"
    most = _WIDEST if problem.itemsize < 4 else _WIDEST_FLOAT32
    if max(widths) > most:
        return f"a block of {problem.dtype} heads of {max(widths)} numbers exceeds shared memory; at most {most} fit"
    if max(problem.q_len, problem.kv_len) * max(widths) > _MOST_OFFSET:
        return "Triton's kernels address a head in 32 bits, and this one has more elements"
    return None


def _listed(mask: Mask, order: Order, problem: Problem) -> int:
    """Number of tiles that the block mask of some heads lists."""
    counts = counting.tiles(mask, problem.q_len, problem.kv_len, _TILE, order, problem.q_offset)
    return (
        len(_tile_map(mask, order, problem).indices)
        if counts is None
        else counts.full + counts.partial
    )


def _tile_map(mask: Mask, order: Order, problem: Problem) -> TileMap:
    return TileMap.build(
        mask,
        problem.q_len,
        problem.kv_len,
        q_tile=_TILE,
        kv_tile=_TILE,
        order=order,
        q_offset=problem.q_offset,
    )


def _flex(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    return flex_attention(q, k, v, **options)


def _kernel(problem: Problem, part: BlockMaskPart) -> Callable[..., Any]:
    """The compiled kernel of a part of a problem.

    Masks and lengths are constants of a graph, so each has a graph of its own, and Dynamo allows few graphs per code object.
    """
    # One entry or several: the batch varies within a graph. Whether log c is added depends on the program.
    key = replace(problem, batch=min(problem.batch, 2)), part.queries, part.keys
    return _KERNELS.get(key, _compiled)


def _compiled() -> Callable[..., Any]:
    """A compiled FlexAttention that shares no graphs with another: its code object is a copy."""
    alone = types.FunctionType(_flex.__code__.replace(), globals(), "flex")
    return torch.compile(alone, dynamic=True, fullgraph=True)


def forward(
    work: Work, problem: Problem, call: Call, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """out and lse; on a CPU the lse is NaN throughout, and whoever asks for it is refused before."""
    q, k, v = (work.order.permute(x) for x in (q, k, v))
    parts = work.parts(problem, q.device, call.data)
    score_mod = _score_mod(work, call, q.device)
    if not gives_lse(problem.device):
        assert len(parts) <= 1
        # FlexAttention refuses tensors that require a gradient on a CPU, even where none is recorded.
        q, k, v = (x.detach() for x in (q, k, v))
        out = (
            _part(problem, parts[0], q, k, v, score_mod, call.scale)
            if parts
            else q.new_zeros(*q.shape[:3], v.shape[3])
        )
        return work.order.invert(out), q.new_full(q.shape[:3], math.nan, dtype=lse_dtype(q.dtype))
    q, k, v = (_addressable(x) for x in (q, k, v))
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    lse = q.new_full(q.shape[:3], -math.inf, dtype=lse_dtype(q.dtype))
    for part in parts:
        part_out, aux = _part(problem, part, q, k, v, score_mod, call.scale)
        rest = [slice(None), slice(None), slice(part.queries.start, part.queries.stop)]
        joint_out, joint_lse = merge(out[*rest], lse[*rest], part_out, aux.lse)
        if len(part.queries) == q.shape[2]:
            out, lse = joint_out, joint_lse
        else:
            out = torch.slice_scatter(out, joint_out, 2, part.queries.start, part.queries.stop)
            lse = torch.slice_scatter(lse, joint_lse, 2, part.queries.start, part.queries.stop)
    return work.order.invert(out), work.order.invert(lse, dim=-1)


def _addressable(x: Tensor) -> Tensor:
    """x (B, H, N, D) with the tokens of a head near enough for offsets of 32 bits: itself, or a copy head by head."""
    return x.contiguous() if x.shape[2] * x.stride(2) > _MOST_OFFSET else x


@contextmanager
def _recording() -> Iterator[None]:
    """Autograd also where an operator has excluded it: enabling gradients alone records nothing there."""
    excluded = _dispatch_tls_local_exclude_set()
    for name, key in DispatchKey.__members__.items():
        if name.startswith("Autograd") or name == "ADInplaceOrView":
            excluded = excluded.remove(key)
    with _ForceDispatchKeyGuard(_dispatch_tls_local_include_set(), excluded), torch.enable_grad():
        yield


def backward(
    work: Work, problem: Problem, call: Call, saved: Saved
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by FlexAttention's own backward, after one more forward: an operator cannot keep the graph of the first."""
    with _recording():
        inputs = [x.detach().requires_grad_() for x in (saved.q, saved.k, saved.v)]
        call, learned = _learning(call)
        out, lse = forward(work, problem, call, *inputs)
        outputs, grads = [out], [saved.grad_out]
        if saved.grad_lse is not None:
            outputs.append(lse)
            grads.append(torch.where(lse == -math.inf, 0.0, saved.grad_lse))
        grad_q, grad_k, grad_v, *rest = torch.autograd.grad(outputs, [*inputs, *learned], grads)
    if call.score_mod is not None:
        for total, part in zip(call.score_mod.sums, rest, strict=True):
            total.add_(part)
    return grad_q, grad_k, grad_v


def _learning(call: Call) -> tuple[Call, list[Tensor]]:
    """The call with those operands of its score_mod as leaves that get gradients."""
    mod = call.score_mod
    if mod is None or not mod.learned:
        return call, []
    operands = list(mod.operands)
    for number in mod.learned:
        operands[number] = operands[number].detach().requires_grad_()
    return replace(call, score_mod=replace(mod, operands=tuple(operands))), [
        operands[number] for number in mod.learned
    ]


def _part(
    problem: Problem,
    part: BlockMaskPart,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score_mod: Any,
    scale: float,
) -> Any:
    """out of a part, or out and an AuxOutput that holds the lse where the device gives one."""
    rows, columns = (slice(span.start, span.stop) for span in (part.queries, part.keys))
    aux = AuxRequest(lse=True) if gives_lse(problem.device) else None
    # A mask's numbers are its structure: a kernel with them as variables is slower, and the CPU's does not compile.
    with torch._dynamo.config.patch(specialize_int=True):
        return _kernel(problem, part)(
            q[:, :, rows], k[:, :, columns], v[:, :, columns],
            score_mod=None if score_mod is None else score_mod(part),
            block_mask=part.block_mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1], return_aux=aux,
            kernel_options=_kernel_options(problem, part),
        )  # fmt: skip


def _kernel_options(problem: Problem, part: BlockMaskPart) -> Any:
    """Options of torch's kernels on a GPU; None for its own choice."""
    rows = len(part.queries) * (problem.heads // problem.kv_heads)
    if problem.device == "cpu" or rows <= _MOST_DECODED_ROWS:
        return None
    # Not the kernel for decoding, which has no tile for so many rows.
    options: dict[str, Any] = {"BACKEND": "TRITON"}
    if problem.itemsize == 4:
        # torch's blocks of float32 spill kilobytes, and ptxas takes minutes.
        narrow = max(problem.head_dim, problem.value_dim) <= 64
        options |= {"fwd_BLOCK_M": 32, "fwd_BLOCK_N": 32 if narrow else 16, "fwd_num_stages": 2}
    return options


def _score_mod(
    work: Work, call: Call, device: torch.device
) -> Callable[[BlockMaskPart], Any] | None:
    """The caller's score_mod, and log c where branches overlap, over the indices of a part."""
    own = call.score_mod
    counted = len(work.linked.program.branches) > 1
    if own is None and not counted:
        return None
    linked = work.linked.for_heads(work.linked.heads).on(
        device
    )  # a kernel can read tables, not make them
    assert isinstance(linked, Linked)
    data, q_offset = call.data, call.q_offset

    def of(part: BlockMaskPart) -> Any:
        q_first, kv_first = part.queries.start + q_offset, part.keys.start

        def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            q, kv = q + q_first, kv + kv_first
            if own is not None:
                score = own.graph.scalar(own.operands, score, b, h, q, kv, subscripts=True)
            if counted:
                score = score + linked.count(b, h, q, kv, data).to(score.dtype).log()
            return score

        return score_mod

    return of


LOWERING = Fused("flex", propose, forward, backward)
