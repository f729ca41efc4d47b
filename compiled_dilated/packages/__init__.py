"""Models and programs as files that run without this package.

export  ->  model.pt2             compiled graphs (torch.export, AOTInductor): a model,
                                  optionally a decoding step
            model.pt2.so          loader for C++; opens the best kernel that the CPU runs
            model.pt2.avx512.so   the native attention kernel, per instruction set
            model.pt2.avx2.so
            model.pt2.checks.so   in place of these two, for a GPU: the check of inputs
            model.pt2.json        entries, inputs, ranges, versions, digests of the other files

load    ->  a callable that checks its inputs; digests, versions and device are checked first
inspect ->  the contents of the .json file; nothing is executed
"""

from .about import About, inspect
from .entries import Entry, Input
from .exporting import export
from .loading import Loaded, load

__all__ = ["About", "Entry", "Input", "Loaded", "export", "inspect", "load"]
