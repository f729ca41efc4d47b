"""What a pass is: a rewriting of one graph, with its settings bound when it is built, and where in the compiler it runs."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Protocol, runtime_checkable

from torch.fx import Graph


class Stage(Enum):
    """Which graph a pass is given, in the order in which torch.compile makes them."""

    DYNAMO = "the model as captured: built-in functions and modules' calls, no autograd yet"
    JOINT = "forward and backward in one graph of aten operators; in inference the forward alone"
    LOWERED = "one graph of aten operators that inductor is about to lower: a forward, a backward or an inference"


@runtime_checkable
class Pass(Protocol):
    """A rewriting of a graph. Make it a frozen dataclass: its repr and its source are its name in the compile cache.

    keeps_bits: the results are the same bits as without it. Else they may differ by rounding, and the report says so.

    A pass may also have `options`, a mapping of names in torch._inductor.config to values, which its plan counts on and who
    compiles sets. It is no part of the protocol, for most passes want none.
    """

    @property
    def stage(self) -> Stage: ...

    @property
    def keeps_bits(self) -> bool: ...

    def __call__(self, graph: Graph) -> Sequence[str]:
        """Rewrites `graph` in place. Returns a line for each change, for people to read; none where it left the graph alone."""
        ...
