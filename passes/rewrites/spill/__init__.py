"""Spilling saved activations between forward and backward: to nameless files or host memory."""

from .stores import Usage, usage
from .transfers import Spill

__all__ = ["Spill", "Usage", "usage"]
