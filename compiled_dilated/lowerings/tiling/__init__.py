"""Batches of dense tiles, which `dense`, `strided` and `tiled` are made of; knows no lowering."""
