"""Attention of whole models: layers, their programs, and counts of work.

layers       the user's choice of programs, per layer
sites        Site: a layer's program and last call; `sites(model)` prints a table
graphs       wrap: models of any kind, compiled in place
rewriting    the backend that replaces attention in their graphs
calls, multihead, flex    the replacements, by operator
reading/     masks that a graph makes, as expressions
structures/  expressions as masks, data tensors and biases
places       modules and source lines of nodes
scores       biases as score_mods
"""
