"""One Triton kernel for all branches of a program whose keys come in runs with a stride; on a GPU.

Lists say which runs of keys a tile of queries sees. All of them go through one softmax, where a key of two branches counts twice:
no log c, no merge and no bias. A backward reads the same lists for queries, and transposed ones for keys: no atomics.

    lanes: masks as lanes -> lists: tiles and runs -> running: operators -> kernels: Triton
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...calls import Call
from ...partials import Saved, is_by_token
from ...plans import Cost, Problem, Proposal, Refusal
from ..devices import constants
from ..fused import Fused
from . import lists
from .lanes import Inexpressible, Lane, lanes_of
from .lists import Tiling

# A tile's rows are `step` apart: past this, programs of usual lengths have few rows to a tile.
_LONGEST_STEP = 128
_WIDEST = 256
_MOST_POSITIONS = 2**31 - 2
# Tiling that costs are estimated with.
_ROWS, _COLUMNS = 128, 64


@dataclass(frozen=True, eq=False)
class Work:
    """What each class of heads sees, and which class a head is in; lists are made when first needed on a device.

    kept: tensors by (tiling, transposed, device).
    """

    classes: tuple[tuple[Lane, ...], ...]
    class_of: tuple[int, ...]
    kept: dict[tuple[Tiling, bool, torch.device], tuple[Tensor, Tensor, Tensor]] = field(
        default_factory=dict, repr=False
    )

    def lists(
        self, problem: Problem, rows: int, columns: int, transposed: bool, device: torch.device
    ) -> tuple[Tensor, ...]:
        """Tiles, runs and classes of heads as tensors; over keys where transposed, else over queries."""
        key = Tiling(rows, columns, lists.step_of(self.classes)), transposed, device
        if key not in self.kept:
            queries, keys = _positions(problem)
            if transposed:
                classes = [[lane.transposed() for lane in lanes] for lanes in self.classes]
                built = lists.build(classes, keys, queries, key[0])
            else:
                built = lists.build(self.classes, queries, keys, key[0])
            class_of = np.array(self.class_of, dtype=np.int32)
            tensors = [torch.from_numpy(x).to(device) for x in (built.tiles, built.runs, class_of)]
            self.kept[key] = tensors[0], tensors[1], tensors[2]
        return self.kept[key]


def propose(problem: Problem) -> Proposal | Refusal:
    """The whole program as one kernel, or why it cannot be."""
    reason = _unfit(problem)
    if reason is None:
        try:
            work = _work(problem)
        except Inexpressible as error:
            reason = str(error)
    if reason is None and (step := lists.step_of(work.classes)) > _LONGEST_STEP:
        reason = f"queries see alike every {step} tokens, which is more than {_LONGEST_STEP}"
    if reason is not None:
        return Refusal("lanes", None, reason, "Use lowering='auto', 'flex' or 'tiled'")
    return Proposal("lanes", None, lambda: _cost(work, problem), (work,))


def _unfit(problem: Problem) -> str | None:
    """What of the problem beside its masks the kernel does not compute."""
    if problem.device != "cuda":
        return f"it is a Triton kernel for a GPU; the tensors are on {problem.device}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed here (pip install triton)"
    if problem.dtype == "float64":
        return "it computes in float32, not in float64"
    if problem.scores is not None:
        return "it knows no score_mod"
    if max(problem.head_dim, problem.value_dim) > _WIDEST:
        return f"heads of at most {_WIDEST} numbers fit; got {max(problem.head_dim, problem.value_dim)}"
    if max(problem.q_offset + problem.q_len, problem.kv_len) > _MOST_POSITIONS:
        return f"positions are counted in 32 bits; got {problem.q_offset + problem.q_len} and {problem.kv_len} tokens"
    return None


def _work(problem: Problem) -> Work:
    classes: dict[tuple[Any, ...], int] = {}
    class_of = []
    for head in range(problem.heads):
        branches = [
            branch
            for branch in problem.program.branches
            if head in branch.head_range(problem.heads)
        ]
        masks = tuple(branch.mask_at(head, problem.heads) for branch in branches)
        class_of.append(classes.setdefault(masks, len(classes)))
    lanes = tuple(tuple(lane for mask in masks for lane in lanes_of(mask)) for masks in classes)
    return Work(lanes, tuple(class_of))


def _positions(problem: Problem) -> tuple[range, range]:
    return range(problem.q_offset, problem.q_offset + problem.q_len), range(problem.kv_len)


def _cost(work: Work, problem: Problem) -> Cost:
    tiling = Tiling(_ROWS, _COLUMNS, lists.step_of(work.classes))
    counts = [lists.computed_pairs(lanes, *_positions(problem), tiling) for lanes in work.classes]
    full = sum(counts[number][0] for number in work.class_of) * problem.batch
    partial = sum(counts[number][1] for number in work.class_of) * problem.batch
    width = 2 * (problem.head_dim + problem.value_dim)
    of_device = constants(problem.device)
    kernel = width * (full / of_device.lanes_full + partial / of_device.lanes_partial)
    dense_flops = kernel + of_device.flops_per_call
    # A backward holds delta.
    delta = 4 * problem.batch * problem.heads * problem.q_len
    return Cost(full + partial, width * (full + partial), 0, 1, 0, dense_flops, delta)


def forward(
    work: Work, problem: Problem, call: Call, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """out (B, Hq, N, Dv) and lse (B, Hq, N)."""
    from . import running

    # Where a caller has added columns to values, those past the widest head are computed apart.
    if v.shape[3] > _WIDEST:
        out, lse = forward(work, problem, call, q, k, v[..., :_WIDEST])
        rest, _ = forward(work, problem, call, q, k, v[..., _WIDEST:])
        return torch.cat([out, rest], dim=-1), lse
    blocks = running.forward_blocks(
        max(running.padded(q.shape[3]), running.padded(v.shape[3])), q.element_size()
    )
    tables = work.lists(problem, blocks.rows, blocks.columns, False, q.device)
    result: tuple[Tensor, Tensor] = running.forward(
        q, k, v, *tables, call.scale, call.q_offset, is_by_token(q)
    )
    return result


def backward(
    work: Work, problem: Problem, call: Call, saved: Saved
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from the merged out and lse, which is +inf in rows that see nothing."""
    from . import running

    q, k, v, grad_out = saved.q, saved.k, saved.v, saved.grad_out
    delta = (saved.out.float() * grad_out.float()).sum(dim=-1)
    if saved.grad_lse is not None:
        delta -= saved.grad_lse
    blocks = running.backward_blocks(
        max(running.padded(q.shape[3]), running.padded(v.shape[3])), q.element_size()
    )
    saved_tensors = q, k, v, grad_out, saved.lse.contiguous(), delta.contiguous()
    numbers = call.scale, call.q_offset
    of_queries = work.lists(problem, blocks.rows, blocks.columns, False, q.device)
    of_keys = work.lists(problem, blocks.rows, blocks.columns, True, q.device)
    grad_q: Tensor = running.grad_queries(*saved_tensors, *of_queries, *numbers)
    grad_k, grad_v = running.grad_keys(*saved_tensors, *of_keys, *numbers)
    return grad_q, grad_k, grad_v


LOWERING = Fused("lanes", propose, forward, backward)
