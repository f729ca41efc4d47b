"""Memory planning for any fx graph: what lives when, when most lives, and one arena in which it all fits. Knows no attention."""

from . import arena, chunk, linear_cross_entropy, liveness, peak, stream_qkv

__all__ = ["arena", "chunk", "linear_cross_entropy", "liveness", "peak", "stream_qkv"]
