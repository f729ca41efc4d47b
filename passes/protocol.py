"""Pass and Stage: what a pass is, and when it runs."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Protocol, runtime_checkable

from torch.fx import Graph


class Stage(Enum):
    """The graph that a pass rewrites, in torch.compile's order."""

    DYNAMO = "the model as captured: functions and modules' calls, before autograd"
    JOINT = "forward and backward in one graph of aten operators; in inference the forward only"
    LOWERED = "one aten graph that inductor lowers next: a forward, a backward or an inference"


@runtime_checkable
class Pass(Protocol):
    """A rewriting of a graph, as a frozen dataclass.

    Its repr and its source name it in the compile cache.

    stage: when it runs
    keeps_bits: the results are the same bits as without it; else they may differ by rounding

    A pass may also have `options`, a mapping of names in torch._inductor.config to values that it
    relies on and that compilation sets. It is not part of the protocol: most passes have none.
    """

    @property
    def stage(self) -> Stage: ...

    @property
    def keeps_bits(self) -> bool: ...

    def __call__(self, graph: Graph) -> Sequence[str]:
        """Rewrite a graph in-place.

        Returns a line of text for each change; none if the graph was left alone.
        """
        ...
