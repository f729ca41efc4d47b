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


# The kernels of a forward in a graph, by q, k and v.
Kernels = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def _is_on_cpu(q: Tensor) -> bool:
    return q.device.type == "cpu"


def _keeps_operators(q: Tensor) -> bool:
    """Whether a graph keeps the operator.

    So on a CPU, and in the graphs of torch.export: an exported program takes no constants after its
    first trace. Inductor traces it again.
    """
    if _is_on_cpu(q):
        return True
    # Imported late: it imports Dynamo, which takes longer than all of this package.
    from torch.export._trace import custom_triton_ops_decomposition_disabled

    return bool(custom_triton_ops_decomposition_disabled())


def _forward_kernels(
    rule: Rule, options: Options, q: Tensor, k: Tensor, v: Tensor
) -> Kernels | str:
    """The kernels for a graph, or why it keeps the operator."""
    if _is_fixed(options, q, k, v):
        problem = problem_at(rule, q, k, v, options.q_offset, options.training)
        if planner.plan_for(problem, rule.lowering).lowering == "lanes":
            return partial(run, data=None, operands=None, options=options)
    if options.training:
        return "a backward has no lists for lengths that vary"
    longest = _longest(rule, options, q, k, v)
    if isinstance(longest, str):
        return longest
    proposal = lanes.propose(longest)
    if isinstance(proposal, Refusal):
        return proposal.reason
    if not _takes_lanes(rule, longest):
        return f"lowering={rule.lowering!r} is not lanes"
    call = rule.call(None, None, options.scale, options.q_offset)
    return partial(lanes.forward_up_to, proposal.work[0], longest, call)


def _is_fixed(options: Options, q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether all sizes are numbers, none of them 0."""
    sizes = (*q.shape, *k.shape, *v.shape)
    return all(isinstance(size, int) for size in (*sizes, options.q_offset)) and 0 not in sizes


def _longest(rule: Rule, options: Options, q: Tensor, k: Tensor, v: Tensor) -> Problem | str:
    """The problem of the greatest lengths, or why there is none."""
    if isinstance(rule.program, PerLength):
        return "its program depends on the length"
    numbers = (*q.shape[1::2], *k.shape[1::2], v.shape[3])
    if not all(isinstance(number, int) and number for number in numbers):
        return f"numbers of heads and widths must be fixed; got {numbers}"
    queries, keys = greatest(options.q_offset + q.shape[2]), greatest(k.shape[2])
    if queries is None or keys is None or max(queries, keys) > lanes.MOST_LISTED:
        return f"its lists are for at most {lanes.MOST_LISTED:,} tokens, and lengths may be more"
    dtype = str(q.dtype).removeprefix("torch.")
    return Problem(
        rule.program, 1, q.shape[1], k.shape[1], queries, keys, q.shape[3], v.shape[3], dtype,
        q.device.type,
    )  # fmt: skip


def _takes_lanes(rule: Rule, problem: Problem) -> bool:
    """Whether a call is computed by lanes, at its greatest lengths."""
    if rule.lowering == "auto" and not _WITHOUT_PYTHON.get():
        return planner.plan_for(problem).lowering == "lanes"
    return rule.lowering in ("auto", "lanes")


# AOTAutograd traces under this mode, and decomposes operators of Triton kernels there alone.
@attend_operator.register_torch_dispatch(FunctionalTensorMode)
def _(mode: Any, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    """Trace the kernels of the forward."""
    q, k, v, data, operands, text, scale, q_offset, training, by_token = args
    if _keeps_operators(q):
        return mode.__torch_dispatch__(func, types, args, kwargs)
    kernels: Kernels | str = "it reads data or tensors of a function"
    if not data and not operands:
        rule = read_rule(text, None)
        kernels = "a ring exchanges messages"
        if rule.ring is None:
            options = Options(text, scale, q_offset, training, True, (), 0)
            kernels = _forward_kernels(rule, options, q, k, v)
    if isinstance(kernels, str):
        if _WITHOUT_PYTHON.get():
            raise ValueError(
                "on a GPU a graph without Python computes attention by lanes, and they refuse "
                f"this one: {kernels}. Use cd.compile on the GPU, or export on a CPU"
            )
        return mode.__torch_dispatch__(func, types, args, kwargs)
    with mode:
        out, lse = kernels(q, k, v)
        return laid_out(out, by_token), lse.contiguous()


@attend_backward_operator.register_torch_dispatch(FunctionalTensorMode)
def _(mode: Any, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    """Trace the kernels of the backward, of fixed shapes."""
    grad_out, grad_lse, q, k, v, out, lse, data, operands, text, scale, q_offset, _ = args
    options = Options(text, scale, q_offset, True, True, (), 0)
    is_fixed = not data and not operands and _is_fixed(options, q, k, v)
    if is_fixed and not _keeps_operators(q):
        rule = read_rule(text, None)
        problem = problem_at(rule, q, k, v, q_offset, True)
        if rule.ring is None and planner.plan_for(problem, rule.lowering).lowering == "lanes":
            saved = Saved(q, k, v, out, lse, grad_out, grad_lse)
            with mode:
                return run_backward(saved, None, None, options)
    return mode.__torch_dispatch__(func, types, args, kwargs)
