"""The table of ATen's pointwise operators by name.

Each maps a call's entries to the result's node.
"""

from __future__ import annotations

from .activations import ACTIVATIONS
from .arithmetic import ARITHMETIC
from .cells import Pointwise

POINTWISE: dict[str, Pointwise] = {**ARITHMETIC, **ACTIVATIONS}
