"""Work that no row of a tensor shares with another: found in graphs, written as text, run and differentiated some rows at a time."""
