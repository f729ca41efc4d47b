"""One arena for buffers with known lifetimes: offsets, validator, executor."""

from .executor import Executor
from .placements import Buffer, Placement
from .solver import solve
from .validator import validate

__all__ = ["Buffer", "Executor", "Placement", "solve", "validate"]
