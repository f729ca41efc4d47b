"""Row-wise work: recognized in graphs, written as text, run and differentiated in chunks."""
