"""Models and programs as files that run where this package is not installed.

export  ->  model.pt2             the compiled graphs, by torch.export and AOTInductor: a model, and maybe a step of decoding
            model.pt2.so          what programs without Python open: it opens that kernel below which the CPU runs
            model.pt2.avx512.so   the native kernel, which attention in the graphs calls
            model.pt2.avx2.so
            model.pt2.json        what was exported: entries, inputs, ranges, versions, digests of the others

load    ->  a callable, once digests, versions and the CPU are those of the files; it checks inputs before it runs
inspect ->  what the last file says; nothing is opened or run
"""

from .about import About, inspect
from .entries import Entry, Input
from .exporting import export
from .loading import Loaded, load

__all__ = ["About", "Entry", "Input", "Loaded", "export", "inspect", "load"]
