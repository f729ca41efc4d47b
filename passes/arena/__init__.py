"""Offsets in one arena for buffers with known lifetimes, an independent checker, and a graph that runs in such an arena."""

from .executor import Executor
from .placements import Buffer, Placement
from .solver import solve
from .validator import validate

__all__ = ["Buffer", "Executor", "Placement", "solve", "validate"]
