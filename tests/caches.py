"""Every table that this package keeps in the process, so that tests can empty them between any two calls."""

from __future__ import annotations

import sys
from functools import _lru_cache_wrapper

from compiled_dilated.planner import PLANS


def lru_caches() -> list[_lru_cache_wrapper]:
    """The functions of the package that remember results."""
    modules = [
        module for name, module in sys.modules.items() if name.split(".")[0] == "compiled_dilated"
    ]
    return [
        x for module in modules for x in vars(module).values() if isinstance(x, _lru_cache_wrapper)
    ]


def forget() -> None:
    """Empty them all."""
    PLANS.clear()
    for cache in lru_caches():
        cache.cache_clear()
