"""Batches of dense tiles: the common parts of `dense`, `strided` and `tiled`."""
