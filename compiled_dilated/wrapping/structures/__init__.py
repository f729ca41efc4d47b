"""Expressions of a pair as masks, data, biases and conditions per pair.

sums           whole numbers as sums of indices, blocks and distances
spans          causal masks and windows, merged
comparisons    conditions as masks
biases         masks of numbers as conditions and biases
structure      Structure: all of that for one mask
"""
