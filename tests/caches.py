"""Every table that this package keeps in the process, so that tests can empty them between any two calls."""

from __future__ import annotations

import gc
import sys
from functools import _lru_cache_wrapper

from compiled_dilated.lowerings import biases
from compiled_dilated.planner import PLANS


def lru_caches() -> list[_lru_cache_wrapper]:
    """The functions of the package that remember results."""
    modules = {id(module) for name, module in sys.modules.items() if name.split(".")[0] == "compiled_dilated"}
    names = {vars(module).get("__name__") for module in sys.modules.values() if id(module) in modules}
    return [x for x in gc.get_objects() if isinstance(x, _lru_cache_wrapper) and getattr(x, "__module__", None) in names]


def forget() -> None:
    """Empty them all."""
    PLANS.clear()
    biases.KEPT.clear()
    for cache in lru_caches():
        cache.cache_clear()
