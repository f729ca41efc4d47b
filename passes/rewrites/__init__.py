"""The passes: each rewrites one graph so that it needs less memory."""
