"""Memory planning for any fx graph: what lives when, when most lives, and one arena in which it all fits. Knows no attention."""

from . import arena, footprint, liveness, materialize, peak, remat, reorder

__all__ = ["arena", "footprint", "liveness", "materialize", "peak", "remat", "reorder"]
