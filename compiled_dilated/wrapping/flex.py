"""Replacement of flex_attention in a graph.

Its mask_mod is read as masks; its score_mod remains a score_mod.
"""

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
from .places import line_of
from .reading.expressions import TRUE, Expression, Index
from .reading.reader import Reader
from .reading.scopes import Scope

FLEX = flex_attention
# The options that torch's own wrapper passes by default.
_DEFAULT_OPTIONS = {
    "BACKEND": "AUTO",
    "PRESCALE_QK": False,
    "ROWS_GUARANTEED_SAFE": False,
    "BLOCKS_ARE_CONTIGUOUS": False,
    "WRITE_DQ": True,
}
# Set by return_lse and return_aux; the graph shows which results are read.
_OUTPUTS = ("OUTPUT_LOGSUMEXP", "OUTPUT_MAX")
# The block size of a BlockMask without blocks.
_NO_BLOCKS = 2**30
_LOG_2 = math.log(2.0)


class _DeviceCheck:
    """Torch's check of devices, replaced while a wrapped model is traced.

    Torch refuses CPU inputs with gradients, since its own kernel has no backward there. The kernel
    that replaces it has one. Dynamo traces one model at a time, under its lock.
    """

    def __init__(self) -> None:
        self._original = torch_flex._validate_device
        self._lock = threading.Lock()
        self._thread: int | None = None

    def replace(self) -> None:
        """Replace the check for the trace of this thread. Idempotent."""
        with self._lock:
            self._thread = threading.get_ident()
            torch_flex._validate_device = _check_device

    def restore(self) -> None:
        """Restore the check if this thread has replaced it."""
        if self._thread != threading.get_ident():
            return
        with self._lock:
            # Unless another thread has begun a trace since.
            if self._thread == threading.get_ident():
                self._thread = None
                torch_flex._validate_device = self._original


def _check_device(query: Tensor, key: Tensor, value: Tensor) -> None:
    if query.device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"attention is computed on a CPU or a CUDA device; got query on {query.device.type}"
        )


device_check = _DeviceCheck()


class FlexCall:
    """A call of flex_attention in a graph.

    Raises NotImplementedError, with the source line, for what is not computed.
    """

    def __init__(self, part: GraphModule, node: Node) -> None:
        self.part, self.node = part, node
        arguments: tuple[Any, ...] = node.args
        self.query, self.key, self.value, score_mod = arguments[:4]
        self.block_mask, self.scale, options = arguments[4:7]
        self.score_tensors, self.mask_tensors = arguments[7:9]
        self.score_graph = getattr(part, score_mod.target)
        self.mask_graph = getattr(part, self.block_mask[-1].target)
        self._check(dict(options))

    def _check(self, options: dict[str, Any]) -> None:
        line = line_of(self.node)
        tuned = [
            name
            for name, value in options.items()
            if name not in _OUTPUTS and _DEFAULT_OPTIONS.get(name) != value
        ]
        if tuned:
            raise NotImplementedError(
                f"kernel_options {', '.join(sorted(tuned))} of flex_attention are for torch's own "
                f"kernel{line}. Leave them out"
            )
        if self._reads(2):
            raise NotImplementedError(
                f"max_scores of flex_attention are not computed{line}. "
                "Leave them out of return_aux=AuxRequest(...)"
            )

    def check_tiles(self, mask: Expression | None) -> None:
        """Raise NotImplementedError for a BlockMask whose tiles hide more than its mask_mod."""
        sizes = [size for size in self.block_mask if isinstance(size, int)][-2:]
        if mask == TRUE and min(sizes) < _NO_BLOCKS:
            raise NotImplementedError(
                f"a BlockMask of tiles alone is not read{line_of(self.node)}: give it a mask_mod "
                "that says the same, BlockMask.from_kv_blocks(..., mask_mod=...)"
            )

    @property
    def returns_lse(self) -> bool:
        """Whether the log-sum-exp is read."""
        return self._reads(1)

    def _reads(self, result: int) -> bool:
        """Whether one of the three results is read: out, log-sum-exp, maxima."""
        return any(user.args[1] == result and user.users for user in self.node.users)

    def read_mask(self, reader: Reader, outer: Scope) -> Expression | None:
        """The mask_mod as an expression; None if a part has no rule."""
        (output,) = self.mask_graph.graph.find_nodes(op="output")
        operands = (*(Index(name) for name in ("b", "h", "q", "kv")), *self.mask_tensors)
        scope = Scope(self.mask_graph, output, outer, operands)
        mask = reader.value(_result_of(self.mask_graph), scope, ())
        # Values inside of the mask_mod exist for single pairs only: they cannot be captured.
        _, captured = reader.used(mask)
        if any(origin is scope for origin, _ in captured):
            return None
        return mask

    def replacement(self, attention: Attention, is_read: bool) -> Flex:
        """The replacement of the call.

        is_read: whether the structure of `attention` contains the mask_mod.
        """
        score_mod, mask_mod = self.score_graph, self.mask_graph
        if _is_identity(score_mod):
            score_mod = None
        if is_read:
            mask_mod = None
        return Flex(attention, score_mod, mask_mod, self.returns_lse)

    def arguments(self, captured: Sequence[Node]) -> dict[str, Any]:
        """The arguments of the replacement.

        captured: nodes that the structure reads.
        """
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
    """flex_attention by an `Attention`.

    score_mod: its graph, if any.
    mask_mod: graph of a mask_mod that was not read and is evaluated per pair, if any.
    returns_lse: whether the log-sum-exp is read.
    """

    def __init__(
        self, attention: Attention, score_mod: Any, mask_mod: Any, returns_lse: bool
    ) -> None:
        self.attention, self.score_mod, self.mask_mod = attention, score_mod, mask_mod
        self.returns_lse = returns_lse
        # Caches of compiled graphs are keyed by their code, which contains this name.
        codes: list[str | None] = []
        for graph in (score_mod, mask_mod):
            codes.append(None if graph is None else graph.code)
        self.__name__ = f"flex_{attention.__name__}_{digest(*codes)}"

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
        """The results of torch's operator: out, log-sum-exp to base 2, no maxima.

        The log-sum-exp is empty if it is not read.
        """
        if key.shape[0] != query.shape[0]:
            key, value = (x.expand(query.shape[0], *x.shape[1:]) for x in (key, value))
        # The call's functions, with the tensors that they capture.
        score_mod: Any = None
        if self.score_mod is not None:
            score_mod = _with(self.score_mod, score_tensors)
        conditions: list[Any] = []
        if self.mask_mod is not None:
            conditions.append(_with(self.mask_mod, mask_tensors))
        result = self.attention.attend(
            query,
            key,
            value,
            self._model_mask(),
            captured,
            score_mod,
            conditions=conditions,
            scale=scale,
            return_lse=self.returns_lse,
        )
        empty = query.new_empty(0)
        if not self.returns_lse:
            return result, empty, empty
        out, lse = result
        return out, lse / _LOG_2, empty

    def _model_mask(self) -> str:
        """The call's mask and score_mod as text, for the table of sites."""
        mask = "a mask_mod"
        if self.mask_mod is None:
            mask = str(self.attention.structure)
        if self.score_mod is None:
            return mask
        return f"{mask} with a score_mod"


def _with(graph: Any, tensors: Sequence[Any]) -> Any:
    """A graph with its captured tensors as a function of scalars."""

    def function(*scalars: Tensor) -> Any:
        return _first_of(graph(*scalars, *tensors))

    return function


def _result_of(graph: GraphModule) -> Any:
    (output,) = graph.graph.find_nodes(op="output")
    (result,) = output.args
    return _first_of(result)


def _first_of(result: Any) -> Any:
    """The result of a graph, also of a tuple of one."""
    if isinstance(result, (tuple, list)):
        return result[0]
    return result


def _is_identity(score_graph: GraphModule) -> bool:
    """Whether a score_mod returns the score unchanged."""
    return _result_of(score_graph) is score_graph.graph.find_nodes(op="placeholder")[0]
