"""Masks that a graph computes, read as expressions of a pair's indices.

expressions    Index, Number, Entry, Apply; evaluate
simplify       apply: an operator on expressions, simplified where that is exact
writes         values that a graph changes in place
scopes         graphs inside of graphs, and what they pass to each other
reader         Reader: a node's entry at some indices, by rules
creation, views, elementwise    the rules
rules          RULES: the table of all rules, by function and method of torch
"""
