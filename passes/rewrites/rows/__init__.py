"""Row-wise work: recognized in graphs, written as text, run and differentiated.

In chunks of rows.

primitives     what a row-wise call computes, and its backward
calls          calls in graphs as primitives: the table
readers        nodes as primitives, with the roles of their operands
steps          steps of a recipe, and their text
gradients      the gradients of steps
recipes        steps run, counted and differentiated
growing        sets of nodes that work row by row
regions        MLPs and heads, for chunk
heads          which dims of a value are batch, heads and tokens
block_recipes  a transformer block as recipes
blocks         transformer blocks, for stream_qkv
attentions     attention operators that take some queries at a time
positions      masks computed from positions, for causal
losses         linear and cross entropy in chunks of tokens
chunks         the size of a chunk, and replacing nodes
"""
