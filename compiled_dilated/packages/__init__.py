"""Models and programs as files that run where this package is not installed.

export  ->  model.pt2        the compiled graph, by torch.export and AOTInductor
            model.pt2.so     the native kernel: what attention in the graph calls
            model.pt2.json   what was exported: inputs, ranges, versions, digests of both

load    ->  a callable, once digests, versions and the CPU are those of the files; it checks inputs before it runs
inspect ->  what the third file says; nothing is opened or run
"""

from .about import About, inspect
from .exporting import export
from .loading import Loaded, load

__all__ = ["About", "Loaded", "export", "inspect", "load"]
