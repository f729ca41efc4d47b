"""score_mods and mask_mods inside torch.compile: a higher-order operator for Dynamo.

    attend_with_functions(frame, q, ..., mask_mods, score_mod)   in the user's code
    -> a node with the functions as subgraphs and their captured
       tensors and numbers as arguments                          in Dynamo's graph
    -> compiled_dilated::attend with the rule as text            in all later graphs, exported too

It reuses FlexAttention's tracing of a function. Imported with the first graph that has a function.
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
    """Tracing of functions to text before a call of the attention operator.

    Never dispatched itself.
    """

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
        """out and lse of the rule with its functions.

        captured: tensors and numbers that Dynamo lifted out of each function, the score_mod's last.
        """
        if captured:
            functions = []
            for fn, values in zip((*mask_mods, score_mod), captured, strict=True):
                functions.append(_bound(fn, values))
            *mask_mods, score_mod = functions
        bound = bind(frame, literals, mask_mods, score_mod, lse_dtype(q.dtype))
        return attend_bound(bound, q, k, v, data, scale, q_offset, wants_lse)


def _bound(fn: Any, captured: Sequence[Any]) -> Any:
    """A subgraph with its captured tensors; symbolic numbers become tensors."""
    if fn is None:
        return None
    tensors = []
    for x in captured:
        tensors.append(x if isinstance(x, Tensor) else as_tensor(x))

    def bound(*scalars: Tensor) -> Any:
        return fn(*scalars, *tensors)

    return bound


attend_with_functions = _AttendWithFunctions()


class _Variable(dynamo.FlexAttentionHigherOrderVariable):
    """Dynamo's tracing of the call: every function as a subgraph of scalars."""

    _HOP_NAME = "torch.ops.higher_order.compiled_dilated_attend"

    def _call_function(self, tx: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        *plain, mask_mods, score_mod = args
        query = plain[1]
        # 1. One subgraph a function; `lifted` are its captured values, in this graph.
        nodes, captured = [], []
        for mask_mod in mask_mods.items:
            node, lifted = self.create_wrapped_node(tx, query, mask_mod, "mask_fn")
            nodes.append(node)
            captured.append(lifted)
        if score_mod.is_python_constant() and score_mod.as_python_constant() is None:
            score_node, lifted = None, ()
        else:
            score_node, lifted = self.create_wrapped_node(tx, query, score_mod, "score_mod")
        captured.append(lifted)
        # 2. The node that calls the operator with the subgraphs.
        proxies, _ = proxy_args_kwargs(plain, {})
        arguments = (*proxies, tuple(nodes), score_node, tuple(captured))
        proxy = tx.output.create_proxy("call_function", self.value, args=arguments, kwargs={})
        return wrap_fx_proxy(tx=tx, proxy=proxy, example_value=None)


dynamo._hop_name_to_variable_class[attend_with_functions.__name__] = _Variable
