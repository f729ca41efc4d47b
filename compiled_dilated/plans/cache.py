"""Plans by value."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

AnyPlan = TypeVar("AnyPlan")


class PlanCache:
    """A cache of plans that drops the least recently used.

    Safe to empty at any moment.

    most: limit of plans.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._plans: OrderedDict[Hashable, Any] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], AnyPlan]) -> AnyPlan:
        """The plan of this key; `make()` if there is none."""
        with self._lock:
            if key in self._plans:
                self._plans.move_to_end(key)
                cached: AnyPlan = self._plans[key]
                return cached
        # Not under the lock: planning takes long, and may plan parts of its own.
        plan = make()
        with self._lock:
            self._plans[key] = plan
            while len(self._plans) > self.most:
                self._plans.popitem(last=False)
        return plan

    def __len__(self) -> int:
        return len(self._plans)

    def clear(self) -> None:
        """Drop all plans."""
        with self._lock:
            self._plans.clear()
