"""A call computed by its plan or its ring, forward and backward.

    rule as text -> rules.read_rule -> planner.plan_for -> lowerings.execute, or a ring

Modes of the caller have no effect inside.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C import (
    DispatchKey,
    _dispatch_tls_is_dispatch_key_excluded,
    _dispatch_tls_local_exclude_set,
    _dispatch_tls_local_include_set,
    _ForceDispatchKeyGuard,
    _is_any_autocast_enabled,
)

from . import planner
from .calls import Call
from .lowerings import execute
from .masks.contents import digest
from .mods import Mod, flat, without_autocast
from .partials import Saved, empty_out, is_by_token, lse_dtype, with_rows
from .plans import Plan, Problem, Scores, problem_of
from .programs import PerLength, Program
from .ring.rings import Ring
from .rules import Rule, read_rule


@dataclass(frozen=True)
class Options:
    """The arguments of a call other than tensors.

    rule: as text.
    scale: factor of q . k.
    q_offset: position of the first query.
    training: whether a backward may follow.
    wants_lse: whether the lse may have a gradient. The compiler passes zeros if nothing uses it,
        which would cost work.
    learned: numbers of the operands that have gradients.
    data: how many of the tensors after q, k and v are data; the others are operands.
    ring: the caller's own, whose ledger is updated; by default one is created from the text.
    """

    rule: str
    scale: float
    q_offset: Any
    training: bool
    wants_lse: bool
    learned: tuple[int, ...]
    data: int
    ring: Ring | None = None

    @property
    def plain(self) -> tuple[str, float, Any]:
        """The operator's arguments rule, scale and q_offset."""
        return self.rule, self.scale, self.q_offset

    def split(
        self, tensors: Sequence[Tensor]
    ) -> tuple[Sequence[Tensor] | None, Sequence[Tensor] | None]:
        """Data and operands; None for an empty list, which AOTInductor cannot express."""
        return tensors[: self.data] or None, tensors[self.data :] or None


# Plans --------------------------------------------------------------------------------------


def plan_of(
    rule: Rule,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offset: int,
    training: bool,
    score_mod: Mod | None = None,
) -> Plan:
    """The plan for tensors of these shapes, from the cache.

    training: whether a backward may follow.
    score_mod: of the call.
    """
    problem = problem_at(rule, q, k, v, q_offset, training, score_mod)
    if planner.takes_any_offset(q.shape[2], training, rule.lowering):
        # The cached plan was checked for the position of another call.
        problem.program.check(1, k.shape[2], q_offset)
    return planner.plan_for(problem, rule.lowering)


def problem_at(
    rule: Rule,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offset: int,
    training: bool,
    score_mod: Mod | None = None,
) -> Problem:
    """The problem of tensors of these shapes; arguments as of `plan_of`."""
    program, scores = _program_at(rule, q.shape[2]), Scores.of(score_mod)
    shapes = (q.shape, k.shape, v.shape)
    return problem_of(program, *shapes, q.dtype, q.device.type, q_offset, training, scores)


def _program_at(rule: Rule, tokens: int) -> Program:
    """The rule's program for this many tokens."""
    if isinstance(rule.program, PerLength):
        return rule.program.at(tokens)
    return rule.program


def ring_problem(
    rule: Rule, text: str, ring: Ring, q: Tensor, k: Tensor, v: Tensor, call: Call | None = None
) -> Problem:
    """The problem of all ranks together, the same forward and backward.

    text: the rule as text.
    q, k, v: the tensors of this process.
    call: options that the ranks must agree on too.

    Raises ValueError, on every rank, where the ranks disagree.
    """
    # 1. Everything that the ranks must agree on, by name.
    program = f"{rule.program!r} over {ring!r}: {text}"
    about = {"the program, the layout or a function": program}
    data = {} if call is None else call.data
    if ring.sharded and call is not None:
        about["the scale"] = str(call.scale)
        for name, x in data.items():
            about[f"data[{name!r}] (of the whole sequence)"] = digest(x)
        captured = () if call.score_mod is None else call.score_mod.operands
        about["what the score_mod captures"] = str([digest(x) for x in captured])
    # 2. The tokens of all ranks, which the data must cover.
    tokens = ring.transport.tokens(q, k, v, about)
    for name, x in data.items():
        if name in rule.names and x.shape[1] < tokens:
            raise ValueError(
                f"data[{name!r}] must hold all {tokens} tokens of the ring's sequence on every "
                f"rank; got shape {tuple(x.shape)}. "
                "Pass the data of the whole sequence, not that of a shard"
            )
    # 3. The shapes of the whole sequence: q, k and v of this process may be a shard.
    q_shape, k_shape, v_shape = [(*x.shape[:2], tokens, x.shape[3]) for x in (q, k, v)]
    device = q.device.type
    scores = None if call is None else Scores.of(call.score_mod)
    shapes = q_shape, k_shape, v_shape
    return problem_of(_program_at(rule, tokens), *shapes, q.dtype, device, 0, False, scores)


# Forward and backward -----------------------------------------------------------------------


def _is_empty(joint: Problem | None, *tensors: Tensor) -> bool:
    """Whether the problem of all ranks, or these tensors, are empty."""
    if joint is not None:
        return joint.empty
    return not all(x.numel() for x in tensors)


# Dispatch keys of torch.vmap. A dispatch mode of the caller excludes them, such as the one around
# the first run of a compiled graph.
_VMAP_KEYS = [DispatchKey.ADInplaceOrView, DispatchKey.PythonTLSSnapshot]
_VMAP_KEYS += [key for name, key in DispatchKey.__members__.items() if name.startswith("FuncTorch")]


@contextmanager
def _own_modes() -> Iterator[None]:
    """Disable the caller's autocast and dispatch modes, which would change the result."""
    below_a_mode = _dispatch_tls_is_dispatch_key_excluded(DispatchKey.FuncTorchBatched)
    with ExitStack() as stack:
        if _is_any_autocast_enabled():
            stack.enter_context(without_autocast())
        if below_a_mode:
            excluded = _dispatch_tls_local_exclude_set()
            for key in _VMAP_KEYS:
                excluded = excluded.remove(key)
            included = _dispatch_tls_local_include_set()
            stack.enter_context(_ForceDispatchKeyGuard(included, excluded))
        yield


@_own_modes()
def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    data: Sequence[Tensor] | None,
    operands: Sequence[Tensor] | None,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """out and lse by the plan of this process or its ring.

    The operator's dispatch is left out.

    Returns out (B, Hq, N, Dv) and lse (B, Hq, N).
    """
    rule = read_rule(options.rule, operands)
    ring = rule.ring if options.ring is None else options.ring
    call = rule.call(data, operands, options.scale, options.q_offset)
    # A rank without tokens takes part in a ring: its problem is that of all ranks.
    joint = None if ring is None else ring_problem(rule, options.rule, ring, q, k, v, call)
    if _is_empty(joint, q, k, v):
        lse = q.new_full(q.shape[:3], -math.inf, dtype=lse_dtype(q.dtype))
        return empty_out(q, v, is_by_token(q)).zero_(), lse
    q, k, v = with_rows(q), with_rows(k), with_rows(v)
    if ring is not None and joint is not None:
        return ring.forward(joint, call, q, k, v)
    plan = plan_of(rule, q, k, v, options.q_offset, options.training, call.score_mod)
    _check_offsets(plan, call)
    return execute.forward(plan, call, q, k, v)


def _check_offsets(plan: Plan, call: Call) -> None:
    """Raise ValueError for offsets per sequence that the plan's lowering cannot compute."""
    if call.offsets is not None and plan.lowering != "native":
        raise ValueError(
            "q_offset as a tensor, one position for each sequence, is computed by the lowering "
            "'native' alone, which is not possible here: "
            f"the plan is {plan.lowering!r} on {plan.problem.device}. "
            "Call the sequences one by one, each with a number"
        )


@_own_modes()
def run_backward(
    saved: Saved, data: Sequence[Tensor] | None, operands: Sequence[Tensor] | None, options: Options
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Contiguous gradients of q, k and v, and of learned operands.

    Those of the operands are one vector.
    """
    rule = read_rule(options.rule, operands)
    call = rule.call(data, operands, options.scale, options.q_offset, options.learned)
    saved = saved.map(with_rows)
    gradients = _backward(rule, call, saved, options)
    sums = () if call.score_mod is None else call.score_mod.sums
    learned = flat(sums, saved.q)
    # One by one, so that an original is freed before the next one is copied.
    grad_q = gradients.pop(0).contiguous()
    grad_k = gradients.pop(0).contiguous()
    grad_v = gradients.pop(0).contiguous()
    return grad_q, grad_k, grad_v, learned


def _backward(rule: Rule, call: Call, saved: Saved, options: Options) -> list[Tensor]:
    """Gradients of q, k and v; adds those of operands in place."""
    q, k, v = saved.q, saved.k, saved.v
    ring = rule.ring if options.ring is None else options.ring
    joint = None if ring is None else ring_problem(rule, options.rule, ring, q, k, v, call)
    if _is_empty(joint, q, k, v):
        return [torch.zeros_like(x) for x in (q, k, v)]
    if ring is not None and joint is not None:
        return [*ring.backward(joint, call, saved)]
    plan = plan_of(rule, q, k, v, options.q_offset, True, call.score_mod)
    return [*execute.backward(plan, call, saved)]
