"""Functions inside torch.compile: how Dynamo traces a score_mod or a mask_mod of ours, tensors and numbers that it captures too.

    attend_with_functions(frame, q, ..., mask_mods, score_mod)      in the user's code
    -> a node that holds the functions as subgraphs, and what they capture as its arguments      in Dynamo's graph
    -> compiled_dilated::attend with the rule as text      in all graphs after that, exported ones too

The way is FlexAttention's own, whose tracing of a function this uses. Imported when the first graph with a function is traced.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch._dynamo.utils import proxy_args_kwargs
from torch._dynamo.variables import higher_order_ops as dynamo
from torch._dynamo.variables.builder import wrap_fx_proxy
from torch._ops import HigherOrderOperator

from .autograd import attend_bound
from .mods import as_tensor
from .partials import lse_dtype
from .rules import bind


class _AttendWithFunctions(HigherOrderOperator):
    """Never dispatched: where it is called, functions are traced to text and the call becomes one of the operator."""

    def __init__(self) -> None:
        super().__init__("compiled_dilated_attend", cacheable=True)  # type: ignore[no-untyped-call]

    def __call__(
        self,
        frame: str,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        data: Sequence[Tensor],
        literals: Sequence[Tensor],
        scale: float,
        q_offset: Any,
        wants_lse: bool,
        mask_mods: Sequence[Any],
        score_mod: Any,
        captured: Sequence[Sequence[Any]] = (),
    ) -> tuple[Tensor, Tensor]:
        """out and lse. captured: what Dynamo lifted out of each function, the score_mod's last."""
        if captured:
            functions = [_bound(fn, values) for fn, values in zip((*mask_mods, score_mod), captured, strict=True)]
            *mask_mods, score_mod = functions
        bound = bind(frame, literals, mask_mods, score_mod, lse_dtype(q.dtype))
        return attend_bound(bound, q, k, v, data, scale, q_offset, wants_lse)


def _bound(fn: Any, captured: Sequence[Any]) -> Any:
    """A subgraph with what it captures; numbers that vary become tensors, which a graph can carry."""
    if fn is None:
        return None
    tensors = [x if isinstance(x, Tensor) else as_tensor(x) for x in captured]

    def bound(*scalars: Tensor) -> Any:
        return fn(*scalars, *tensors)

    return bound


attend_with_functions = _AttendWithFunctions()


class _Variable(dynamo.FlexAttentionHigherOrderVariable):
    """How Dynamo traces the call: each function as a subgraph called with scalars."""

    _HOP_NAME = "torch.ops.higher_order.compiled_dilated_attend"

    def _call_function(self, tx: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        *plain, mask_mods, score_mod = args
        query = plain[1]
        nodes, captured = [], []
        for mask_mod in mask_mods.items:
            node, lifted = self.create_wrapped_node(tx, query, mask_mod, "mask_fn")
            nodes.append(node)
            captured.append(lifted)
        score_node = None
        if not (score_mod.is_python_constant() and score_mod.as_python_constant() is None):
            score_node, lifted = self.create_wrapped_node(tx, query, score_mod, "score_mod")
            captured.append(lifted)
        else:
            captured.append(())
        proxies, _ = proxy_args_kwargs(plain, {})
        proxy = tx.output.create_proxy(
            "call_function", self.value, args=(*proxies, tuple(nodes), score_node, tuple(captured)), kwargs={}
        )
        return wrap_fx_proxy(tx=tx, proxy=proxy, example_value=None)


dynamo._hop_name_to_variable_class[attend_with_functions.__name__] = _Variable
