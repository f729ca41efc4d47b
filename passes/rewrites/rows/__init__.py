"""Work on rows one by one: found in graphs, written down as text, run and differentiated some rows at a time."""
