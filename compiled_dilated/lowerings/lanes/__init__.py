"""One Triton kernel for all branches whose keys form strided runs.

Lists name the runs of keys that a tile of queries sees. All runs go through one softmax, where a
key of two branches counts twice: no log c, no merge and no bias. A backward reads the same lists
for queries, and transposed ones for keys: no atomics.

    lanes: masks as lanes -> lists: tiles and runs -> running: operators -> kernels: Triton

A graph contains the kernels themselves, and the lists as its constants. Of varying lengths, a
forward's lists are those of the longest, which the kernel cuts (`forward_up_to`).
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack
from torch.utils._python_dispatch import _disable_current_modes

from ...calls import Call
from ...masks import Mask
from ...partials import Saved, is_by_token, with_rows
from ...plans import Cost, Problem, Proposal, Refusal
from ..devices import constants
from ..fused import Fused
from . import lists
from .blocks import Blocks, backward_blocks, forward_blocks, widest
from .lanes import Inexpressible, Lane, lanes_of
from .lists import Tiling

# A tile's rows are `step` apart. With longer steps, usual lengths fill few rows of a tile.
_LONGEST_STEP = 128
_WIDEST = 256
_MOST_POSITIONS = 2**31 - 2
# Positions in lists of `forward_up_to`, which take seconds to build and megabytes of a graph.
MOST_LISTED = 2**24
# The tiling that costs are estimated with.
_ROWS, _COLUMNS = 128, 64


@dataclass(frozen=True, eq=False)
class Work:
    """Lanes per class of heads with equal masks, and their lists.

    classes: lanes by class.
    class_of: class of each head.
    tensors: cache of the lists as tensors, by tiling, side, reach and device.
    """

    classes: tuple[tuple[Lane, ...], ...]
    class_of: tuple[int, ...]
    tensors: dict[tuple[Tiling, bool, bool, torch.device], tuple[Tensor, Tensor, Tensor]] = field(
        default_factory=dict, repr=False
    )

    @cached_property
    def step(self) -> int:
        """Step of the rows of a tile."""
        return lists.step_of(self.classes)

    def lists(
        self, problem: Problem, blocks: Blocks, transposed: bool, device: torch.device,
        up_to: bool = False,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """Tiles, runs and classes of heads as tensors on a device.

        transposed: whether rows are keys; else they are queries.
        up_to: whether the lists are for all calls within the problem, whose queries are then at
            any positions before the last.
        """
        tiling = Tiling(blocks.rows, blocks.columns, self.step)
        key = tiling, transposed, up_to, device
        if key not in self.tensors:
            queries, keys = _positions(problem)
            if up_to:
                queries = tiling.reach(queries.stop)
            # Real tensors, also while a graph is traced.
            with _disable_current_modes():
                self.tensors[key] = self._created(queries, keys, tiling, transposed, device)
        if _len_torch_dispatch_stack():
            # A traced graph takes them as its constants.
            return tuple(torch.ops.aten.lift_fresh.default(x) for x in self.tensors[key])
        return self.tensors[key]

    def _created(
        self, queries: range, keys: range, tiling: Tiling, transposed: bool, device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor]:
        if transposed:
            classes = [_transposed(lanes) for lanes in self.classes]
            arrays = lists.build(classes, keys, queries, tiling)
        else:
            arrays = lists.build(self.classes, queries, keys, tiling)
        tiles = torch.from_numpy(arrays.tiles).to(device)
        runs = torch.from_numpy(arrays.runs).to(device)
        class_of = torch.from_numpy(np.array(self.class_of, dtype=np.int32)).to(device)
        return tiles, runs, class_of


def _transposed(lanes: tuple[Lane, ...]) -> tuple[Lane, ...]:
    """Lanes with queries as columns and keys as rows."""
    return tuple(lane.transposed() for lane in lanes)


def propose(problem: Problem) -> Proposal | Refusal:
    """The whole program as one kernel, or the reason to refuse it."""
    reason = _unfit(problem)
    if reason is None:
        try:
            work = _work(problem)
        except Inexpressible as error:
            reason = str(error)
    if reason is None and work.step > _LONGEST_STEP:
        reason = f"queries see alike every {work.step} tokens, which is more than {_LONGEST_STEP}"
    if reason is not None:
        return Refusal("lanes", None, reason, "Use lowering='auto', 'flex' or 'tiled'")
    return Proposal("lanes", None, lambda: _cost(work, problem), (work,))


def _unfit(problem: Problem) -> str | None:
    """Reason to refuse a problem whatever its masks, or None."""
    if problem.device != "cuda":
        return f"it is a Triton kernel for a GPU; the tensors are on {problem.device}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed here (pip install triton)"
    if problem.dtype == "float64":
        return "it computes in float32, not in float64"
    if problem.scores is not None:
        return "it computes no score_mod"
    width = max(problem.head_dim, problem.value_dim)
    if width > _WIDEST:
        return f"heads of at most {_WIDEST} numbers fit; got {width}"
    queries = problem.q_offset + problem.q_len
    if max(queries, problem.kv_len) > _MOST_POSITIONS:
        return f"positions are counted in 32 bits; got {queries} and {problem.kv_len} tokens"
    return None


def _work(problem: Problem) -> Work:
    """Lanes of all heads. Raises Inexpressible."""
    classes: dict[tuple[Mask, ...], int] = {}
    class_of = []
    for head in range(problem.heads):
        # Heads with equal masks form one class.
        masks = problem.program.masks_at(head, problem.heads)
        class_of.append(classes.setdefault(masks, len(classes)))
    lanes_by_class = []
    for masks in classes:
        lanes: list[Lane] = []
        for mask in masks:
            lanes += lanes_of(mask)
        lanes_by_class.append(tuple(lanes))
    return Work(tuple(lanes_by_class), tuple(class_of))


def _positions(problem: Problem) -> tuple[range, range]:
    return range(problem.q_offset, problem.q_offset + problem.q_len), range(problem.kv_len)


def _cost(work: Work, problem: Problem) -> Cost:
    tiling = Tiling(_ROWS, _COLUMNS, work.step)
    counts = [lists.computed_pairs(lanes, *_positions(problem), tiling) for lanes in work.classes]
    full = sum(counts[number][0] for number in work.class_of) * problem.batch
    partial = sum(counts[number][1] for number in work.class_of) * problem.batch
    width = 2 * (problem.head_dim + problem.value_dim)
    of_device = constants(problem.device)
    if problem.itemsize < 4:
        kernel = width * (full / of_device.lanes_full + partial / of_device.lanes_partial)
    else:
        kernel = width * (full + partial) / of_device.lanes_float32
    dense_flops = kernel + of_device.flops_per_call
    # A backward adds delta, a float32 number per query and head.
    delta = 4 * problem.batch * problem.heads * problem.q_len
    return Cost(full + partial, width * (full + partial), 0, 1, 0, dense_flops, delta)


def forward(
    work: Work, problem: Problem, call: Call, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """out (B, Hq, N, Dv) and lse (B, Hq, N)."""
    return _forward(work, problem, call, q, k, v, up_to=False)


def forward_up_to(
    work: Work, problem: Problem, call: Call, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """As `forward`, for any call within a problem.

    problem: the most queries, from position 0, and the most keys. Lengths and q_offset of the call
        may be symbolic.
    q, k, v: with any strides.
    """
    return _forward(work, problem, call, with_rows(q), with_rows(k), with_rows(v), up_to=True)


def _forward(
    work: Work, problem: Problem, call: Call, q: Tensor, k: Tensor, v: Tensor, up_to: bool
) -> tuple[Tensor, Tensor]:
    """Compute out and lse by the lists of the problem.

    up_to: whether the lists are for all calls within the problem.
    """
    from . import running

    blocks = forward_blocks(widest(q, v), q.element_size())
    tables = work.lists(problem, blocks, False, q.device, up_to=up_to)
    bad = running.has_bad(k, v)
    # By the step of its tiling, lists of all calls are cut to this one.
    step = work.step if up_to else 0
    result: tuple[Tensor, Tensor] = running.forward(
        q, k, v, *tables, bad, call.scale, call.q_offset, step, is_by_token(q)
    )
    return result


def backward(
    work: Work, problem: Problem, call: Call, saved: Saved
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from the merged out and lse.

    lse is +inf in rows that see nothing.
    """
    from . import running

    q, k, v, grad_out = saved.q, saved.k, saved.v, saved.grad_out
    # Subtracted from grad_out . v: the gradient of a row's normalization.
    delta = (saved.out.float() * grad_out.float()).sum(dim=-1)
    if saved.grad_lse is not None:
        delta = delta - saved.grad_lse
    inputs = q, k, v, grad_out, saved.lse.contiguous(), delta.contiguous()
    blocks = backward_blocks(widest(q, v), q.element_size())
    of_queries = work.lists(problem, blocks, False, q.device)
    of_keys = work.lists(problem, blocks, True, q.device)
    last = running.has_bad(q, k, v, delta), call.scale, call.q_offset
    grad_q: Tensor = running.grad_queries(*inputs, *of_queries, *last)
    grad_k, grad_v = running.grad_keys(*inputs, *of_keys, *last)
    return grad_q, grad_k, grad_v


LOWERING = Fused("lanes", propose, forward, backward, keeps_hidden_out=True)
