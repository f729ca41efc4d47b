"""Native CPU kernel: all branches of a program in one call.

It takes any mask and determines its tiles itself.

    propose -> encode: a program as numbers -> native.library: operators, compiled once per machine
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..calls import Call
from ..masks import Mask
from ..masks.bounds import upper_bound
from ..masks.contents import slot_name
from ..masks.neighborhoods import Neighborhood
from ..native import build, library
from ..native.encode import encode, mask_slots
from ..native.nodes import has_operation
from ..native.tape import Untranslatable
from ..partials import Saved, is_by_token
from ..plans import Cost, Problem, Proposal, Refusal, Scores
from ..programs import PerLength, Program, masks_of
from . import hidden

MOST_POSITIONS = 2**30
# The codes of dtypes in src/problem.h.
_TYPES = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 3}
_WIDEST = 256
# Queries of a thread's tile, and keys of a block that it reads at once.
_TILE_QUERIES, _BLOCK_KEYS = 64, 128
# Of a thread's copies of keys, or of values, in float32: capacity_bytes in src/tile.h.
_COPIES_BYTES = 512 * 2**10
# As short_ranges in src/forward.h.
_FEW_KEYS = 8192
# As range_keys in src/decoding.h.
_RANGE_KEYS = 1024
# As heads_at_once in src/backward.h.
_MOST_SUMS_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Work:
    """A program as the kernel reads it.

    code: the encoded program.
    names: data tensors, in the kernel's order.
    slots: operands that masks read, in the kernel's order; those of the score_mod follow.
    """

    code: tuple[int, ...]
    names: tuple[str, ...]
    slots: tuple[int, ...]

    def inputs(self, call: Call) -> tuple[list[Tensor], list[Tensor]]:
        """Data and operands of a call."""
        operands = [call.data[slot_name(slot)] for slot in self.slots]
        if call.score_mod is not None:
            operands += call.score_mod.operands
        return [call.data[name] for name in self.names], operands

    def of_operator(
        self,
        data: Sequence[Tensor] | None,
        operands: Sequence[Tensor] | None,
        score_slots: Sequence[int],
    ) -> tuple[Any, Any]:
        """Data and operands among an operator's arguments, in the kernel's order."""
        slots = (*self.slots, *score_slots)
        # An operator takes None in place of an empty list of tensors.
        own_data: Sequence[Tensor] | None = None
        if data:
            own_data = data[: len(self.names)] or None
        own_operands: list[Tensor] | None = None
        if operands and slots:
            own_operands = [operands[slot] for slot in slots]
        return own_data, own_operands


def propose(problem: Problem) -> Proposal | Refusal:
    """The whole program in one kernel."""
    reason = _unfit(problem) or build.available()
    if reason is not None:
        return Refusal("native", None, reason, "Use lowering='auto', 'tiled' or 'dense'")
    try:
        work = _work(problem.program, problem.heads, problem.scores)
    except Untranslatable as error:
        return Refusal("native", None, str(error), "Use lowering='auto' or 'tiled'")
    workspace = _workspace(problem)
    return Proposal("native", None, lambda: _cost(work, problem), (work,), workspace)


def work_of_graph(
    program: Program | PerLength,
    lowering: str,
    scores: Scores | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
) -> Work | None:
    """Work for tensors of any length; None if plans depend on it."""
    if isinstance(program, PerLength) or lowering not in ("auto", "native"):
        return None
    # Heads, widths and shapes of operands are constants of the encoded program.
    sizes = [*q.shape[1::2], *v.shape[1::2]]
    if scores is not None:
        for _, shape in scores.operands:
            sizes += shape
    if not all(isinstance(size, int) for size in sizes):
        return None
    # The work does not depend on lengths: they are 1 here, and checked when the graph runs.
    dtype = str(q.dtype).removeprefix("torch.")
    problem = Problem(
        program, 1, q.shape[1], k.shape[1], 1, 1, q.shape[3], v.shape[3], dtype, q.device.type,
        scores=scores,
    )  # fmt: skip
    proposal = propose(problem)
    if isinstance(proposal, Refusal):
        return None
    work: Work = proposal.work[0]
    return work


def _unfit(problem: Problem) -> str | None:
    """Why the kernel does not compute a problem; None if it does."""
    if problem.device != "cpu":
        return f"it runs on a CPU, and these tensors are on {problem.device}"
    if problem.dtype not in _TYPES:
        return f"it takes {', '.join(_TYPES)}; got {problem.dtype}"
    if max(problem.head_dim, problem.value_dim) > _WIDEST:
        return f"it takes head dims up to {_WIDEST}; got {problem.head_dim} and {problem.value_dim}"
    if max(problem.kv_len, problem.q_offset + problem.q_len) > MOST_POSITIONS:
        return "it takes positions up to 2**30"
    if problem.q_offset < 0 and any(
        _has_places(part) for mask in masks_of(problem.program) for part in mask.walk()
    ):
        return "a ring's queries before its keys have no place in lists, grids and functions"
    if problem.partial and problem.scores is not None:
        return (
            "a score_mod counts positions along the whole sequence, "
            "and a ring's block along its own"
        )
    return None


def _has_places(mask: Mask) -> bool:
    """Whether a mask depends on absolute positions, as lists and grids do.

    Functions are traced for positions from 0 on.
    """
    return mask.period is None or isinstance(mask, Neighborhood) or not has_operation(mask)


@lru_cache(maxsize=256)
def _work(program: Program, heads: int, scores: Scores | None) -> Work:
    slots = mask_slots(program)
    return Work(encode(program, heads, scores), program.names, tuple(slots))


def _cost(work: Work, problem: Problem) -> Cost:
    """Cost from the kernel's own tile counts.

    Masks of data are counted by an upper bound.
    """
    width = 2 * (problem.head_dim + problem.value_dim)
    if work.names or work.slots:
        bound = problem.program.map(upper_bound)
        work = Work(encode(bound, problem.heads, None), (), ())
    pairs = counts(work, problem)[0]
    forward, backward = _workspace(problem)
    return Cost(pairs, pairs * width, 0, 1, forward, float(pairs * width), backward)


def _workspace(problem: Problem) -> tuple[int, int]:
    """Workspace bytes of all threads, in a forward and in a backward."""
    # Low precision is computed in float32.
    itemsize = max(4, problem.itemsize)
    tile = (_TILE_QUERIES + _BLOCK_KEYS) * (problem.head_dim + problem.value_dim) * itemsize
    # Rows are copied where they are converted, and where tiles that see many keys share them.
    has_copies = problem.itemsize == 2 or problem.kv_len > _FEW_KEYS
    copies = 2 * _COPIES_BYTES if has_copies else 0
    threads = torch.get_num_threads()
    forward, backward = threads * (3 * tile + copies), threads * (6 * tile + copies)
    if problem.q_len == 1:
        # Each range of keys has a row of sums for each head.
        ranges = -(-problem.kv_len // _RANGE_KEYS)
        forward += problem.batch * problem.heads * ranges * (problem.value_dim + 4) * itemsize
    return forward, backward + _sums_bytes(problem)


def _sums_bytes(problem: Problem) -> int:
    """Bytes of float32 sums of low-precision gradients.

    For as many key heads as fit `_MOST_SUMS_BYTES`, and at least one.
    """
    if problem.itemsize > 2:
        return 0
    head_bytes = problem.kv_len * (problem.head_dim + problem.value_dim) * 4
    fitting = max(_MOST_SUMS_BYTES // max(head_bytes, 1), 1)
    return min(problem.batch * problem.kv_heads, fitting) * head_bytes


def counts(work: Work, problem: Problem, data: Sequence[Tensor] = ()) -> tuple[int, ...]:
    """Pairs computed, pairs evaluated, blocks and tiles of a call.

    data: data tensors, in the order of `names`.
    """
    sizes = [
        problem.batch, problem.heads, problem.kv_heads, problem.q_len, problem.kv_len,
        problem.head_dim, problem.value_dim, _TYPES[problem.dtype],
    ]  # fmt: skip
    # A cost may be computed while a graph is traced, and the counts must be real numbers.
    with _disable_current_modes():
        numbers = library.operators.native_counts(
            list(data) or None, None, work.code, sizes, problem.q_offset, None
        )
        return tuple(numbers.tolist())


class Native:
    """The kernel as a lowering; see `protocol.Lowering`."""

    name = "native"
    keeps_hidden_out = True
    is_fused = True
    decides = True

    def is_weighed(self, device: str) -> bool:
        """Whether the device is a CPU."""
        return device == "cpu"

    def propose(self, problem: Problem) -> list[Proposal | Refusal]:
        """The whole program in one kernel."""
        return [propose(problem)]

    def forward(
        self,
        chosen: Sequence[Proposal],
        problem: Problem,
        call: Call,
        q: Tensor,
        k: Tensor,
        v: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """out (B, Hq, N, Dv) and lse (B, Hq, N).

        out is in the dtype of q.
        """
        work: Work = chosen[0].work[0]
        data, operands = work.inputs(call)
        result: tuple[Tensor, Tensor] = library.operators.native.default(
            q,
            k,
            v,
            data,
            operands,
            work.code,
            call.scale,
            call.q_offset,
            call.offsets,
            is_by_token(q),
        )
        return result

    def merge_into(
        self,
        chosen: Sequence[Proposal],
        problem: Problem,
        call: Call,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
    ) -> None:
        """Merge the pairs of these tensors into out and lse, in place.

        out: (B, Hq, N, Dv). lse: (B, Hq, N).
        """
        work: Work = chosen[0].work[0]
        data, operands = work.inputs(call)
        library.operators.native_merge.default(
            out, lse, q, k, v, data, operands, work.code, call.scale, call.q_offset
        )

    def backward(
        self, chosen: Sequence[Proposal], problem: Problem, call: Call, saved: Saved
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v.

        Gradients of a score_mod's operands are added to its sums.
        """
        return hidden.backward(partial(_backward, chosen[0].work[0], problem), call, saved)


def _backward(
    work: Work, problem: Problem, call: Call, saved: Saved
) -> tuple[Tensor, Tensor, Tensor]:
    if call.score_mod is None and problem.scores is not None:
        # `hidden` finds the keys that rows see by a call without the score_mod.
        work = _work(problem.program, problem.heads, None)
    data, operands = work.inputs(call)
    mod = call.score_mod
    learned: list[int] = []
    if mod is not None:
        # Operands of the score_mod follow those of masks.
        learned = [len(work.slots) + number for number in mod.learned]
    grad_q, grad_k, grad_v, vector = library.operators.native_backward.default(
        saved.grad_out, saved.grad_lse, saved.q, saved.k, saved.v, saved.out, saved.lse,
        data, operands, work.code, call.scale, call.q_offset, call.offsets, learned,
    )  # fmt: skip
    if mod is not None and mod.sums:
        # The operator concatenates the gradients of learned operands into one vector.
        parts = vector.split([total.numel() for total in mod.sums])
        for total, part in zip(mod.sums, parts, strict=True):
            total.add_(part.view(total.shape))
    return grad_q, grad_k, grad_v


LOWERING = Native()
