"""Saved activations wait outside memory between forward and backward: in files that have no name, or in the host's memory."""

from .stores import Usage, usage
from .transfers import Spill

__all__ = ["Spill", "Usage", "usage"]
