"""All caches of the package, and how tests empty them."""

from __future__ import annotations

import sys
from functools import _lru_cache_wrapper
from typing import Any

from compiled_dilated.planner import PLANS


def lru_caches() -> list[_lru_cache_wrapper[Any]]:
    """The cached functions of the package."""
    caches = []
    for name, module in sys.modules.items():
        if name.split(".")[0] == "compiled_dilated":
            caches += [x for x in vars(module).values() if isinstance(x, _lru_cache_wrapper)]
    return caches


def forget() -> None:
    """Empty all caches."""
    PLANS.clear()
    for cache in lru_caches():
        cache.cache_clear()
