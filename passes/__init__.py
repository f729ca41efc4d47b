"""Memory planning for any fx graph: what lives when, when most lives, and passes that make it less. Knows no attention.

step = passes.compile(model, memory_budget="6GiB")      torch.compile with the cheapest passes under which a step fits
print(passes.report(step))                              predicted peaks, what each pass did, who holds the memory
passes.estimate(model, example_inputs, train=True)      peak and time of every candidate, before anything runs
"""

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
