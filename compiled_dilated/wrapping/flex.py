"""Calls of FlexAttention in a graph: the mask_mod of their BlockMask as masks of ours, the score_mod as ours."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch._higher_order_ops.flex_attention import flex_attention
from torch.fx import GraphModule, Node
from torch.nn.attention import flex_attention as torch_flex

from .calls import Attention, digest
from .expressions import TRUE, Expression, Index
from .places import line_of
from .reading import Reader, Scope

FLEX = flex_attention
# What torch's own wrapper passes where its caller says nothing.
_PLAIN_OPTIONS = {
    "BACKEND": "AUTO",
    "PRESCALE_QK": False,
    "ROWS_GUARANTEED_SAFE": False,
    "BLOCKS_ARE_CONTIGUOUS": False,
    "WRITE_DQ": True,
}
# Said by return_lse and return_aux, for which the results that are read speak.
_OUTPUTS = ("OUTPUT_LOGSUMEXP", "OUTPUT_MAX")
# The block of a BlockMask that stands for none.
_NO_BLOCKS = 2**30
_LOG_2 = math.log(2.0)


class _Training:
    """Lets torch's flex_attention take inputs with gradients on a CPU while a wrapped model runs.

    Torch refuses them there, for its own kernel has no backward; ours, which takes its place, has one.
    """

    def __init__(self) -> None:
        self._lock, self._running = threading.Lock(), 0
        self._check = torch_flex._validate_device

    def __enter__(self) -> None:
        with self._lock:
            self._running += 1
            torch_flex._validate_device = _on_known_devices

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._running -= 1
            if not self._running:
                torch_flex._validate_device = self._check


def _on_known_devices(query: Tensor, key: Tensor, value: Tensor) -> None:
    if query.device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"attention is computed on a CPU or a CUDA device; got query on {query.device.type}"
        )


training = _Training()


class FlexCall:
    """A call of FlexAttention in a graph. Raises NotImplementedError, with the source line, for what is not computed."""

    def __init__(self, part: GraphModule, node: Node) -> None:
        self.part, self.node = part, node
        arguments: tuple[Any, ...] = node.args
        self.query, self.key, self.value, score_mod, self.block_mask, self.scale, options = (
            arguments[:7]
        )
        self.score_tensors, self.mask_tensors = arguments[7:9]
        self.score_graph = getattr(part, score_mod.target)
        self.mask_graph = getattr(part, self.block_mask[-1].target)
        self._check(dict(options))

    def _check(self, options: dict[str, Any]) -> None:
        line = line_of(self.node)
        others = {
            name: value
            for name, value in options.items()
            if name not in _OUTPUTS and _PLAIN_OPTIONS.get(name) != value
        }
        if others:
            raise NotImplementedError(
                f"kernel_options {', '.join(sorted(others))} of flex_attention are for torch's own kernel{line}. Leave them out"
            )
        if any(user.args[1] == 2 and user.users for user in self.node.users):
            raise NotImplementedError(
                f"max_scores of flex_attention are not computed{line}. Leave them out of return_aux=AuxRequest(...)"
            )

    def check_tiles(self, mask: Expression | None) -> None:
        """Raise NotImplementedError where a BlockMask says by its tiles what its mask_mod does not."""
        sizes = [size for size in self.block_mask if isinstance(size, int)][-2:]
        if mask == TRUE and min(sizes) < _NO_BLOCKS:
            raise NotImplementedError(
                f"a BlockMask of tiles alone is not read{line_of(self.node)}: give it a mask_mod that says the same, "
                "BlockMask.from_kv_blocks(..., mask_mod=...)"
            )

    @property
    def wants_lse(self) -> bool:
        """Whether the log-sum-exp is read."""
        return any(user.args[1] == 1 and user.users for user in self.node.users)

    def read_mask(self, reader: Reader, outer: Scope) -> Expression | None:
        """The mask_mod as an expression; None where parts of it are read by no rule."""
        (output,) = self.mask_graph.graph.find_nodes(op="output")
        operands = (*(Index(name) for name in ("b", "h", "q", "kv")), *self.mask_tensors)
        scope = Scope(self.mask_graph, output, outer, operands)
        (result,) = output.args if not isinstance(output.args[0], (tuple, list)) else output.args[0]
        mask = reader.value(result, scope, ())
        _, captured = reader.used(mask)
        return None if any(origin is scope for origin, _ in captured) else mask

    def replacement(self, attention: Attention, is_read: bool) -> Flex:
        """What stands in the graph for the call. is_read: whether the structure of `attention` says its mask."""
        score_mod = None if _is_identity(self.score_graph) else self.score_graph
        return Flex(attention, score_mod, None if is_read else self.mask_graph, self.wants_lse)

    def arguments(self, captured: Sequence[Node]) -> dict[str, Any]:
        """The arguments of the replacement. captured: what the structure reads."""
        return {
            "query": self.query,
            "key": self.key,
            "value": self.value,
            "scale": self.scale,
            "score_tensors": tuple(self.score_tensors),
            "mask_tensors": tuple(self.mask_tensors),
            "captured": tuple(captured),
        }


class Flex:
    """What stands in a graph for flex_attention.

    score_mod: the graph of its score_mod, None of none. mask_mod: that of a mask_mod which was not read, asked pair by pair.
    """

    def __init__(
        self, attention: Attention, score_mod: Any, mask_mod: Any, wants_lse: bool
    ) -> None:
        self.attention, self.score_mod, self.mask_mod, self.wants_lse = (
            attention,
            score_mod,
            mask_mod,
            wants_lse,
        )
        graphs = [None if graph is None else graph.code for graph in (score_mod, mask_mod)]
        self.__name__ = f"flex_{attention.__name__}_{digest(*graphs)}"

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        score_tensors: Sequence[Any],
        mask_tensors: Sequence[Any],
        captured: Sequence[Any],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """out, the log-sum-exp to base 2 as torch's operator gives it (empty if nobody reads it), and no maxima."""
        if key.shape[0] != query.shape[0]:
            key, value = (x.expand(query.shape[0], *x.shape[1:]) for x in (key, value))
        attention = self.attention
        said = str(attention.structure)
        if self.mask_mod is not None:
            said = "a mask_mod"
        if self.score_mod is not None:
            said += " with a score_mod"
        score_mod = None if self.score_mod is None else _with(self.score_mod, score_tensors)
        conditions = [] if self.mask_mod is None else [_with(self.mask_mod, mask_tensors)]
        found = attention.attend(
            query,
            key,
            value,
            said,
            captured,
            score_mod,
            conditions=conditions,
            scale=scale,
            return_lse=self.wants_lse,
        )
        empty = query.new_empty(0)
        if self.wants_lse:
            out, lse = found
            return out, lse / _LOG_2, empty
        return found, empty, empty


def _with(graph: Any, tensors: Sequence[Any]) -> Any:
    """A graph as a function of scalars, what it captures behind them."""

    def function(*scalars: Tensor) -> Any:
        result = graph(*scalars, *tensors)
        return result[0] if isinstance(result, (tuple, list)) else result

    return function


def _result_of(graph: GraphModule) -> Any:
    (output,) = graph.graph.find_nodes(op="output")
    (result,) = output.args
    return result[0] if isinstance(result, (tuple, list)) else result


def _is_identity(score_graph: GraphModule) -> bool:
    """Whether a score_mod returns the score as it is."""
    return _result_of(score_graph) is score_graph.graph.find_nodes(op="placeholder")[0]
