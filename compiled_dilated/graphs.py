"""Replacements of the attention operator in traced graphs.

On a CPU the native operator, which runs without Python. On a GPU the Triton kernels of lanes, which
inductor compiles into the graph. Elsewhere the operator itself.

The kernels read lists, which are constants of a graph. Lengths may be symbolic in a forward without
gradients if they have upper bounds, as those of torch.export: the lists are then of the longest.
torch.compile gives none, and a backward has no lists of that kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

from torch import Tensor, ops
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode

from . import call_checks, planner
from .execution import Options, problem_at, run, run_backward
from .lowerings import lanes, native
from .operators import attend_backward_operator, attend_operator
from .partials import Saved, laid_out
from .plans import Problem, Refusal, Scores
from .programs import PerLength
from .rules import Rule, read_rule, reads_contents, score_slots
from .symbolic import greatest

# The operators, for importers that need their traces too.
__all__ = ["attend_backward_operator", "attend_operator", "without_python"]

# Whether graphs must run without Python, so that 'auto' is lanes wherever they compute a program.
_WITHOUT_PYTHON: ContextVar[bool] = ContextVar("without_python", default=False)


@contextmanager
def without_python() -> Iterator[None]:
    """Trace graphs that run without Python, as those of packages."""
    token = _WITHOUT_PYTHON.set(True)
    try:
        yield
    finally:
        _WITHOUT_PYTHON.reset(token)


@attend_operator.register_torch_dispatch(ProxyTorchDispatchMode)
def _(mode: Any, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    """Trace the native operator if it computes the rule.

    Such a graph runs without Python.
    """
    call_checks.no_onnx_export()
    q, k, v, data, operands, rule, scale, q_offset, _, by_token = args
    work = None
    # Contents of operands, as long lists stored in them, have no values in a trace.
    if not reads_contents(rule):
        meaning = read_rule(rule, operands)
        scores = Scores.of(meaning.call(data, operands, scale, 0).score_mod)
        if meaning.ring is None:
            work = native.work_of_graph(meaning.program, meaning.lowering, scores, q, k, v)
    if work is None:
        return mode.__torch_dispatch__(func, types, args, kwargs)
    with mode:
        inputs = work.of_operator(data, operands, score_slots(rule))
        # The last data tensor may be the positions, one for each sequence.
        offsets = data[-1].squeeze(1) if len(data or ()) > len(work.names) else None
        return ops.compiled_dilated.native.default(
            q,
            k,
            v,
            *inputs,
            work.code,
            scale,
            q_offset,
            offsets,
            by_token,
        )


Kernels = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def _forward_kernels(
    options: Options, q: Tensor, k: Tensor, v: Tensor, tensors: int
) -> Kernels | None:
    """The forward by kernels that a graph can contain, or None.

    tensors: number of data and operands.
    """
    if _traces_kernels(options, q, k, v, tensors):
        return partial(run, data=None, operands=None, options=options)
    rule = read_rule(options.rule, None) if not tensors else None
    if rule is None or rule.ring is not None or options.training or q.device.type == "cpu":
        return None
    problem = _longest(rule, options, q, k, v)
    if problem is None:
        return None
    proposal = lanes.propose(problem)
    if isinstance(proposal, Refusal) or not _takes_lanes(rule, problem):
        return None
    call = rule.call(None, None, options.scale, options.q_offset)
    return partial(lanes.forward_up_to, proposal.work[0], problem, call)


def _longest(rule: Rule, options: Options, q: Tensor, k: Tensor, v: Tensor) -> Problem | None:
    """The problem of the most queries and keys that symbolic lengths may be.

    None for too large upper bounds, and for heads, widths or a program that vary.
    """
    numbers = (*q.shape[1::2], *k.shape[1::2], v.shape[3])
    queries, keys = greatest(options.q_offset + q.shape[2]), greatest(k.shape[2])
    if queries is None or keys is None or isinstance(rule.program, PerLength):
        return None
    if max(queries, keys) > lanes.MOST_LISTED:
        return None
    if 0 in (queries, keys, *numbers) or not all(isinstance(number, int) for number in numbers):
        return None
    dtype = str(q.dtype).removeprefix("torch.")
    return Problem(
        rule.program, 1, q.shape[1], k.shape[1], queries, keys, q.shape[3], v.shape[3], dtype,
        q.device.type,
    )  # fmt: skip


def _takes_lanes(rule: Rule, problem: Problem) -> bool:
    """Whether a call is computed by lanes, at its greatest lengths."""
    if rule.lowering == "auto" and _WITHOUT_PYTHON.get():
        return True
    if rule.lowering not in ("auto", "lanes"):
        return False
    return planner.plan_for(problem, rule.lowering).lowering == "lanes"


def _traces_kernels(options: Options, q: Tensor, k: Tensor, v: Tensor, tensors: int) -> bool:
    """Whether a graph can contain the kernels of lanes for this call of fixed shapes.

    tensors: number of data and operands.
    """
    sizes = (*q.shape, *k.shape, *v.shape)
    if tensors or not all(isinstance(size, int) for size in (*sizes, options.q_offset)):
        return False
    rule = read_rule(options.rule, None)
    if rule.ring is not None or 0 in sizes:
        return False
    problem = problem_at(rule, q, k, v, options.q_offset, options.training)
    return problem.device != "cpu" and planner.plan_for(problem, rule.lowering).lowering == "lanes"


# AOTAutograd traces under this mode, and decomposes operators of Triton kernels there alone.
@attend_operator.register_torch_dispatch(FunctionalTensorMode)
def _(mode: Any, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    """Trace the kernels of the forward."""
    q, k, v, data, operands, rule, scale, q_offset, training, by_token = args
    options = Options(rule, scale, q_offset, training, True, (), 0)
    kernels = _forward_kernels(options, q, k, v, len(data or ()) + len(operands or ()))
    if kernels is None:
        return mode.__torch_dispatch__(func, types, args, kwargs)
    with mode:
        out, lse = kernels(q, k, v)
        return laid_out(out, by_token), lse.contiguous()


@attend_backward_operator.register_torch_dispatch(FunctionalTensorMode)
def _(mode: Any, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    """Trace the kernels of the backward."""
    grad_out, grad_lse, q, k, v, out, lse, data, operands, rule, scale, q_offset, _ = args
    options = Options(rule, scale, q_offset, True, True, (), 0)
    if not _traces_kernels(options, q, k, v, len(data or ()) + len(operands or ())):
        return mode.__torch_dispatch__(func, types, args, kwargs)
    with mode:
        return run_backward(Saved(q, k, v, out, lse, grad_out, grad_lse), None, None, options)
