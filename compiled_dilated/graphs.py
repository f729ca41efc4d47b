"""Replacements of the attention operator in traced graphs.

On a CPU the native operator, which runs without Python. On a GPU the Triton kernels of lanes, which
inductor compiles into the graph. Elsewhere the operator itself.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, ops
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode

from . import call_checks, planner
from .execution import Options, problem_at, run, run_backward
from .lowerings import native
from .operators import attend_backward_operator, attend_operator
from .partials import Saved, laid_out
from .plans import Scores
from .rules import read_rule, reads_contents, score_slots

# The operators, for importers that need their traces too.
__all__ = ["attend_backward_operator", "attend_operator"]


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


def _traces_kernels(options: Options, q: Tensor, k: Tensor, v: Tensor, tensors: int) -> bool:
    """Whether a graph can contain the kernels of lanes for this call.

    tensors: number of data and operands. The lists of the kernels are constants of the graph, so
    that all lengths must be numbers.
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
    if not _traces_kernels(options, q, k, v, len(data or ()) + len(operands or ())):
        return mode.__torch_dispatch__(func, types, args, kwargs)
    with mode:
        out, lse = run(q, k, v, None, None, options)
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
