"""Measures of a graph, read without changing it: lifetimes, peak, footprint, cost.

The submodules in __init__.pyi load on first use: some need torch's compiler, which is slow to
import.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
