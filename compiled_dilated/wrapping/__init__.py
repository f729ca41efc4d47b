"""Attention of whole models: which layers, by which programs, and what became of them."""
