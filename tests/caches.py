"""All caches of the package and of inductor, and how tests empty them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from functools import _lru_cache_wrapper
from typing import Any

from torch._inductor.cpu_vec_isa import valid_vec_isa_list
from torch._inductor.utils import fresh_cache

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


@contextlib.contextmanager
def empty_inductor_caches() -> Iterator[None]:
    """Nothing that inductor compiled is found within the block.

    The CPU's instructions are determined before: to build their tests anew takes seconds.
    """
    valid_vec_isa_list()
    with fresh_cache():
        yield
