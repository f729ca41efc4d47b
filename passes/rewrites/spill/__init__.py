"""Spilling saved activations between forward and backward, to files or host memory."""

from .stores import Usage, usage
from .transfers import Spill

__all__ = ["Spill", "Usage", "usage"]
