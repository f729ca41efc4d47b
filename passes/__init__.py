"""Memory planning for any fx graph: what lives when, when most lives, and passes that make it less. Knows no attention.

step = passes.compile(model, memory_budget="6GiB")      torch.compile with the cheapest passes under which a step fits
print(passes.report(step))                              predicted peaks, what each pass did, who holds the memory
passes.estimate(model, example_inputs, train=True)      peak and time of every candidate, before anything runs
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import arena, costs, footprint, liveness, peak
    from .causal import Causal
    from .chunk import Chunk
    from .compiled import compile, estimate
    from .hooks import inductor_configs
    from .linear_cross_entropy import LinearCrossEntropy
    from .materialize import Materialize
    from .planning import BudgetError, pipeline
    from .remat import Remat
    from .reorder import Reorder
    from .reports import report
    from .spill import Spill
    from .stages import Pass, Stage
    from .stream_qkv import StreamQKV

# Where each name lives. Most bring torch's compiler, which takes seconds, and come when they are asked for.
_HOMES = {
    "BudgetError": "planning",
    "Causal": "causal",
    "Chunk": "chunk",
    "LinearCrossEntropy": "linear_cross_entropy",
    "Materialize": "materialize",
    "Pass": "stages",
    "Remat": "remat",
    "Reorder": "reorder",
    "Spill": "spill",
    "Stage": "stages",
    "StreamQKV": "stream_qkv",
    "compile": "compiled",
    "estimate": "compiled",
    "inductor_configs": "hooks",
    "pipeline": "planning",
    "report": "reports",
}
_MODULES = ("arena", "costs", "footprint", "liveness", "peak")

__all__ = [
    "BudgetError",
    "Causal",
    "Chunk",
    "LinearCrossEntropy",
    "Materialize",
    "Pass",
    "Remat",
    "Reorder",
    "Spill",
    "Stage",
    "StreamQKV",
    "arena",
    "compile",
    "costs",
    "estimate",
    "footprint",
    "inductor_configs",
    "liveness",
    "peak",
    "pipeline",
    "report",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return found


def __dir__() -> list[str]:
    return __all__
