"""One arena for buffers with known lifetimes: offsets, an independent validator, an executor."""

from .executor import Executor
from .placements import Buffer, Placement
from .solver import solve
from .validator import validate

__all__ = ["Buffer", "Executor", "Placement", "solve", "validate"]
